"""The report of a post-training run: one line per layer and stage, printed, and saved as JSON and CSV."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, fields
from math import log10
from pathlib import Path
from typing import Any

from torchquant._files import check_format, read_json, write_csv, write_json, write_whole
from torchquant._tables import ShownAsTables, text_table
from torchquant.errors import ConfigError, one_line
from torchquant.report import Page, Section, Table, Text, bars

FORMAT = 1
ABOUT_ERRORS = "Mean squared error of the outputs of each unit over their mean square, on a logarithmic scale."


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

    def sections(self) -> list[Section]:
        """Return the sections of a report: the errors before and after each step, and all steps as a table."""
        measured = [(i, step) for i, step in enumerate(self.steps, 1) if step.error and step.nearest_error]
        names = [f"{i} {step.path or '(model)'} {step.stage}" for i, step in measured]
        errors = {
            "rounded to nearest": [step.nearest_error for _, step in measured],
            "after the step": [step.error for _, step in measured],
        }
        y = "squared error over mean square"
        figures = [bars("Error of the outputs", names, errors, y, ABOUT_ERRORS, is_log=True)] if measured else []
        header = ["step", "stage", "layer", "nearest", "error", "gain", "changed", "rows", "seconds", "note"]
        rows = [
            [
                *(i, step.stage, step.path or "(model)", step.nearest_error, step.error),
                None if step.gain is None else f"{step.gain:+.1f} dB",
                None if step.changed is None else f"{step.changed:.1%}",
                *(step.rows, round(step.seconds, 2), step.note),
            ]
            for i, step in enumerate(self.steps, 1)
        ]
        stages = Text(f"Stages: `{', '.join(self.stages)}`.")
        return [Section("Steps", [stages, *figures, Table(header, rows, name="steps")])]

    def to_html(self) -> str:
        """Return the report as one page that loads nothing: the errors before and after as bars, and the table."""
        return Page("Post-training run", self.sections()).html()

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
