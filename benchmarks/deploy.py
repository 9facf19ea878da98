"""Measure deployed int8 inference: our exported model and the model of each runtime's own post-training tool.

python -m benchmarks.deploy --out deploy.json
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.command import finish, parser, start
from benchmarks.harness import BASELINE, Comparison, compare
from benchmarks.models import image_batch
from benchmarks.results import Report
from torchquant import QModuleState, qmodule_state, quantize
from torchquant.deploy import export_onnx
from torchquant.errors import require

MODELS = ("resnet18", "resnet50", "mobilenet_v2")
RUNTIMES = {"ort": ("onnxruntime",), "openvino": ("openvino", "nncf")}
"""Runtime -> the packages that its rows need."""

RULES = {"ort": "int8-ort", "openvino": "int8-openvino"}
"""Runtime -> the rule set of its model."""

TARGET = 1.05
"""Largest allowed time of our model over that of the runtime's own tool."""

ORT_MODES = {"": "0", " precise": "1"}
"""Rows of ONNX Runtime -> session.x64quantprecision."""

CALIBRATION_BATCH = 8

Infer = Callable[[], "np.ndarray[Any, Any]"]


@dataclass
class Rows:
    """The timed calls by name. `own`: row of ours -> row of the same runtime's own tool."""

    calls: dict[str, Infer] = field(default_factory=dict)
    own: dict[str, str] = field(default_factory=dict)

    def add(self, runtime: str, tool: str, theirs: Infer, ours: Infer) -> None:
        self.calls[f"{runtime} {tool}"] = theirs
        self.calls[f"{runtime} torchquant"] = ours
        self.own[f"{runtime} torchquant"] = f"{runtime} {tool}"

    def over_own(self, comparison: Comparison) -> dict[str, float]:
        """Return row of ours -> median over the rounds of its time over the time of the runtime's own."""
        seconds = comparison.seconds
        return {
            ours: statistics.median(a / b for a, b in zip(seconds[ours], seconds[theirs], strict=True))
            for ours, theirs in self.own.items()
        }


def build(name: str, size: int, seed: int = 0) -> nn.Module:
    """Build a float model in eval mode with random weights and batch norm statistics of random images."""
    torch.manual_seed(seed)
    net: nn.Module = getattr(require("torchvision.models", "all"), name)(weights=None)
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the plain average over all batches
    with torch.no_grad():
        for images in calibration_images(2, size):
            net.train()(images)
    for norm in norms:
        norm.momentum = 0.1
    return net.eval()


def calibration_images(batches: int, size: int) -> list[Tensor]:
    return [image_batch(CALIBRATION_BATCH, size, seed)[0] for seed in range(100, 100 + batches)]


def sqnr_db(y: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    """Compute the power of the float output over the power of the difference, in dB."""
    noise = float(np.square(y - expected).sum())
    return float(10 * np.log10(np.square(expected).sum() / max(noise, 1e-30)))


def export_float(net: nn.Module, images: Tensor, path: Path) -> Path:
    """Write the float model by torch's exporter with the operator set that `export_onnx` uses."""
    shapes = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(net, (images,), path, dynamo=True, opset_version=20, dynamic_shapes=shapes, verbose=False)
    return path


@torch.no_grad()
def export_ours(net: nn.Module, rules: str, images: Sequence[Tensor], path: Path) -> Path:
    model = quantize(net, rules, images[0])
    with qmodule_state(model, QModuleState.CALIBRATION):
        for batch in images:
            model(batch)
    return export_onnx(model, path, images[0], keep_signed=rules == RULES["openvino"])


class _Reader:
    """Calibration images in the interface of ONNX Runtime's tool."""

    def __init__(self, name: str, images: Sequence[Tensor]) -> None:
        self.feeds: Iterator[dict[str, Any]] = iter([{name: batch.numpy()} for batch in images])

    def get_next(self) -> dict[str, Any] | None:
        return next(self.feeds, None)


def quantize_in_ort(source: Path, images: Sequence[Tensor], path: Path) -> Path:
    """Quantize by ONNX Runtime's own tool: QDQ, activations uint8, weights int8 per channel, min-max."""
    tool = require("onnxruntime.quantization", "deploy")
    prepare = require("onnxruntime.quantization.shape_inference", "deploy")
    prepared = path.with_suffix(".prepared.onnx")
    prepare.quant_pre_process(str(source), str(prepared))
    tool.quantize_static(
        str(prepared),
        str(path),
        _Reader(input_name(prepared), images),
        quant_format=tool.QuantFormat.QDQ,
        activation_type=tool.QuantType.QUInt8,
        weight_type=tool.QuantType.QInt8,
        per_channel=True,
        calibrate_method=tool.CalibrationMethod.MinMax,
    )
    return path


def input_name(path: Path) -> str:
    return str(require("onnx", "deploy").load(path).graph.input[0].name)


def ort_call(path: Path, images: Tensor, threads: int, precision: str) -> Infer:
    """Make a session with a constant batch size; its threads stop spinning when a call ends."""
    runtime = require("onnxruntime", "deploy")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.x64quantprecision", precision)
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_free_dimension_override_by_name("batch", len(images))
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: images.numpy()}
    return lambda: session.run(None, feed)[0]


def openvino_call(model: Any, images: Tensor, threads: int) -> Infer:
    """Compile a model of constant batch size for the lowest latency of one request. model: path or OpenVINO model."""
    openvino = require("openvino", "openvino")
    core = openvino.Core()
    loaded = core.read_model(model) if isinstance(model, Path) else model.clone()
    loaded.reshape(list(images.shape))
    hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
    request = core.compile_model(loaded, "CPU", hints).create_infer_request()
    array = images.numpy()

    def infer() -> np.ndarray[Any, Any]:
        request.infer([array], share_inputs=True, share_outputs=True)
        output: np.ndarray[Any, Any] = request.get_output_tensor().data
        return output

    return infer


