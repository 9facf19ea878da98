"""Run the workflow of the demo: train in float, quantize with six schemes, export, compare, report."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from torchquant._files import write_json
from torchquant.analysis import layer_errors, weight_bytes
from torchquant.deploy import certify, export_onnx, lower, run_onnx
from torchquant.errors import require
from torchquant.runs.console import NullProgress
from torchquant.runs.data import Digits, load_digits
from torchquant.runs.demo.report import demo_page
from torchquant.runs.demo.results import DemoResult, OnnxResult, SchemeResult
from torchquant.runs.demo.schemes import SCHEMES, Scheme
from torchquant.runs.demo.settings import DemoConfig
from torchquant.runs.folder import output_folder, write_checkpoint
from torchquant.runs.loop import accuracy, accuracy_on, calibrate, predict, train
from torchquant.runs.losses import Losses
from torchquant.runs.options import RunOptions, on_threads
from torchquant.runs.report import REPORT, versions
from torchquant.runs.small_resnet import QuantSmallResNet, SmallResNet
from torchquant.training import OnEpoch

FLOAT_RATE = 8e-3
QAT_RATE = 3e-3
EXPORTED = "w8a8-ptq"
CERTIFIED = 450
"""Number of test images whose codes are compared one by one."""
PACKAGES = ("sklearn", "onnx", "onnxscript", "onnxruntime")


def run_demo(
    config: DemoConfig | None = None,
    out: str | os.PathLike[str] = "demo_out",
    show: NullProgress | None = None,
    options: RunOptions | None = None,
) -> DemoResult:
    """Run the demo and write report.html, results.json, checkpoints and w8a8.onnx into the folder `out`.

    The same seed gives the same numbers on one machine: the demo computes on one thread, which for so small a network
    is no slower, and restores the caller's random state and number of threads. `options`: device, mixed precision,
    compilation and workers. Raises ConfigError for a bad `out`,
    MissingDependencyError before any work is done.
    """
    for package in PACKAGES:
        require(package, "demo")
    folder = output_folder(out)
    with torch.random.fork_rng(devices=[]), on_threads(1), show or NullProgress() as shown:
        return _Job(config or DemoConfig.preset(), folder, shown, options or RunOptions()).run()


class _Job:
    """A run of the demo; its steps share the data, the float network and the clock."""

    def __init__(self, config: DemoConfig, folder: Path, show: NullProgress, options: RunOptions) -> None:
        self.config, self.options, self.device = config, options, options.device or "cpu"
        self.folder = folder
        self.show = show
        self.seconds: dict[str, float] = {}
        self.losses = Losses()
        self.data: Digits = load_digits(config.seed, config.test_copies)
        torch.manual_seed(config.seed)
        self.network = SmallResNet().to(self.device)

    def run(self) -> DemoResult:
        epochs = self.config.float_epochs + sum(2 * self.config.qat_epochs(s) + 1 for s in SCHEMES)
        self.show.start(epochs + 2)
        started = time.perf_counter()
        rows = [self._float()]
        models = {}
        for scheme in SCHEMES:
            models[scheme.name] = model = scheme.build(self.network).to(self.device)
            rows.append(self._scheme(scheme, model))
        for model in models.values():
            model.cpu()
        onnx = self._onnx(models[EXPORTED])
        self.show.advance(1, "analysing layers and drawing the report")
        with self._timed("analysis"):
            sample = self.data.test_images[:256]
            layers = {name: layer_errors(model, sample) for name, model in models.items()}
        self.seconds["total before report"] = time.perf_counter() - started
        result = DemoResult(self.config, tuple(rows), onnx, layers, self.seconds, versions(), self.losses)
        demo_page(result, models, sample, len(self.data.test_labels)).write(self.folder / REPORT)
        write_json(self.folder / "results.json", result.to_dict())
        self.show.advance(1, "done")
        return result

    def _float(self) -> SchemeResult:
        config = self.config
        with self._timed("float"):
            train(
                self.network,
                self.data,
                config.float_epochs,
                FLOAT_RATE,
                config.seed,
                self._tell(1, "float"),
                options=self.options,
            )
            found = accuracy_on(self.network, self.data)
        write_checkpoint(self.folder / "float.pt", self.network)
        bytes_ = sum(site.total for site in weight_bytes(self.network))
        return self._finished(SchemeResult("float", "float32", found, bytes_))

    def _scheme(self, scheme: Scheme, model: QuantSmallResNet) -> SchemeResult:
        config = self.config
        with self._timed(scheme.name):
            calibrate(model, self.data, config.calibration_batches, config.seed)
            self.show.advance(1, f"{scheme.title}: calibrated")
            if scheme.qat:
                train(
                    model,
                    self.data,
                    config.qat_epochs(scheme),
                    QAT_RATE,
                    config.seed,
                    self._tell(2, scheme.title),
                    quantized=True,
                    options=self.options,
                )
            found = accuracy_on(model, self.data)
        write_checkpoint(self.folder / f"{scheme.name}.pt", model)
        bytes_ = sum(site.total for site in weight_bytes(model))
        return self._finished(SchemeResult(scheme.name, scheme.title, found, bytes_))

    def _tell(self, amount: float, title: str) -> OnEpoch:
        """Return a callback for each epoch of a training, which keeps its loss."""

        def tell(epoch: int, loss: float) -> None:
            self.losses.setdefault(title, []).append((epoch, loss))
            self.show.advance(amount, f"{title}: epoch {epoch}, loss {loss:.3f}")

        return tell

    def _onnx(self, model: QuantSmallResNet) -> OnnxResult:
        x, labels = self.data.test_images, self.data.test_labels
        path = self.folder / "w8a8.onnx"
        with self._timed("onnx"):
            lowered = lower(model, x[:2])
            export_onnx(lowered, path, verify=False)
            scores = run_onnx(path, x, optimize=True)
            simulated = predict(model, x)
            n = CERTIFIED
            certificate = certify(lowered, path, [(x[:n], labels[:n])], stamp=True)
            certificate.save(self.folder / "certificate.json")
        result = OnnxResult(
            accuracy=accuracy(scores, labels),
            simulated_accuracy=accuracy(simulated, labels),
            same_top1=float((scores.argmax(1) == simulated.argmax(1)).double().mean()),
            largest_difference=float((scores - simulated).abs().max()),
            file_bytes=path.stat().st_size,
            certificate=certificate,
        )
        self.show.message(
            f"w8a8.onnx in ONNX Runtime: accuracy {result.accuracy:.2%}, same class as the simulation for "
            f"{result.same_top1:.2%} of {len(labels)} test images"
        )
        integers = certificate.comparisons[0]
        self.show.message(
            f"parity certificate: {certificate.verdict}, {integers.differ} of "
            f"{integers.elements:,} codes differ between ONNX Runtime's integer kernels and the integer reference"
        )
        return result

    def _finished(self, row: SchemeResult) -> SchemeResult:
        self.show.message(f"{row.title}: accuracy {row.accuracy:.2%} after {self.seconds[row.name]:.1f} s")
        return row

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
