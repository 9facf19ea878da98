"""Export the model of a `torchquant quantize`, `ptq` or `search` run for other runtimes, with a certificate."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from torchquant._files import reading, write_json
from torchquant._registry import not_one_of
from torchquant.deploy import Certificate, Lowered, certify, export_onnx, lower, save_packed, to_integer
from torchquant.errors import ConfigError
from torchquant.plan import QuantPlan, quantize
from torchquant.qmodule import QModuleState
from torchquant.runs.contents import changed_contents, contents_of
from torchquant.runs.data import TrainingData
from torchquant.runs.folder import CONTENTS, ELSEWHERE, output_folder, read_as, read_checkpoint_into, read_settings
from torchquant.runs.loop import accuracy
from torchquant.runs.networks import build_model, data_of, is_published, model_for
from torchquant.runs.quantize import JobConfig
from torchquant.runs.settings import files_of
from torchquant.utils import set_qmodule_state

__all__ = ["Exported", "certify_run", "export_run", "float_model", "load_run"]

FORMS = ("onnx", "packed", "integer")
FILES = {"onnx": "model.onnx", "packed": "model.safetensors", "integer": "integer.json"}
SHARED = (
    "model",
    "data",
    "checkpoint",
    "float_epochs",
    "learning_rate",
    "calibration_batches",
    "seed",
    "weights",
    CONTENTS,
)
"""Settings of searches and of `torchquant ptq` that `JobConfig` has too, where they have them."""
OTHERS = {"kind", "recipe"}
"""Settings that only the folder of a search has, and only that of `torchquant ptq`."""
AGAIN = "run it again in another folder"
SAMPLES = 256
BATCH = 64


@dataclass(frozen=True)
class Exported:
    """The written file, its form, and its certificate if one was requested."""

    path: Path
    form: str
    bytes: int
    certificate: Certificate | None
    integer_accuracy: float | None = None
    samples: int = 0


def load_run(folder: str | os.PathLike[str]) -> tuple[nn.Module, TrainingData, JobConfig]:
    """Load the quantized model of a finished run, in eval mode and QUANT_EVAL, with its data and its settings.

    For a search or `torchquant ptq`, only the settings that `JobConfig` has are returned. Raises ConfigError for a
    folder without a finished run.
    """
    run = Path(folder)
    needed = ["config.json", "plan.yaml", "quantized.pt"]
    missing = [name for name in needed if not (run / name).is_file()]
    if missing:
        raise ConfigError(
            f"{run} is not the folder of a finished run of `torchquant quantize`, `ptq` or `search`: "
            f"it does not hold {', '.join(missing)}"
        )
    known = read_settings(run / "config.json")
    names = {*known} - {"amp"} if OTHERS.isdisjoint(known) else SHARED
    known = {name: value for name, value in known.items() if name in names}
    config = read_as(run / "config.json", JobConfig, known, ELSEWHERE)
    data = data_of(config)
    net = model_for(config, data)
    found = contents_of(files_of(config.data, None), [net], config.model)
    if changed := changed_contents(
        {name: sha for name, sha in (config.contents or found).items() if name in found}, found
    ):
        raise ConfigError(
            f"{', '.join(changed)} has changed since the run in {run}; restore it, or run again in another folder"
        )
    with reading(run / "plan.yaml", AGAIN):
        model = quantize(net.eval(), QuantPlan.load(run / "plan.yaml"), inplace=True)
    read_checkpoint_into(model, run / "quantized.pt", AGAIN)
    set_qmodule_state(model.eval(), QModuleState.QUANT_EVAL)
    return model, data, config


def float_model(model: str, n_classes: int, n_channels: int, published: bool = False) -> nn.Module:
    """Build the float model of a run from the name that `torchquant quantize` takes; packed files name this function.

    >>> float_model("demo", 10, 1)(torch.zeros(1, 1, 16, 16)).shape
    torch.Size([1, 10])
    """
    data: Any = SimpleNamespace(n_classes=n_classes, n_channels=n_channels)
    return build_model(model, data, published)


def export_run(
    folder: str | os.PathLike[str],
    form: str = "onnx",
    with_certificate: bool = False,
    samples: int = SAMPLES,
    out: str | os.PathLike[str] | None = None,
) -> Exported:
    """Write the model of a run as "onnx", "packed" or "integer", into the folder unless `out` names a file.

    "integer" writes no model but a report: accumulators, float operators, and the accuracy of the integer reference
    on `samples` test images. `with_certificate`, for ONNX: certify on as many images, into certificate.json and .txt
    beside the file. Raises ConfigError, ExportError.
    """
    if form not in FORMS:
        raise ConfigError(not_one_of("the form", form, FORMS))
    if with_certificate and form != "onnx":
        raise ConfigError(f"only an ONNX file can have a certificate, got the form {form!r}; use the form 'onnx'")
    path = Path(folder) / FILES[form] if out is None else Path(out)
    if out is not None:
        output_folder(path.parent)
    model, data, config = load_run(folder)
    images, labels = data.test_images[:samples], data.test_labels[:samples]
    certificate, integer_accuracy = None, None
    if form == "onnx":
        lowered = lower(model, images[:2])
        export_onnx(lowered, path)
        if with_certificate:
            certificate = _certified(lowered, path, images, labels)
    elif form == "packed":
        shape: dict[str, Any] = {"model": config.model, "n_classes": data.n_classes, "n_channels": data.n_channels}
        if is_published(config):
            shape["published"] = True
        save_packed(model, path, ("torchquant.runs.export:float_model", shape))
    else:
        integer = to_integer(model, images[:2])
        scores = torch.cat([integer(x) for x in images.split(BATCH)])
        integer_accuracy = accuracy(scores, labels)
        report: dict[str, Any] = {
            "rounding": integer.rounding,
            "samples": len(images),
            "accuracy": integer_accuracy,
            "float_operators": [asdict(operator) for operator in integer.float_operators],
            "largest_accumulators": integer.accumulators,
        }
        write_json(path, report)
    return Exported(path, form, path.stat().st_size, certificate, integer_accuracy, len(images))


def certify_run(
    folder: str | os.PathLike[str], onnx: str | os.PathLike[str] | None = None, samples: int = SAMPLES
) -> Certificate:
    """Certify an ONNX file of the run and write the certificate beside it. Raises ConfigError, ExportError."""
    model, data, _ = load_run(folder)
    path = Path(folder) / FILES["onnx"] if onnx is None else Path(onnx)
    if not path.is_file():
        raise ConfigError(f"there is no file {path}; write it with: torchquant export {folder} --to onnx")
    return _certified(model, path, data.test_images[:samples], data.test_labels[:samples])


def _certified(model: nn.Module | Lowered, path: Path, images: Tensor, labels: Tensor) -> Certificate:
    batches = list(zip(images.split(BATCH), labels.split(BATCH), strict=True))
    certificate = certify(model, path, batches, stamp=True)
    certificate.save(path.with_name("certificate.json"))
    return certificate
