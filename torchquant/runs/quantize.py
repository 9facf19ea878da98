"""The whole way of one model, from float to quantized, into a folder: `torchquant quantize`.

Each stage writes a file; a run that was stopped goes on where it was.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchquant._files import write_csv, write_json
from torchquant._registry import did_you_mean
from torchquant._shown import shown
from torchquant.analysis import weight_bytes
from torchquant.compare.tasks import DATA, NETWORKS, Gray, load_data
from torchquant.compat.checkpoints import load_checkpoint
from torchquant.demo.checks import check_above_zero, check_at_least, check_seed, check_types
from torchquant.demo.contents import contents_of, pinned
from torchquant.demo.data import TrainingData
from torchquant.demo.files import CONTENTS, claimed, read_checkpoint_into, write_checkpoint
from torchquant.demo.progress import Silent
from torchquant.demo.training import accuracy, calibrate, predict, quantization_aware_train, train
from torchquant.deploy.references import model_of
from torchquant.errors import ConfigError, one_line, require
from torchquant.plan import RULE_SETS, QuantPlan, quantize, read_yaml
from torchquant.qmodule import QModuleState
from torchquant.utils import SiteReport, set_qmodule_state, state_report

__all__ = ["JobConfig", "JobResult", "build_model", "read_rules", "run_job"]

MODES = ("ptq", "qat")
MADE = ("float.pt", "calibrated.pt", "trained.pt", "*.progress.pt")
"""Files that a later run of the same settings goes on from."""


@dataclass(frozen=True)
class JobConfig:
    """What `torchquant quantize` is asked for.

    `model`: a name of torchvision or timm, "demo", or "path/to/file.py:function", a function that returns a model, or
    "package.module:function" of an installed package.
    `rules`: a ready set, or a YAML file with a list of rules or with a saved plan. `data`: see `load_data`.
    `mode`: "ptq" calibrates, "qat" trains after that. `checkpoint`: a float state_dict; without one the float model is
    trained for `float_epochs`. `contents`: name -> sha256 of the files that take part, as a run wrote them down; None:
    as they are now. Raises ConfigError.
    """

    model: str
    rules: str = "w8a8"
    data: str = "digits"
    mode: str = "ptq"
    checkpoint: str | None = None
    float_epochs: int = 30
    epochs: int = 10
    learning_rate: float = 1e-3
    calibration_batches: int = 8
    seed: int = 0
    contents: dict[str, str] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_types(self)
        if self.mode not in MODES:
            raise ConfigError(f"mode must be one of {', '.join(MODES)}, got {shown(self.mode)}")
        check_at_least(self, float_epochs=0, epochs=1, calibration_batches=1)
        check_above_zero(self, "learning_rate")
        check_seed(self.seed)


@dataclass(frozen=True)
class JobResult:
    """Test accuracy, 0..1, and bytes of all layer weights: float, calibrated, and trained (None for ptq)."""

    float_accuracy: float
    ptq_accuracy: float
    qat_accuracy: float | None
    float_weight_bytes: int
    weight_bytes: int
    n_sites: int
    n_left_float: int

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows, to show."""
        rows = [
            ["float", f"{self.float_accuracy:.2%}", f"{self.float_weight_bytes / 1e3:.1f}"],
            ["calibrated", f"{self.ptq_accuracy:.2%}", f"{self.weight_bytes / 1e3:.1f}"],
        ]
        if self.qat_accuracy is not None:
            rows.append(["trained quantized", f"{self.qat_accuracy:.2%}", f"{self.weight_bytes / 1e3:.1f}"])
        return ["model", "accuracy", "weights kB"], rows


def run_job(
    config: JobConfig, out: str | os.PathLike[str], show: Silent | None = None, strict: bool = False
) -> JobResult:
    """Float model, plan, calibration, training, evaluation; files in `out`.

    `config.json`, `float.pt`, `plan.yaml`, `calibrated.pt`, `quantized.pt` (state dicts), `sites.csv`, `result.json`.
    A stage whose file is there is not run again. All that was asked for is tried on the untrained model before the
    folder is touched; `strict` as in `quantize`. Raises ConfigError, also if `out` holds another job, one of other
    contents, or one that runs.
    """
    with show or Silent() as shown:
        shown.start(4.0)
        data = load_data(config.data, config.seed)
        torch.manual_seed(config.seed)
        net = build_model(config.model, data)
        rules = read_rules(config.rules)
        with torch.random.fork_rng(devices=[]):
            trial = tried(net, data, config.model, config.checkpoint)
            quantize(trial, rules, data.test_images[:2], strict=strict)
        found = contents_of([config.checkpoint, *files_of(config.data, config.rules)], [net], config.model)
        settings = asdict(config) | {CONTENTS: pinned(config.contents, found)}
        with claimed(Path(out) / "config.json", settings, "another job", "job", MADE, shown.message) as folder:
            return _stages(net, rules, config, data, folder, shown)


