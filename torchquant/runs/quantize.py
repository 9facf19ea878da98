"""Take one model from float to quantized, in a folder: `torchquant quantize`.

Each stage writes a file, so that a run that was stopped resumes where it was.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchquant._files import write_csv, write_json
from torchquant.analysis import weight_bytes
from torchquant.analysis.sections import accuracy_table
from torchquant.errors import ConfigError, require
from torchquant.plan import QuantPlan, quantize
from torchquant.qmodule import QModuleState
from torchquant.runs.console import NullProgress
from torchquant.runs.contents import contents_of, pinned
from torchquant.runs.data import TrainingData
from torchquant.runs.folder import CONTENTS, claimed, write_checkpoint
from torchquant.runs.loop import accuracy_on, calibrate
from torchquant.runs.networks import place_job, tried
from torchquant.runs.options import RunOptions, on_threads
from torchquant.runs.rehearsal import rehearse
from torchquant.runs.report import made_section, write_run_report
from torchquant.runs.settings import (
    check_above_zero,
    check_at_least,
    check_one_of,
    check_seed,
    check_start,
    check_types,
    checkpoint_option,
    command_line,
    data_option,
    files_of,
    model_argument,
    option,
    read_rules,
    seed_option,
    weights_option,
)
from torchquant.runs.stages import QAT_UNITS, Stages
from torchquant.training import CSVSink, Distillation, Monitor
from torchquant.training.monitor import EVERY
from torchquant.training.sinks import cells_of
from torchquant.utils import SiteReport, qmodules, set_qmodule_state, state_report

__all__ = ["JobConfig", "JobResult", "run_job"]

MODES = ("ptq", "qat")
MADE = ("float.pt", "calibrated.pt", "trained.pt", "*.progress.pt")
"""Files from which a later run with the same settings resumes."""


@dataclass(frozen=True)
class JobConfig:
    """The settings of `torchquant quantize`.

    `model`: a name of torchvision or timm, "demo", or "path/to/file.py:function", a function that returns a model, or
    "package.module:function" of an installed package.
    `rules`: the name of a rule set, or a YAML file with a list of rules or with a saved plan. `data`: see `load_data`.
    `mode`: "ptq" calibrates, "qat" trains after that. `checkpoint`: a float state_dict; without it the float model is
    trained for `float_epochs`. `distill`: the share of the loss of "qat" that is the distance to the predictions of the
    float model. `monitor`: how many steps of "qat" lie between two looks of a `Monitor`. `contents`: name -> sha256 of
    the files that take part, as a run recorded them; None: compute them now. Raises ConfigError.
    """

    model: str = model_argument()
    rules: str = option("w8a8", "A rule set (w8a8, w4a4-lsq, ...), or a YAML file.")
    data: str = data_option()
    mode: str = option("ptq", "ptq: calibrate; qat: calibrate, then train.")
    checkpoint: str | None = checkpoint_option()
    float_epochs: int = option(30, "Epochs of float training; 0: none.")
    epochs: int = option(10, "Epochs of quantization-aware training.")
    learning_rate: float = option(1e-3, "Learning rate of float training; qat uses a third of it.")
    calibration_batches: int = option(8, "Batches of the calibration.")
    seed: int = seed_option()
    distill: float | None = option(None, "qat: share of the loss, above 0 to 1, that is learned from the float model.")
    monitor: int | None = option(None, "qat: steps between two looks in monitor.csv, by default 50; 0: none.")
    weights: str | None = weights_option()
    contents: dict[str, str] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_types(self)
        check_start(self)
        check_one_of(self, mode=MODES)
        check_at_least(self, float_epochs=0, epochs=1, calibration_batches=1)
        check_above_zero(self, "learning_rate", "distill")
        if self.monitor is not None:
            check_at_least(self, monitor=0)
        if self.distill is not None and (self.distill > 1.0 or self.mode != "qat"):
            raise ConfigError(
                f"distill is a share of the loss of mode qat, above 0 and at most 1; got {self.distill} in {self.mode}"
            )
        check_seed(self.seed)


@dataclass(frozen=True)
class JobResult:
    """Test accuracy, 0..1, and bytes of all layer weights of the float, calibrated and trained model (None for ptq)."""

    float_accuracy: float
    ptq_accuracy: float
    qat_accuracy: float | None
    float_weight_bytes: int
    weight_bytes: int
    n_sites: int
    n_left_float: int

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return the header and the rows of a table."""
        rows = [
            ["float", f"{self.float_accuracy:.2%}", f"{self.float_weight_bytes / 1e3:.1f}"],
            ["calibrated", f"{self.ptq_accuracy:.2%}", f"{self.weight_bytes / 1e3:.1f}"],
        ]
        if self.qat_accuracy is not None:
            rows.append(["trained quantized", f"{self.qat_accuracy:.2%}", f"{self.weight_bytes / 1e3:.1f}"])
        return ["model", "accuracy", "weights kB"], rows


