"""Post-training algorithms on one model, from float to rounded, into a folder: `torchquant ptq`."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchquant import ptq
from torchquant._files import is_file, write_json
from torchquant._units import bytes_of
from torchquant.analysis.sections import accuracy_table
from torchquant.errors import ConfigError, require
from torchquant.plan import QuantPlan, quantize
from torchquant.ptq.recipe import RECIPES, Recipe, find_recipe
from torchquant.qmodule import QModuleState
from torchquant.report import Section, Text
from torchquant.runs.console import NullProgress
from torchquant.runs.contents import contents_of, pinned
from torchquant.runs.data import BATCH_SIZE, DATA, TrainBatches, TrainingData
from torchquant.runs.folder import CONTENTS, claimed
from torchquant.runs.loop import accuracy_on, calibrate
from torchquant.runs.networks import place_job, tried
from torchquant.runs.options import RunOptions, on_threads
from torchquant.runs.rehearsal import rehearse
from torchquant.runs.report import made_section, write_run_report
from torchquant.runs.settings import (
    check_above_zero,
    check_at_least,
    check_seed,
    check_start,
    check_types,
    checkpoint_option,
    command_line,
    files_of,
    model_argument,
    option,
    read_rules,
    seed_option,
    weights_option,
)
from torchquant.runs.stages import Stages
from torchquant.utils import set_qmodule_state

__all__ = ["PTQConfig", "PTQResult", "preview_ptq", "run_ptq"]

ABOUT_ROUNDED = (
    "Signal to quantization noise ratio (SQNR) of each output, in dB, against the model with the same rounded weights "
    "and no quantizer: the noise of the activations, which adds up along the model. What rounding the weights costs is "
    "in the steps above; the weights are on their grids now."
)
MADE = ("float.pt", "calibrated.pt", "quantized.pt", "*.progress.pt")
"""Files that a later run of the same settings goes on from."""
PTQ_UNITS = 4.0
"""About how many epochs of float training the stages take."""


@dataclass(frozen=True)
class PTQConfig:
    """The settings of `torchquant ptq`.

    `recipe`: a ready one, a YAML file, or stages in one line. `rules`: a plan other than that of the recipe. `data`,
    `batches`, `cache_bytes`: None takes what the recipe says. The others as in `JobConfig`. Raises ConfigError.
    """

    model: str = model_argument()
    recipe: str = option("cnn-w4a8", f"{', '.join(RECIPES)}, a YAML file, or stages: gptq,bias_correction.")
    rules: str | None = option(None, "A plan other than the recipe's: a rule set, or a YAML file.")
    data: str | None = option(None, "digits, cifar10, or a folder of pictures; else the recipe's, or digits.")
    checkpoint: str | None = checkpoint_option()
    float_epochs: int = option(30, "Epochs of float training; 0: none.")
    learning_rate: float = option(1e-3, "Learning rate of float training.")
    batches: int | None = option(None, "Training batches to look at; else the samples of the recipe, or 8.")
    seed: int = seed_option()
    cache_bytes: str | None = option(None, "Memory for inputs that wait before a layer, as 500MB; more goes to files.")
    weights: str | None = weights_option()
    contents: dict[str, str] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_types(self)
        check_start(self)
        data = find_recipe(self.recipe).data
        batch_size = data.get("batch", BATCH_SIZE)
        if self.data is None:
            object.__setattr__(self, "data", data.get("source", DATA[0]))
        if self.batches is None:
            object.__setattr__(self, "batches", -(-data["samples"] // batch_size) if "samples" in data else 8)
        if self.cache_bytes is not None:
            bytes_of(self.cache_bytes, "cache_bytes")
        check_at_least(self, float_epochs=0, batches=1)
        check_above_zero(self, "learning_rate")
        check_seed(self.seed)


@dataclass(frozen=True)
class PTQResult:
    """Test accuracy, 0..1: float, with every weight rounded to nearest, and with the recipe."""

    float_accuracy: float
    nearest_accuracy: float
    accuracy: float

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows, to show."""
        rows = [["float", self.float_accuracy], ["to nearest", self.nearest_accuracy], ["the recipe", self.accuracy]]
        return ["model", "accuracy"], [[str(name), f"{value:.2%}"] for name, value in rows]


def run_ptq(
    config: PTQConfig,
    out: str | os.PathLike[str],
    show: NullProgress | None = None,
    strict: bool = False,
    options: RunOptions | None = None,
) -> PTQResult:
    """Float model, plan, calibration, stages, evaluation; files in `out`.

    `config.json`, `float.pt`, `plan.yaml`, `calibrated.pt`, `steps/` (`ptq.json`, `steps.csv`, a file a layer),
    `quantized.pt`, `result.json`, `report.html`. What is there is not done again. Raises as `run_job`.
    """
    how = options or RunOptions()
    with show or NullProgress() as shown:
        data, recipe, net, rules = _built(config, how, shown.message)
        model = _tried(config, data, net, rules, strict)
        ptq.preview(model, recipe.stages, recipe.names, recipe.skip)
        rehearse(model, data, trains=False)
        files = [config.checkpoint, *files_of(str(config.data), config.rules, config.weights)]
        files += [config.recipe] if is_file(config.recipe) else []
        settings = {name: value for name, value in asdict(config).items() if name != "cache_bytes"}
        found = contents_of(files, [net], config.model)
        settings |= {CONTENTS: pinned(config.contents, found)} | how.that_change_numbers()
        path = Path(out) / "config.json"
        with (
            claimed(path, settings, "another run", "run", MADE, shown.message, how.force) as folder,
            how.computing(net, data.test_images[:1]) as threads,
        ):
            shown.message(f"{config.model} on {how.device or 'cpu'}, {threads}")
            shown.start(config.float_epochs + PTQ_UNITS)
            return _run(net, rules, recipe, config, data, Stages(folder, shown, options=how), found)


