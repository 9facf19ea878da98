"""The results of a search run: numbers, tables, the report."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from torchquant._files import read_json, read_text, reading, write_csv, write_json
from torchquant.analysis.sections import accuracy_table
from torchquant.errors import ConfigError
from torchquant.plan import QuantPlan
from torchquant.report import Part, Text
from torchquant.runs.data import TrainingData
from torchquant.runs.export import load_run
from torchquant.runs.folder import ELSEWHERE, PROCESSES, read_as, read_settings
from torchquant.runs.report import made_section, write_run_report
from torchquant.runs.search.settings import SearchConfig
from torchquant.runs.settings import words_of
from torchquant.search import Budget, CostModel, EpochRecord
from torchquant.search.cost import Selection, name_of
from torchquant.search.learning.progress import HISTORY
from torchquant.search.report import CHOICE, search_sections
from torchquant.search.space import searched_slots

FRONT = "pareto.json"
AGAIN = "run the search again, which writes it anew"
WITHOUT = "delete it for a report without it, or use another folder"
DETAILS = {"qss": "scheme search", "qpl": "precision learning", "allocate": "allocation by sensitivity"}


@dataclass(frozen=True)
class SearchRunResult:
    """Test accuracy, 0..1, and bytes of all layer weights, of the float model and of the plan after retraining.

    `costs`: the plan's cost in every measure of a `Budget`, as `QuantPlan.cost` counts it. `budgets`: measure -> limit.
    `predicted`: the sum of the degradations, for an allocation only. `candidates`: "path.slot" -> its candidates.
    """

    kind: str
    float_accuracy: float
    accuracy: float
    float_weight_bytes: int
    weight_bytes: int
    costs: dict[str, float]
    budgets: dict[str, float]
    predicted: float | None
    candidates: dict[str, list[str]] = field(repr=False)

    @property
    def keeps_budgets(self) -> bool:
        """Whether the cost of the plan is within all budgets."""
        return all(self.costs[measure] <= limit for measure, limit in self.budgets.items())

    def table(self) -> tuple[list[str], list[list[str]], str]:
        """Return header, rows and a note of a table."""
        rows = [
            ["float", f"{self.float_accuracy:.2%}", f"{self.float_weight_bytes / 1e3:.1f}", ""],
            [
                DETAILS[self.kind],
                f"{self.accuracy:.2%}",
                f"{self.weight_bytes / 1e3:.1f}",
                f"{self.float_weight_bytes / self.weight_bytes:.1f}x",
            ],
        ]
        words = [f"{m} {amount(self.costs[m])} of at most {amount(limit)}" for m, limit in self.budgets.items()]
        kept = f"budget {'kept' if self.keeps_budgets else 'NOT kept'}: {', '.join(words)}" if words else "no budget"
        return ["model", "accuracy", "weights kB", "smaller"], rows, f"{self.costs['bits']:.2f} bits per weight; {kept}"


def amount(value: float) -> str:
    """Format a number for people.

    >>> amount(13580.0), amount(3.25)
    ('13,580', '3.25')
    """
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def choice_of(plan: QuantPlan, costs: CostModel) -> Selection:
    """Find search point -> option that a plan has there. Raises ConfigError for a spec that is no candidate."""
    sites = {site.path: site for site in plan.sites}
    found = {}
    for variable in costs.variables:
        path, name = variable.point
        spec = getattr(sites.get(path), name, None)
        if spec not in variable.options:
            raise ConfigError(f"plan.yaml has {spec!r} at '{path}', {name}, which is no candidate there")
        found[variable.point] = variable.options.index(spec)
    return found


def write_choices(path: Path, choice: Selection, costs: CostModel) -> None:
    """Write choices.csv: the option chosen at each search point, and its cost."""
    rows = []
    for variable in costs.variables:
        option = choice[variable.point]
        numbers = {"bits": variable.bits[option], "bytes": int(variable.bytes[option])}
        rows.append(
            {"place": variable.point[0], "field": variable.point[1], "spec": variable.options[option], **numbers}
        )
    write_csv(path, CHOICE, rows)


def write_history(folder: Path, history: Sequence[EpochRecord]) -> None:
    """Write history.json with everything, and history.csv with the numbers of each epoch."""
    write_json(folder / HISTORY, [record.to_dict() for record in history])
    plain = ("epoch", "loss", "arch_loss", "entropy", "temperature", "seconds")
    rows = [{name: getattr(record, name) for name in plain} | record.costs for record in history]
    write_csv(folder / "history.csv", [*plain, *(history[0].costs if history else ())], rows)


def read_history(folder: Path) -> list[EpochRecord]:
    """Read the history that `write_history` wrote; [] if there is none."""
    path = folder / HISTORY
    if not path.exists():
        return []
    with reading(path, WITHOUT):
        return [read_as(path, EpochRecord, entry, WITHOUT) for entry in read_json(path)]


def candidates_of(space: QuantPlan, costs: CostModel) -> dict[str, list[str]]:
    """Return "path.slot" -> its candidate specs, with `{n}` where a width is learned."""
    spaces = searched_slots(space)
    return {name_of(point): list(spaces[point].specs) for point in costs.points}


def write_report(out: str | os.PathLike[str]) -> Path:
    """Write report.html of a finished run from its other files. Raises ConfigError, MissingDependencyError."""
    return report_on(Path(out), None)


def report_on(folder: Path, shown: tuple[nn.Module, TrainingData] | None) -> Path:
    """Write report.html of a finished run; `shown`: its model in QUANT_EVAL, and the data, None: from its files."""
    if not (folder / "result.json").exists():
        raise ConfigError(f"{folder} is not the folder of a finished search: it does not hold result.json")
    settings = read_settings(folder / "config.json")
    processes = settings.pop(PROCESSES, 1)
    config = read_as(folder / "config.json", SearchConfig, settings, ELSEWHERE)
    result = read_as(folder / "result.json", SearchRunResult, read_json(folder / "result.json"), AGAIN)
    budgets = [Budget(measure, limit) for measure, limit in result.budgets.items()]
    choices, history = _choices(folder / "choices.csv"), read_history(folder)
    chosen = None
    front = _front(folder / FRONT) if (folder / FRONT).exists() else None
    if front is not None and result.predicted is not None:
        with reading(folder / FRONT, WITHOUT):
            chosen = (result.costs[front["measure"]], result.predicted)
    with reading(folder / (HISTORY if history else FRONT), WITHOUT):
        own = search_sections(choices, history, budgets, result.candidates, front, chosen)
    model, data = shown or load_run(folder)[:2]
    header, rows, note = result.table()
    accuracies = [(rows[0][0], result.float_accuracy), (rows[1][0], result.accuracy)]
    more = {name: [row[i] for row in rows] for i, name in enumerate(header) if i > 1}
    parts: list[Part] = [accuracy_table(accuracies, len(data.test_labels), more), Text(note)]
    title = f"{DETAILS[config.kind].capitalize()}: {config.model} on {config.data}"
    made = made_section(command_of(config, processes), asdict(config))
    return write_run_report(folder, title, parts, own, (model, data), made)


def command_of(config: SearchConfig, processes: int = 1) -> str:
    """Return the command line that runs a search with these settings.

    >>> command_of(SearchConfig("qpl", "demo", "bits<=3", epochs=4))
    "torchquant search qpl demo --budget 'bits<=3' --epochs 4"
    """
    words = ["torchquant", "search", config.kind, config.model]
    if processes > 1:
        words = ["torchrun", "--nproc-per-node", str(processes), "-m", *words, "--distributed"]
    return " ".join([*words, *words_of(config)])


def _front(path: Path) -> dict[str, Any]:
    """Read the part of the Pareto front, as `Pareto.save` wrote it, that the report shows."""
    with reading(path, WITHOUT):
        front = read_json(path)
        numbers = [float(point[name]) for point in front["points"] for name in ("cost", "predicted")]
        if not all(map(math.isfinite, numbers)) or not isinstance(front["harm"], str):
            raise ConfigError(f"{path} does not hold the costs and degradations of a Pareto front")
    return front


def _choices(path: Path) -> list[dict[str, Any]]:
    with reading(path, AGAIN):
        rows = csv.DictReader(io.StringIO(read_text(path)))
        return [row | {"bits": int(row["bits"]), "bytes": int(row["bytes"])} for row in rows]