def _stages(
    net: nn.Module, rules: Any, config: JobConfig, data: TrainingData, folder: Path, shown: Silent
) -> JobResult:
    _float_stage(net, config, data, folder, shown)
    float_accuracy = accuracy(predict(net, data.test_images), data.test_labels)
    float_bytes = sum(site.total for site in weight_bytes(net))
    shown.message(f"float: accuracy {float_accuracy:.2%}")
    model = quantize(net, rules, data.test_images[:2])
    plan: QuantPlan = model.plan  # type: ignore[assignment]
    if all(isinstance(c, str | None) for s in plan.sites for c in (s.weight, s.input, s.output, s.bias)):
        plan.save(folder / "plan.yaml")
    shown.advance(1.0, "calibrating")
    _stage(folder / "calibrated.pt", model, lambda: calibrate(model, data, config.calibration_batches, config.seed))
    set_qmodule_state(model, QModuleState.QUANT_EVAL)
    ptq_accuracy = accuracy(predict(model, data.test_images), data.test_labels)
    shown.message(f"calibrated: accuracy {ptq_accuracy:.2%}, {len(plan.sites)} sites, {len(plan.floats)} left float")
    shown.advance(1.0, "training")
    qat_accuracy = None
    if config.mode == "qat":
        qat_accuracy = _qat_stage(model, config, data, folder, shown)
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
    shown.advance(1.0, "done")
    return result


def build_model(name: str, data: TrainingData) -> nn.Module:
    """A model by name, for the data's classes and channels. Raises ConfigError, MissingDependencyError.

    "demo" and the networks of `torchquant compare`, then torchvision, then timm; or "path/to/file.py:function".
    """
    if ":" in name:
        return model_of(name)
    if name in NETWORKS:
        return NETWORKS[name].build(data)
    models = require("torchvision.models", "all")
    if name in models.list_models():
        net = models.get_model(name, num_classes=data.n_classes)
        return net if data.n_channels == 3 else Gray(net)
    try:
        timm = require("timm", "dev")
    except ImportError as error:
        raise ConfigError(f"no model '{name}' in torchvision, and timm is not installed; pip install timm") from error
    if not timm.is_model(name):
        hint = did_you_mean(name, [*NETWORKS, *models.list_models(), *timm.list_models()])
        raise ConfigError(
            f"no model {shown(name)} in torchvision or timm;{hint} Their names are those of "
            "torchvision.models.list_models() and timm.list_models(). A model of your own is path/to/file.py:function"
        )
    return timm.create_model(name, pretrained=False, num_classes=data.n_classes, in_chans=data.n_channels)


def read_rules(rules: str) -> Any:
    """A ready set by name; or what a YAML file holds: a list of rules, or a plan. Raises ConfigError."""
    if rules in RULE_SETS:
        return rules
    path = Path(rules)
    if not path.is_file():
        raise ConfigError(f"rules must be one of {', '.join(RULE_SETS)}, or a YAML file; there is no file {rules!r}")
    found = read_yaml(path)
    return QuantPlan.load(path) if isinstance(found, dict) else found


def files_of(data: str, rules: str | None) -> Iterator[str]:
    """Those of the two that are files or folders, not names."""
    if data not in DATA:
        yield data
    if rules is not None and rules not in RULE_SETS:
        yield rules


@torch.no_grad()
def tried(net: nn.Module, data: TrainingData, name: str, checkpoint: str | None) -> nn.Module:
    """A copy with the checkpoint in it. Raises ConfigError for a model that does not give scores for such pictures."""
    net = copy.deepcopy(net).eval()
    if checkpoint is not None:
        load_checkpoint(net, checkpoint)
    images = data.test_images[:2]
    takes = f"pictures of shape {tuple(images.shape)}"
    try:
        scores = net(images)
    except Exception as error:
        raise ConfigError(
            f"the model {name} does not take {takes}: {type(error).__name__}: {one_line(error)}"
        ) from error
    wanted = f"scores of shape ({len(images)}, {data.n_classes})"
    if not isinstance(scores, Tensor):
        raise ConfigError(f"the model {name} must give {wanted} for {takes}, it gave {type(scores).__name__}")
    if scores.ndim != 2 or len(scores) != len(images) or scores.shape[1] < data.n_classes:
        raise ConfigError(f"the model {name} must give {wanted} for {takes}, it gave shape {tuple(scores.shape)}")
    return net


def _stage(path: Path, model: nn.Module, work: Callable[[], object]) -> None:
    """Do the work and keep the model; or take it from the file, if the work was done before."""
    if path.exists():
        read_checkpoint_into(model, path)
    else:
        work()
        write_checkpoint(path, model)


def _float_stage(net: nn.Module, config: JobConfig, data: TrainingData, folder: Path, shown: Silent) -> None:
    def work() -> None:
        if config.checkpoint is not None:
            load_checkpoint(net, config.checkpoint)
        elif config.float_epochs:
            train(
                net,
                data,
                config.float_epochs,
                config.learning_rate,
                config.seed,
                _tell(shown, "float", config.float_epochs),
                folder / "float.progress.pt",
            )

    _stage(folder / "float.pt", net, work)
    (folder / "float.progress.pt").unlink(missing_ok=True)
    net.eval()


def _qat_stage(model: nn.Module, config: JobConfig, data: TrainingData, folder: Path, shown: Silent) -> float:
    progress = folder / "qat.progress.pt"
    tell = _tell(shown, "quantized", config.epochs)
    rate = config.learning_rate / 3.0

    def work() -> None:
        quantization_aware_train(model, data, config.epochs, rate, config.seed, tell, progress)

    _stage(folder / "trained.pt", model, work)
    progress.unlink(missing_ok=True)
    model.eval()
    set_qmodule_state(model, QModuleState.QUANT_EVAL)
    found = accuracy(predict(model, data.test_images), data.test_labels)
    shown.message(f"trained quantized: accuracy {found:.2%}")
    return found


def _tell(shown: Silent, what: str, epochs: int) -> Callable[[int, float], None]:
    def tell(epoch: int, loss: float) -> None:
        shown.advance(1.0 / epochs, f"{what}: epoch {epoch} of {epochs}, loss {loss:.3f}")

    return tell