def preview_ptq(config: PTQConfig, strict: bool = False) -> tuple[ptq.Preview, ptq.Blocks]:
    """Say what a run would do, and which blocks its model has; nothing is trained, calibrated or written."""
    data, recipe, net, rules = _built(config, RunOptions())
    model = _tried(config, data, net, rules, strict)
    return ptq.preview(model, recipe.stages, recipe.names, recipe.skip), ptq.find_blocks(model)


def _built(
    config: PTQConfig, options: RunOptions, tell: Callable[[str], object] | None = None
) -> tuple[TrainingData, Recipe, nn.Module, Any]:
    """Load the data and the recipe, and build the float model; with the rules of the plan."""
    require("yaml", "cli")  # which the plan is written with
    recipe = find_recipe(config.recipe)
    data, net = place_job(config, options, tell=tell)
    n_batches = -(-data.n_train // recipe.data.get("batch", BATCH_SIZE))
    if "samples" in recipe.data and n_batches < (config.batches or 0):
        raise ConfigError(
            f"data: samples: {config.data} has {data.n_train} training images, fewer than the recipe asks"
        )
    rules = recipe.rules if config.rules is None else config.rules
    rules = read_rules("w4a8" if rules is None else rules) if isinstance(rules, str | None) else list(rules)
    return data, recipe, net, rules


def _tried(config: PTQConfig, data: TrainingData, net: nn.Module, rules: Any, strict: bool) -> nn.Module:
    """Quantize a copy of the float model, so that a plan that does not fit is known at once."""
    with torch.random.fork_rng(devices=[]), on_threads(1):
        return quantize(tried(net, data, config.model, config.checkpoint), rules, data.test_images[:2], strict=strict)


def _run(
    net: nn.Module,
    rules: Any,
    recipe: Recipe,
    config: PTQConfig,
    data: TrainingData,
    stages: Stages,
    contents: Mapping[str, str],
) -> PTQResult:
    folder, shown, n_batches = stages.folder, stages.shown, config.batches
    drawn = recipe.data.get("seed", config.seed), recipe.data.get("batch", BATCH_SIZE)
    cache_bytes = recipe.cache_bytes if config.cache_bytes is None else bytes_of(config.cache_bytes, "cache_bytes")
    assert n_batches is not None
    stages.float_model(net, config, data, contents)
    float_accuracy = accuracy_on(net, data)
    shown.message(f"float: accuracy {float_accuracy:.2%}")
    model = quantize(net, rules, data.test_images[:2])
    plan: QuantPlan = model.plan  # type: ignore[assignment]
    if all(isinstance(c, str | None) for s in plan.sites for c in (s.weight, s.input, s.output, s.bias)):
        plan.save(folder / "plan.yaml")
    shown.advance(0.0, "calibrating")
    stages.run("calibrated.pt", model, lambda: calibrate(model, data, n_batches, *drawn))
    set_qmodule_state(model, QModuleState.QUANT_EVAL)
    nearest_accuracy = accuracy_on(model, data)
    shown.message(f"rounded to nearest: accuracy {nearest_accuracy:.2%}, {len(plan.sites)} sites")
    shown.advance(0.0, "post-training")
    batches = list(itertools.islice(TrainBatches(data, *drawn), n_batches))

    def work() -> None:
        ptq.run(
            model,
            recipe.stages,
            batches,
            folder / "steps",
            recipe.keep,
            recipe.names,
            recipe.skip,
            config.seed,
            with_targets=True,
            cache_bytes=cache_bytes,
            on_step=lambda step: shown.advance(0.0, f"{step.stage} {step.path}"),
        )

    stages.run("quantized.pt", model, work)
    set_qmodule_state(model, QModuleState.QUANT_EVAL)
    result = PTQResult(float_accuracy, nearest_accuracy, accuracy_on(model, data))
    write_json(folder / "result.json", asdict(result))
    _report(result, model, config, data, folder)
    shown.advance(PTQ_UNITS, "done")
    return result


def _report(result: PTQResult, model: nn.Module, config: PTQConfig, data: TrainingData, folder: Path) -> None:
    """Write report.html."""
    names = ("float", "rounded to nearest", "the recipe")
    accuracies = list(zip(names, (result.float_accuracy, result.nearest_accuracy, result.accuracy), strict=True))
    table = accuracy_table(accuracies, len(data.test_labels))
    if (folder / "steps" / "ptq.json").exists():
        steps = ptq.PTQReport.load(folder / "steps").sections()
    else:
        steps = [Section("Steps", [Text("The steps are not known: the folder has no `steps/ptq.json`.")])]
    made = made_section(command_line("ptq", config), asdict(config))
    title = f"{config.model} on {config.data}, rounded after training"
    write_run_report(folder, title, [table], steps, (model, data), made, ABOUT_ROUNDED)
