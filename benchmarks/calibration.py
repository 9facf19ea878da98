"""Measure calibration relative to the float model's eval forward on the same batches.

python -m benchmarks.calibration --out calibration.json
python -m benchmarks.calibration --adapters torchquant --observer histogram
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from benchmarks.adapters.base import Adapter
from benchmarks.adapters.torchquant_adapter import TorchquantAdapter
from benchmarks.command import CLOCKS, add_clock, available, finish, parser, start
from benchmarks.harness import compare
from benchmarks.models import FUSED, build_float, image_batch
from benchmarks.results import Report
from torchquant.range_observers import OBSERVERS

TARGETS = {"ema": 1.15, "histogram": 1.3}
"""Observer -> time over the float forward."""


@torch.no_grad()
def run_float(model: nn.Module, batches: Sequence[Tensor]) -> None:
    """Run the float model in eval mode over all batches."""
    for batch in batches:
        model(batch)


def measure(
    report: Report, adapters: Sequence[Adapter], name: str, batches: Sequence[Tensor], options: argparse.Namespace
) -> None:
    """Add the rows of one model. The control is the same float model: it has no state that a run changes."""
    net = build_float(name, options.size).eval()
    calls: dict[str, Callable[[], object]] = {}
    for adapter in adapters:
        model = adapter.quantize_model(net).eval()
        calls[adapter.name] = lambda adapter=adapter, model=model: adapter.calibrate(model, batches)
    comparison = compare(lambda: run_float(net, batches), calls, options.rounds, clock=CLOCKS[options.clock])
    report.add(name, comparison, target=TARGETS.get(options.observer))


def observing(adapter: Adapter, observer: str) -> Adapter:
    """Return the adapter, torchquant's with another observer of activations."""
    return TorchquantAdapter(observer) if isinstance(adapter, TorchquantAdapter) else adapter


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    options = parser("Calibration, as a ratio to the float model's eval forward.", threads=2, rounds=7)
    options.add_argument("--models", nargs="+", choices=FUSED, default=["resnet18", "mobilenet_v2"])
    options.add_argument("--batches", type=int, default=32, help="batches to calibrate on (%(default)s)")
    options.add_argument("--batch", type=int, default=8, help="images per batch (%(default)s)")
    options.add_argument("--size", type=int, default=128, help="pixels per side (%(default)s)")
    options.add_argument(
        "--observer", choices=list(OBSERVERS), default="ema", help="of torchquant's activations (%(default)s)"
    )
    add_clock(options)
    return options.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 1 if a control failed."""
    options = arguments(argv)
    report = start("calibration", "time over the float eval forward", "", options)
    adapters = [observing(adapter, options.observer) for adapter in available(options.adapters, report)]
    batches = [image_batch(options.batch, options.size, seed)[0] for seed in range(options.batches)]
    for name in options.models:
        measure(report, adapters, name, batches, options)
    return finish(report, options.out)


if __name__ == "__main__":
    raise SystemExit(main())
