"""The report of a post-training run: one line per layer and stage, printed, and saved as JSON and CSV."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, fields
from html import escape
from math import log10
from pathlib import Path
from typing import Any

from torchquant._files import check_format, read_json, write_csv, write_json, write_whole
from torchquant._tables import ShownAsTables, text_table
from torchquant.errors import ConfigError, one_line

FORMAT = 1
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Post-training run</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #1d2733; margin: 2rem auto; max-width: 1080px; }}
table {{ border-collapse: collapse; width: 100%; }}
td, th {{ padding: .2rem .8rem .2rem 0; text-align: left; border-bottom: 1px solid #e1e6ec; }}
.before, .after {{ background: #c9d3de; font-size: .75rem; white-space: nowrap; }}
.after {{ background: #7fb3e6; }}
</style></head><body>
<h1>Post-training run</h1><p>Stages: <code>{stages}</code></p>
<h2>Error of each unit, rounded to nearest (grey) and after the step (blue), on a logarithmic scale</h2>
<table>{bars}</table>
<h2>Steps</h2>{table}
</body></html>
"""
"""The page of a report."""


@dataclass(frozen=True)
class StepReport:
    """One stage at one layer, or at the whole model (`path` "").

    `nearest_error`, `error`: mean squared error of the layer's outputs over their mean square, rounded to nearest and
    after the stage; None if no inputs were used. `changed`: share of the weights that differ from rounding to nearest.
    `rows`: number of input rows used. `note`: a remark for the reader, "" if none.
    """

    stage: str
    path: str
    seconds: float = 0.0
    nearest_error: float | None = None
    error: float | None = None
    changed: float | None = None
    rows: int = 0
    note: str = ""

    @property
    def gain(self) -> float | None:
        """Return by how many dB the error is below that of rounding to nearest."""
        if not self.nearest_error or not self.error:
            return None
        return 10.0 * log10(self.nearest_error / self.error)


@dataclass(frozen=True)
class PTQReport(ShownAsTables):
    """All steps of a run, in order. Prints as a table."""

    stages: tuple[str, ...]
    steps: tuple[StepReport, ...]

    def table(self) -> str:
        """Return a table with one line per step."""
        rows = [
            [
                step.stage,
                step.path or "(model)",
                "-" if step.nearest_error is None else f"{step.nearest_error:.3g}",
                "-" if step.error is None else f"{step.error:.3g}",
                "-" if step.gain is None else f"{step.gain:+.1f}",
                "-" if step.changed is None else f"{step.changed:.1%}",
                f"{step.seconds:.2f}",
                step.note,
            ]
            for step in self.steps
        ]
        return text_table(["stage", "layer", "nearest", "error", "dB", "changed", "seconds", "note"], rows)

    def __str__(self) -> str:
        return self.table()

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data, as `save` writes it."""
        return {"torchquant_ptq": FORMAT, "stages": list(self.stages), "steps": [asdict(step) for step in self.steps]}

    @classmethod
    def from_dict(cls, data: Any, where: str = "the data") -> PTQReport:
        """Make the report from the output of `to_dict`; `where` names the data in messages. Raises ConfigError."""
        check_format(where, data, "torchquant_ptq", FORMAT, "a report of a post-training run")
        try:
            return cls(tuple(data["stages"]), tuple(StepReport(**step) for step in data["steps"]))
        except (LookupError, TypeError) as error:
            raise ConfigError(f"{where} is not a whole report: {one_line(repr(error))}") from error

    def to_html(self) -> str:
        """Return the report as one page that loads nothing: the errors before and after as bars, and the table."""
        errors = [error for step in self.steps for error in (step.nearest_error, step.error) if error]
        low = log10(min(errors, default=1.0)) - 1.0
        scale = 100.0 / ((log10(max(errors, default=1.0)) - low) or 1.0)

        def bar(name: str, error: float) -> str:
            width = scale * (log10(error) - low) if error > 0 else 0.0
            return f'<div class="{name}" style="width:{width:.1f}%">{error:.3g}</div>'

        bars = "".join(
            f"<tr><td>{escape(step.stage)}</td><td>{escape(step.path)}</td>"
            f"<td>{bar('before', step.nearest_error)}{bar('after', step.error)}</td></tr>"
            for step in self.steps
            if step.error is not None and step.nearest_error is not None
        )
        return PAGE.format(stages=escape(", ".join(self.stages)), bars=bars, table=self._repr_html_())

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `ptq.json`, `steps.csv` and `report.html` into a folder. Returns the path of the first."""
        text = self.to_html()
        write_whole(Path(folder) / "report.html", lambda path: path.write_text(text, encoding="utf-8"))
        write_csv(Path(folder) / "steps.csv", [f.name for f in fields(StepReport)], map(asdict, self.steps))
        return write_json(Path(folder) / "ptq.json", self.to_dict())

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> PTQReport:
        """Read the `ptq.json` of a folder. Raises ConfigError."""
        path = Path(folder) / "ptq.json"
        return cls.from_dict(read_json(path), f"{path}")
