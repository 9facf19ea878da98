"""Results as a table on screen and as a JSON or CSV file."""

from __future__ import annotations

import csv
import io
import json
import os
import tempfile
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from benchmarks.harness import BASELINE, CONTROL, CONTROL_LIMITS, Comparison


@dataclass(frozen=True)
class Row:
    """One line of a table. `saved` and the targets are None where they say nothing."""

    group: str
    name: str
    ratio: float
    ratio_of_minima: float
    low: float
    high: float
    ms: float
    target: float | None = None
    saved: float | None = None
    saved_target: float | None = None
    note: str = ""


@dataclass
class Report:
    """Results of one command. `ratio_unit`, `saved_unit`: what the two columns count, in words."""

    benchmark: str
    ratio_unit: str
    saved_unit: str
    machine: dict[str, Any]
    command: str
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    groups: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(
        self,
        group: str,
        comparison: Comparison,
        saved: dict[str, float] | None = None,
        target: float | None = None,
        saved_target: float | None = None,
        notes: dict[str, str] | None = None,
    ) -> None:
        """Take one comparison. `saved`: name -> number; `notes`: name -> why a row does not count."""
        saved, notes = saved or {}, notes or {}
        for name in (BASELINE, CONTROL, *(n for n in comparison.seconds if n not in (BASELINE, CONTROL))):
            ratio = comparison.ratio(name)
            goal, saved_goal = (None, None) if name in (BASELINE, CONTROL) else (target, saved_target)
            numbers = (ratio.median, ratio.minima, ratio.low, ratio.high, ratio.ms)
            self.rows.append(Row(group, name, *numbers, goal, saved.get(name), saved_goal, notes.get(name, "")))
        self.groups[group] = {
            "valid": comparison.is_valid,
            "noise": comparison.noise,
            "indistinct": comparison.indistinct_pairs(),
            "baseline_ms": comparison.ratio(BASELINE).ms,
            "seconds": dict(comparison.seconds),
        }

    @property
    def is_valid(self) -> bool:
        """Whether every control held."""
        return all(group["valid"] for group in self.groups.values())

    def table(self) -> str:
        """The rows as text, then what is noise, then warnings."""
        header = ["", "", "ratio", "of minima", "10..90 %", "ms", "target", self.saved_unit or "saved", "target", ""]
        lines = [header, *(_cells(row, self.groups[row.group]["valid"]) for row in self.rows)]
        used = [i for i in range(len(header)) if any(line[i] for line in lines[1:])]
        widths = {i: max(len(line[i]) for line in lines) for i in used}
        text = ["  ".join(line[i].ljust(widths[i]) for i in used).rstrip() for line in lines]
        head = [f"{self.benchmark}: {self.ratio_unit}", *self._facts(), "", text[0], "-" * len(text[0]), *text[1:], ""]
        return "\n".join([*head, *(self._noise(g) for g in self.groups), *self.notes, *self._warnings()])

    def _facts(self) -> list[str]:
        m = self.machine
        allocator = "mallopt on" if m["mallopt"] else "default malloc"
        return [f"{m['cpu']}, {m['threads']} of {m['cores']} cores, torch {m['torch']}, {allocator}", self.command]

    def _noise(self, group: str) -> str:
        facts = self.groups[group]
        pairs = ", ".join(f"{a} and {b}" for a, b in facts["indistinct"])
        return f"{group}: differences below {facts['noise']:.1%} are noise" + (
            f"; the same are {pairs}" if pairs else ""
        )

    def _warnings(self) -> list[str]:
        low, high = CONTROL_LIMITS
        return [
            f"WARNING: {group}: the control left {low}..{high}; this run FAILED and its numbers mean nothing. "
            "Repeat on a quiet machine or with more --rounds"
            for group, facts in self.groups.items()
            if not facts["valid"]
        ]

    def write(self, path: Path) -> None:
        """Write .json (everything, seconds of each round included) or .csv (the rows). Raises ValueError.

        Whoever reads the path meets the old file or the whole new one.
        """
        if path.suffix == ".json":
            write_atomically(path, json.dumps({**asdict(self), "valid": self.is_valid}, indent=2) + "\n")
        elif path.suffix == ".csv":
            write_atomically(path, self._csv())
        else:
            raise ValueError(f"the results file must end in .json or .csv, got '{path.name}'")

    def _csv(self) -> str:
        context = {**self.machine, "benchmark": self.benchmark, "command": self.command}
        buffer = io.StringIO(newline="")
        writer = csv.DictWriter(buffer, [*(f.name for f in fields(Row)), "valid", *context])
        writer.writeheader()
        for row in self.rows:
            writer.writerow({**asdict(row), "valid": self.groups[row.group]["valid"], **context})
        return buffer.getvalue()


def _cells(row: Row, is_valid: bool) -> list[str]:
    return [
        row.group,
        row.name,
        f"{row.ratio:.2f}",
        f"{row.ratio_of_minima:.2f}",
        f"{row.low:.2f}..{row.high:.2f}",
        f"{row.ms:.3g}",
        verdict(row.ratio, row.target, is_valid),
        "" if row.saved is None else f"{row.saved:.3f}",
        verdict(row.saved, row.saved_target, True),  # bytes do not depend on the clock
        row.note,
    ]


def verdict(value: float | None, target: float | None, is_valid: bool) -> str:
    if value is None or target is None:
        return ""
    met = "met" if value <= target else "MISSED"
    return f"<= {target:g} {met if is_valid else 'unknown'}"


def write_atomically(path: Path, text: str) -> None:
    """Write a file next to its final place, then rename it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", newline="") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
