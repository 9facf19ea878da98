"""Tabulate the results of a comparison, with mean and spread over the seeds, as JSON, CSV, Markdown and HTML."""

from __future__ import annotations

import csv
import functools
import io
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torchquant._files import read_json, reading, write_json, write_whole
from torchquant.report import Page, Section, Table, lines
from torchquant.runs.compare.run import CaseResult
from torchquant.runs.compare.settings import Recipe
from torchquant.runs.report import made_section
from torchquant.runs.settings import check_types


@dataclass(frozen=True)
class Row:
    """One scheme at one width: means over all seeds, and `spread`, the standard deviation of the accuracy.

    `weight` and `acts` are spec strings; `loss` is how far the accuracy is below the float network's.
    """

    scheme: str
    weight_bits: int
    acts_bits: int
    weight: str
    acts: str
    accuracy: float
    spread: float
    loss: float
    weight_bytes: int
    weight_sqnr_db: float
    seconds_per_step: float | None
    seeds: int


def leaderboard(results: Sequence[CaseResult]) -> list[Row]:
    """Make the rows, sorted by activation width, weight width, and falling accuracy."""
    groups: dict[tuple[str, int, int], list[CaseResult]] = {}
    for result in results:
        groups.setdefault((result.case.scheme, result.case.weight_bits, result.case.acts_bits), []).append(result)
    rows = []
    for (scheme, weight_bits, acts_bits), group in groups.items():
        scores = [r.accuracy for r in group]
        seconds = [r.seconds_per_epoch / r.steps_per_epoch for r in group if r.seconds_per_epoch is not None]
        rows.append(
            Row(
                scheme,
                weight_bits,
                acts_bits,
                group[0].case.weight,
                group[0].case.acts,
                statistics.mean(scores),
                statistics.stdev(scores) if len(scores) > 1 else math.nan,
                statistics.mean(r.float_accuracy - r.accuracy for r in group),
                group[0].weight_bytes,
                statistics.mean(r.weight_sqnr_db for r in group),
                statistics.median(seconds) if seconds else None,
                len(group),
            )
        )
    return sorted(rows, key=lambda row: (row.acts_bits, row.weight_bits, -row.accuracy, row.scheme))


HEADER = (
    "scheme",
    "W",
    "A",
    "accuracy",
    "+-",
    "below float",
    "weight bytes",
    "weight SQNR",
    "ms/step",
    "weights",
    "activations",
)


def cells(row: Row) -> list[str]:
    """Format a row as text, in the columns of `HEADER`."""
    return [
        row.scheme,
        str(row.weight_bits),
        str(row.acts_bits),
        f"{row.accuracy:.2%}",
        "" if math.isnan(row.spread) else f"{row.spread:.2%}",
        f"{row.loss:+.2%}",
        f"{row.weight_bytes:,}",
        f"{row.weight_sqnr_db:.1f} dB",
        "" if row.seconds_per_step is None else f"{1e3 * row.seconds_per_step:.0f}",
        row.weight,
        row.acts,
    ]


def markdown(rows: Sequence[Row], recipe: Recipe, command: str) -> str:
    """Return the Markdown page of a leaderboard."""
    lines = ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    return f"# Leaderboard\n\nMade by `{command}`. {describe(recipe)}\n\n" + "\n".join(lines) + "\n"


def describe(recipe: Recipe) -> str:
    """Describe the recipe in a sentence or two."""
    training = f"{recipe.epochs} epochs of quantization-aware training" if recipe.epochs else "calibration only"
    made = f"{recipe.float_epochs} epochs" if recipe.checkpoint is None else f"from {recipe.checkpoint}"
    return (
        f"Every row starts from the same float network ({recipe.model}, {made} on {recipe.data}) "
        f"and gets the same recipe: {training}, on the same batches. Activations have the quantizer that the scheme's "
        "authors use with its weights, or else an averaged range. Figures are means over the seeds, +- standard "
        "deviation; ms/step is the wall-clock time of training with one thread; compare it within the table only."
    )


def write_leaderboard(rows: Sequence[Row], recipe: Recipe, command: str, folder: Path) -> None:
    """Write leaderboard.json, .csv, .md and the self-contained .html into `folder`."""
    facts: dict[str, Any] = {"command": command, "recipe": asdict(recipe)}
    plain = [asdict(row) | {"spread": None if math.isnan(row.spread) else row.spread} for row in rows]
    write_json(folder / "leaderboard.json", facts | {"rows": plain})
    table = io.StringIO()
    writer = csv.DictWriter(table, [field.name for field in fields(Row)])
    writer.writeheader()
    writer.writerows(plain)
    texts = {"csv": table.getvalue(), "md": markdown(rows, recipe, command), "html": _html(rows, recipe, command)}
    for ending, text in texts.items():
        data = text.encode()
        write_whole(folder / f"leaderboard.{ending}", functools.partial(Path.write_bytes, data=data))


def read_leaderboard(path: str | os.PathLike[str]) -> tuple[list[Row], Recipe, str]:
    """Read the rows, the recipe and the command of a leaderboard.json. Raises ConfigError that names the file."""
    file = Path(path)
    with reading(file, "write it again with torchquant compare"):
        found = read_json(file)
        rows = [Row(**row | {"spread": math.nan if row["spread"] is None else row["spread"]}) for row in found["rows"]]
        for row in rows:
            check_types(row)
        return rows, Recipe(**found["recipe"]), found["command"]


def _html(rows: Sequence[Row], recipe: Recipe, command: str) -> str:
    """Return the page of a leaderboard."""
    figures = []
    for width in sorted({row.acts_bits for row in rows}):
        series: dict[str, list[Row]] = {}
        for row in sorted((row for row in rows if row.acts_bits == width), key=lambda row: row.weight_bits):
            series.setdefault(row.scheme, []).append(row)
        points = {
            scheme: [(float(row.weight_bits), 100.0 * row.accuracy) for row in own] for scheme, own in series.items()
        }
        spreads = {scheme: [100.0 * row.spread for row in own] for scheme, own in series.items()}
        title = f"Activations of {width} bits"
        figures.append(lines(title, points, "weight bits", "accuracy, %", "", spreads=spreads, height=460))
    table = Table([*HEADER, "seeds"], [[*cells(row), row.seeds] for row in rows], name="leaderboard")
    made = made_section(command, asdict(recipe))
    sections = [Section("All rows", [table]), Section("Accuracy over weight bits", figures), made]
    return Page("Leaderboard", sections, describe(recipe)).html()