def quantize_in_nncf(source: Path, images: Sequence[Tensor], name: str) -> Any:
    """Quantize by NNCF: an OpenVINO model; preset "mixed" (zero points) for all but the plain residual nets."""
    nncf, openvino = require("nncf", "bench"), require("openvino", "openvino")
    nncf.set_log_level(logging.ERROR)
    preset = nncf.QuantizationPreset.PERFORMANCE if name.startswith("resnet") else nncf.QuantizationPreset.MIXED
    data = nncf.Dataset([batch.numpy() for batch in images])
    return nncf.quantize(openvino.Core().read_model(source), data, preset=preset, subset_size=len(images))


@dataclass(frozen=True)
class Models:
    """One network in every form: runtime -> our file, and the model of the runtime's own tool."""

    float: Path
    ours: dict[str, Path]
    theirs: dict[str, Any]


def make_models(net: nn.Module, name: str, images: Sequence[Tensor], runtimes: Sequence[str], folder: Path) -> Models:
    floating = export_float(net, images[0], folder / f"{name}.onnx")
    ours = {rt: export_ours(net, RULES[rt], images, folder / f"{name}-{RULES[rt]}.onnx") for rt in runtimes}
    theirs: dict[str, Any] = {}
    if "ort" in runtimes:
        theirs["ort"] = quantize_in_ort(floating, images, folder / f"{name}-quantize_static.onnx")
    if "openvino" in runtimes:
        theirs["openvino"] = quantize_in_nncf(floating, images, name)
    return Models(floating, ours, theirs)


def make_rows(models: Models, images: Tensor, threads: int) -> Rows:
    rows = Rows()
    if "ort" in models.theirs:
        rows.calls["ort float"] = ort_call(models.float, images, threads, "0")
        for mode, precision in ORT_MODES.items():
            theirs, ours = (ort_call(m["ort"], images, threads, precision) for m in (models.theirs, models.ours))
            rows.add(f"ort{mode}", "quantize_static", theirs, ours)
    if "openvino" in models.theirs:
        rows.calls["openvino float"] = openvino_call(models.float, images, threads)
        theirs, ours = (openvino_call(m["openvino"], images, threads) for m in (models.theirs, models.ours))
        rows.add("openvino", "nncf", theirs, ours)
    return rows


@torch.inference_mode()
def measure(report: Report, net: nn.Module, group: str, rows: Rows, images: Tensor, options: Any) -> None:
    """Add the rows of one model and batch size. The control is the same float model in torch."""
    expected = net(images).numpy()
    quality = {name: sqnr_db(call(), expected) for name, call in rows.calls.items()}
    comparison = compare(lambda: net(images), rows.calls, options.rounds, sample_s=options.sample)
    notes = {name: f"{1 / comparison.ratio(name).median:.2f}x, {db:.0f} dB" for name, db in quality.items()}
    goal = TARGET if comparison.is_valid else None  # a ratio of invalid times is invalid
    report.add(group, comparison, rows.over_own(comparison), saved_target=goal, notes=notes)


def available(names: Sequence[str], report: Report) -> list[str]:
    """Return the runtimes whose packages are installed; the report names the others."""
    found = []
    for name in names:
        missing = [package for package in RUNTIMES[name] if importlib.util.find_spec(package) is None]
        if missing:
            extra = "deploy" if name == "ort" else "openvino,bench"
            report.notes.append(
                f"{name}: skipped, {' and '.join(missing)} not installed; run: pip install 'torchquant[{extra}]'"
            )
        else:
            found.append(name)
    return found


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    description = "Deployed int8 inference, as a ratio to the float model in torch."
    options = parser(description, threads=2, rounds=11, adapters=False)
    options.add_argument("--runtimes", nargs="+", choices=list(RUNTIMES), default=list(RUNTIMES), metavar="NAME")
    options.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME")
    options.add_argument("--batch", nargs="+", type=int, default=[1, 8], help="images per call (%(default)s)")
    options.add_argument("--size", type=int, default=224, help="pixels per side (%(default)s)")
    options.add_argument("--batches", type=int, default=4, help="batches of 8 images to calibrate on (%(default)s)")
    options.add_argument("--sample", type=float, default=0.2, help="shortest turn in seconds (%(default)s)")
    options.add_argument("--keep", type=Path, help="keep the model files in this folder")
    return options.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 1 if a control failed."""
    options = arguments(argv)
    report = start("deploy", "time of one call over torch eager float", "over the runtime's own", options)
    report.notes.append(f"{BASELINE}: torch eager float. Last column: its time over the row's, and SQNR of the output")
    runtimes = available(options.runtimes, report)
    images = calibration_images(options.batches, options.size)
    for package in dict.fromkeys(p for name in runtimes for p in RUNTIMES[name]):
        report.machine[package] = str(require(package, "deploy").__version__)
    with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of the exporters and of the other tools
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for name in options.models:
            net = build(name, options.size)
            models = make_models(net, name, images, runtimes, folder)
            for batch in options.batch:
                inputs = image_batch(batch, options.size)[0]
                measure(report, net, f"{name} b{batch}", make_rows(models, inputs, options.threads), inputs, options)
    return finish(report, options.out)


if __name__ == "__main__":
    raise SystemExit(main())