def run_job(
    config: JobConfig,
    out: str | os.PathLike[str],
    show: NullProgress | None = None,
    strict: bool = False,
    options: RunOptions | None = None,
) -> JobResult:
    """Make the float model and the plan, calibrate, train and evaluate; write the files into `out`.

    `config.json`, `float.pt`, `plan.yaml`, `calibrated.pt`, `quantized.pt` (state dicts), `losses.json`, `sites.csv`,
    `result.json`, `report.html`. "qat" also writes `monitor.csv`: what a `Monitor` saw. A stage whose file exists is
    not run again. Every setting is tried on the untrained model before the folder is touched; `strict` as in
    `quantize`; `options`: how the run is carried out. Raises ConfigError, also if `out` holds another job, a job with
    other contents, or a job that is running.
    """
    how = options or RunOptions()
    with show or NullProgress() as shown:
        data, net, rules = check_job(config, strict, how, shown.message)
        found = contents_of(
            [config.checkpoint, *files_of(config.data, config.rules, config.weights)], [net], config.model
        )
        settings = asdict(config) | how.that_change_numbers() | {CONTENTS: pinned(config.contents, found)}
        path = Path(out) / "config.json"
        with (
            claimed(path, settings, "another job", "job", MADE, shown.message, how.force) as folder,
            how.computing(net, data.test_images[:1]) as threads,
        ):
            shown.message(f"{config.model} on {how.device or 'cpu'}, {threads}")
            qat_units = QAT_UNITS * config.epochs if config.mode == "qat" else 0.0
            shown.start(config.float_epochs + qat_units + 1.0)
            return _run(net, rules, config, data, Stages(folder, shown, options=how), found)


def check_job(
    config: JobConfig,
    strict: bool = False,
    options: RunOptions | None = None,
    tell: Callable[[str], object] | None = None,
) -> tuple[TrainingData, nn.Module, Any]:
    """Load the data and the rules, build the float model, and rehearse the job on a copy of it; writes nothing.

    Raises what `run_job` would raise, before anything is trained.
    """
    require("yaml", "cli")  # which the plan is written with
    data, net = place_job(config, options or RunOptions(), tell=tell)
    rules = read_rules(config.rules)
    with torch.random.fork_rng(devices=[]), on_threads(1):
        trial = tried(net, data, config.model, config.checkpoint)
        trial = quantize(trial, rules, data.test_images[:2], strict=strict)
        rehearse(trial, data, trains=config.mode == "qat")
    return data, net, rules


def _run(
    net: nn.Module, rules: Any, config: JobConfig, data: TrainingData, stages: Stages, contents: Mapping[str, str]
) -> JobResult:
    folder, shown = stages.folder, stages.shown
    stages.float_model(net, config, data, contents)
    float_accuracy = accuracy_on(net, data)
    float_bytes = sum(site.total for site in weight_bytes(net))
    shown.message(f"float: accuracy {float_accuracy:.2%}")
    model = quantize(net, rules, data.test_images[:2])
    plan: QuantPlan = model.plan  # type: ignore[assignment]
    if all(isinstance(c, str | None) for s in plan.sites for c in (s.weight, s.input, s.output, s.bias)):
        plan.save(folder / "plan.yaml")
    shown.advance(0.0, "calibrating")
    stages.run("calibrated.pt", model, lambda: calibrate(model, data, config.calibration_batches, config.seed))
    set_qmodule_state(model, QModuleState.QUANT_EVAL)
    ptq_accuracy = accuracy_on(model, data)
    shown.message(f"calibrated: accuracy {ptq_accuracy:.2%}, {len(plan.sites)} sites, {len(plan.floats)} left float")
    shown.advance(0.5, "calibrated")
    qat_accuracy = _trained(model, net, config, data, stages) if config.mode == "qat" else None
    write_checkpoint(folder / "quantized.pt", model)
    result = JobResult(
        float_accuracy,
        ptq_accuracy,
        qat_accuracy,
        float_bytes,
        sum(site.total for site in weight_bytes(model)),
        len(plan.sites),
        len(plan.floats),
    )
    write_json(folder / "result.json", asdict(result))
    write_csv(folder / "sites.csv", list(SiteReport.__dataclass_fields__), state_report(model).to_dicts())
    _report(result, model, config, data, folder)
    shown.advance(0.5, "done")
    return result


def _report(result: JobResult, model: nn.Module, config: JobConfig, data: TrainingData, folder: Path) -> None:
    """Write report.html."""
    found = {
        "float": result.float_accuracy,
        "calibrated": result.ptq_accuracy,
        "trained quantized": result.qat_accuracy,
    }
    accuracies = [(name, accuracy) for name, accuracy in found.items() if accuracy is not None]
    sizes = [result.float_weight_bytes, *[result.weight_bytes] * (len(accuracies) - 1)]
    table = accuracy_table(accuracies, len(data.test_labels), {"weight bytes": sizes})
    made = made_section(command_line("quantize", config), asdict(config))
    title = f"{config.model} on {config.data}, quantized"
    write_run_report(folder, title, [table], [], (model, data), made)


def _trained(model: nn.Module, net: nn.Module, config: JobConfig, data: TrainingData, stages: Stages) -> float:
    """Train quantization-aware, with the float network as the teacher if one is asked for; return the accuracy."""
    teacher = None if config.distill is None else Distillation(net, config.distill)
    progress, rate, units = "qat.progress.pt", config.learning_rate / 3.0, QAT_UNITS

    def work() -> None:
        with ExitStack() as stack:
            is_watched = config.monitor != 0 and any(module.quantizers() for _, module in qmodules(model))
            watch = stack.enter_context(_monitor(model, config, stages)) if is_watched else None
            options: dict[str, Any] = {"quantized": True, "teacher": teacher, "monitor": watch}
            stages.train("quantized", model, data, config.epochs, rate, config.seed, progress, units, **options)

    stages.run("trained.pt", model, work, progress, units * config.epochs)
    set_qmodule_state(model, QModuleState.QUANT_EVAL)
    found = accuracy_on(model, data)
    stages.shown.message(f"trained quantized: accuracy {found:.2%}")
    return found


def _monitor(model: nn.Module, config: JobConfig, stages: Stages) -> Monitor:
    """Make what watches the training: it writes monitor.csv, and a row for each look where the run is shown."""
    sinks: list[Any] = [CSVSink(stages.folder / "monitor.csv")]
    sinks.append(lambda step, numbers: stages.shown.row("training", cells_of(step, numbers)))
    return Monitor(model, config.monitor or EVERY, sinks)
