"""Run a search from a float model to a retrained one, in a folder; a stopped run resumes where it was."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from torchquant._files import reading, write_json, write_whole
from torchquant.analysis import weight_bytes
from torchquant.errors import ConfigError, require
from torchquant.plan import QuantPlan
from torchquant.qmodule import QModuleState
from torchquant.runs.console import NullProgress
from torchquant.runs.contents import contents_of, pinned
from torchquant.runs.data import TrainBatches, TrainingData
from torchquant.runs.folder import CONTENTS, ELSEWHERE, PROCESSES, claimed, read_checkpoint_into, write_checkpoint
from torchquant.runs.loop import accuracy_on, calibrate
from torchquant.runs.networks import place_job, tried
from torchquant.runs.options import RunOptions, on_threads
from torchquant.runs.ranks import Ranks, process_group
from torchquant.runs.search.results import (
    FRONT,
    SearchRunResult,
    amount,
    candidates_of,
    choice_of,
    report_on,
    write_choices,
    write_history,
)
from torchquant.runs.search.settings import KINDS, SearchConfig
from torchquant.runs.settings import files_of
from torchquant.runs.stages import QAT_UNITS, Stages
from torchquant.search import Budget, CostModel, EpochRecord
from torchquant.search.allocation.assignment import allocate
from torchquant.search.allocation.fronts import pareto
from torchquant.search.allocation.latency import read_latency
from torchquant.search.allocation.sensitivities import FILE as SENSITIVITY
from torchquant.search.allocation.sensitivities import Sensitivity, sensitivity
from torchquant.search.cost import LatencyTable
from torchquant.search.learning.progress import PROGRESS
from torchquant.utils import set_qmodule_state

PLAN, SEARCHED, QUANTIZED = "plan.yaml", "searched.pt", "quantized.pt"
MADE = ("float.pt", SEARCHED, PLAN, QUANTIZED, SENSITIVITY, "*.progress.pt")
"""Files from which a later run with the same settings resumes."""
POINTS = 8
"""Number of budgets in the picture of the Pareto front."""
SEARCH_UNITS = 4.0
"""About how many epochs of float training an epoch of a search, or all of an allocation, takes."""


def run_search(
    config: SearchConfig,
    out: str | os.PathLike[str],
    show: NullProgress | None = None,
    distributed: bool = False,
    options: RunOptions | None = None,
) -> SearchRunResult:
    """Make the float model, search or measure sensitivities, make the plan, retrain, evaluate; write files into `out`.

    The files: `config.json`, `float.pt`, `history.json` and `.csv` or `sensitivity.json` and `pareto.json`,
    `searched.pt` (float weights after a search), `plan.yaml`, `choices.csv`, `quantized.pt`, `losses.json`,
    `result.json`, `report.html`. A stage whose file exists is not run again, and within a stage every epoch, or search
    point, is saved. `distributed`: this is one of several processes that torchrun started; all must see `out`, and the
    first one writes it. `options`: how the run is carried out. Raises ConfigError, also if `out` holds another search.
    """
    if distributed and config.kind == "allocate":
        raise ConfigError("allocate measures in one process; distributed is for qss and qpl")
    require("yaml", "cli")
    how = options or RunOptions()
    if how.amp == "fp16":
        raise ConfigError("a search takes amp bf16: the steps of its widths and logits have no scaled gradients")
    return search_from(config, out, show or NullProgress(), distributed, how)


def search_from(
    config: SearchConfig,
    out: str | os.PathLike[str],
    show: NullProgress,
    distributed: bool = False,
    options: RunOptions | None = None,
    float_file: Path | None = None,
) -> SearchRunResult:
    """Do the same as `run_search`; `float_file`: the float.pt of a run with the same float training."""
    how = options or RunOptions()
    with process_group(distributed, how.device) as ranks, show if ranks.is_first else NullProgress() as shown:
        run = _Run(config, Path(out), shown, ranks, how)
        with ExitStack() as stack:
            ranks.at_first(lambda: stack.enter_context(run.claimed()))
            threads = stack.enter_context(how.computing(run.net, run.example[:1]))
            shown.message(f"{config.model} on {ranks.device}, {threads}")
            retraining = QAT_UNITS * config.retrain_epochs
            shown.start(config.float_epochs + search_units(config) + retraining + 1.0)
            run.float_stage(float_file)
            run.plan_stage()
            run.retrain_stage()
            result = run.result()
            ranks.at_first(lambda: run.finish(result))
        shown.advance(1.0, "done")
    return result


def checked_settings(config: SearchConfig, options: RunOptions) -> dict[str, Any]:
    """Return the settings that `run_search` keeps in config.json. Raises the same ConfigError; writes nothing."""
    return _Run(config, Path(), NullProgress(), Ranks(), options).settings()


def search_units(config: SearchConfig) -> float:
    """Estimate how many epochs of float training the search takes."""
    return SEARCH_UNITS * (1 if config.kind == "allocate" else config.epochs)


def _epoch(data: TrainingData, seed: int, number: int, workers: int = 0) -> TrainBatches:
    """Return the batches of an epoch by its number; they are the same at each call."""
    return TrainBatches(data, 1_000_003 * (seed + 1) + number, workers=workers)


class _Run:
    """The state that the stages of a run share. Candidates and budgets are checked at construction."""

    def __init__(
        self, config: SearchConfig, folder: Path, shown: NullProgress, ranks: Ranks, options: RunOptions
    ) -> None:
        self.config, self.folder, self.shown, self.ranks, self.options = config, folder, shown, ranks, options
        self.stages = Stages(folder, shown, ranks, options)
        self.data, self.net = place_job(config, options, ranks, shown.message)
        self.example = self.data.test_images[:2]
        with on_threads(1):
            tried(self.net, self.data, config.model, config.checkpoint)
        self.space = config.space(self.net, self.example)
        self.latency: LatencyTable | None = None if config.latency is None else read_latency(config.latency)
        self._costs().check_feasible(config.budgets)
        self.float_bytes = sum(site.total for site in weight_bytes(self.net))

    def settings(self) -> dict[str, Any]:
        """Return the settings with the contents of the files that take part and the number of processes."""
        config = self.config
        contents = pinned(config.contents, self.contents())
        numbers = self.options.that_change_numbers()
        return (
            asdict(config)
            | numbers
            | {CONTENTS: contents}
            | ({PROCESSES: self.ranks.world} if self.ranks.world > 1 else {})
        )

    def contents(self) -> dict[str, str]:
        """Return name -> sha256 of the files that take part."""
        config = self.config
        paths = [config.checkpoint, config.latency, *files_of(config.data, config.rules, config.weights)]
        return contents_of(paths, [self.net], config.model)

    def claimed(self) -> AbstractContextManager[Path]:
        """Claim the folder for this run."""
        path = self.folder / "config.json"
        return claimed(path, self.settings(), "another search", "search", MADE, self.shown.message, self.options.force)

    def float_stage(self, float_file: Path | None) -> None:
        """Make float.pt, and measure the accuracy of the float model."""
        if float_file is not None and not (self.folder / "float.pt").exists():
            copied = float_file.read_bytes()
            write_whole(self.folder / "float.pt", lambda path: path.write_bytes(copied))
        self.stages.float_model(self.net, self.config, self.data, self.contents())
        self.costs = self._costs()
        self.float_accuracy = accuracy_on(self.net, self.data)
        self.shown.message(f"float: accuracy {self.float_accuracy:.2%}")

    def plan_stage(self) -> None:
        """Make plan.yaml; the float model then has the searched weights."""
        if self.ranks.of_first((self.folder / PLAN).exists()):
            self.shown.skip(search_units(self.config))
        else:
            torch.manual_seed(self.config.seed)
            plan = self._allocate() if self.config.kind == "allocate" else self._search()
            self.ranks.at_first(lambda: plan.save(self.folder / PLAN))
            if self.ranks.is_first:
                (self.folder / PROGRESS).unlink(missing_ok=True)
        with reading(self.folder / PLAN, ELSEWHERE):
            self.plan = QuantPlan.load(self.folder / PLAN)
        if self.config.kind != "allocate":
            read_checkpoint_into(self.net, self.folder / SEARCHED, ELSEWHERE)
            self.costs = self._costs()  # a zero point that is 0 now takes no bytes
        with reading(self.folder / PLAN, ELSEWHERE):
            self.choice = choice_of(self.plan, self.costs)
        self.totals = self.costs.totals(self.choice)
        words = {"bits": amount(self.totals["bits"])}
        words |= {b.measure: f"{amount(self.totals[b.measure])} of {amount(b.limit)}" for b in self.config.budgets}
        self.shown.message("plan: " + ", ".join(f"{name} {text}" for name, text in words.items()))

    def _search(self) -> QuantPlan:
        config = self.config
        kind = KINDS[config.kind]
        assert kind is not None
        steps = config.epochs * max(len(TrainBatches(self.data)) // 2, 1)
        search = kind(
            self.net,
            self.space,
            self.example,
            config.budgets,
            config.settings(steps),
            config.per,
            form=config.form,
            latency=self.latency,
        )

        def tell(record: EpochRecord) -> None:
            self.shown.row("search", epoch_words(record, config.epochs, config.budgets))
            self.shown.advance(SEARCH_UNITS, f"search: epoch {record.epoch} of {config.epochs}")

        search.amp = self.options.amp
        if self.options.compile:
            search.compile()
        workers = self.options.workers
        history = search.run(
            lambda epoch: _epoch(self.data, config.seed, epoch, workers), out=self.folder, on_epoch=tell
        )
        self.ranks.at_first(lambda: write_checkpoint(self.folder / SEARCHED, search.float_model()))
        self.ranks.at_first(lambda: write_history(self.folder, history))
        return search.derive()

    def _allocate(self) -> QuantPlan:
        config = self.config
        batches = list(itertools.islice(_epoch(self.data, config.seed, 0), config.calibration_batches))

        def tell(point: tuple[str, str], degradations: tuple[float, ...]) -> None:
            self.shown.advance(SEARCH_UNITS / len(self.costs.points), f"sensitivity of {'.'.join(point)}")

        degradations = sensitivity(
            self.net, self.space, self.example, batches, config.method, out=self.folder, on_place=tell, seed=config.seed
        )
        given = (self.net, self.space, self.example)
        found = allocate(*given, config.budgets, degradations, config.solver, self.latency)
        measure = config.budgets[0].measure
        pareto(*given, degradations, measure, POINTS, solver=config.solver, latency=self.latency).save(
            self.folder / FRONT
        )
        return found.plan

    def retrain_stage(self) -> None:
        """Make quantized.pt: calibrate under the plan, then train."""
        config, progress = self.config, "retrain.progress.pt"
        torch.manual_seed(config.seed)
        self.model = self.plan.apply(self.net)

        def work() -> None:
            calibrate(self.model, self.data, config.calibration_batches, config.seed)
            if config.retrain_epochs:
                given = (config.retrain_epochs, config.learning_rate / 3.0, config.seed, progress, QAT_UNITS)
                self.stages.train("retraining", self.model, self.data, *given, quantized=True)

        self.stages.run(QUANTIZED, self.model, work, progress, QAT_UNITS * config.retrain_epochs)
        set_qmodule_state(self.model, QModuleState.QUANT_EVAL)
        self.accuracy = accuracy_on(self.model, self.data)
        self.shown.message(f"retrained: accuracy {self.accuracy:.2%}")

    def finish(self, result: SearchRunResult) -> None:
        """Write choices.csv, result.json and report.html."""
        write_choices(self.folder / "choices.csv", self.choice, self.costs)
        write_json(self.folder / "result.json", asdict(result))
        report_on(self.folder, (self.model, self.data))

    def result(self) -> SearchRunResult:
        """Return the numbers of the run."""
        predicted = None
        if self.config.kind == "allocate":
            with reading(self.folder / SENSITIVITY, ELSEWHERE):
                degradations = Sensitivity.load(self.folder / SENSITIVITY).degradations
                predicted = sum(degradations[point][option] for point, option in self.choice.items())
        return SearchRunResult(
            self.config.kind,
            self.float_accuracy,
            self.accuracy,
            self.float_bytes,
            self.plan.cost(self.net, self.example).weight_bytes,
            self.totals,
            {budget.measure: budget.limit for budget in self.config.budgets},
            predicted,
            candidates_of(self.space, self.costs),
        )

    def _costs(self) -> CostModel:
        return CostModel(self.net, self.space, self.example, self.latency)


def epoch_words(record: EpochRecord, epochs: int, budgets: Sequence[Budget]) -> dict[str, str]:
    """Format the numbers of an epoch: name -> text."""
    words = {"epoch": f"{record.epoch} of {epochs}", "loss": f"{record.loss:.3f}"}
    words["search loss"] = "-" if record.arch_loss is None else f"{record.arch_loss:.3f}"
    words["bits"] = f"{record.costs['bits']:.2f}"
    for budget in budgets:
        words[budget.measure] = f"{amount(record.costs[budget.measure])} of {amount(budget.limit)}"
    return words | {"entropy": f"{record.entropy:.2f}"}
