"""Measure what a monitor adds to a training step, W8A8: where it looks, where it does not, and on average.

python -m benchmarks.monitor --out monitor.json
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from torch import nn

import torchquant as tq
from benchmarks.command import finish, parser, start
from benchmarks.harness import BASELINE, compare
from benchmarks.models import MODELS, build_float
from benchmarks.qat_step import TrainingStep
from benchmarks.results import Report
from torchquant.training import Monitor
from torchquant.training.monitor import EVERY

LOOKED = "with a look"
TARGET = 1.03
NEVER, CALLS = 10**9, 1000


class WatchedStep(TrainingStep):
    """A training step, and that of a monitor which looks after every `every` steps and writes a CSV file."""

    def __init__(self, model: nn.Module, batch: tuple[object, object], every: int, folder: Path) -> None:
        super().__init__(model, *batch)  # type: ignore[arg-type]
        self.monitor = Monitor(model, every, f"csv:{folder / f'{every}.csv'}")

    def __call__(self) -> None:
        super().__call__()
        self.monitor.step()


def idle_seconds(model: nn.Module) -> float:
    """Time a call of `monitor.step()` that does not look: too short to be seen in the time of a training step."""
    monitor = Monitor(model, NEVER)
    start = time.process_time()
    for _ in range(CALLS):
        monitor.step()
    return (time.process_time() - start) / CALLS


def measure(report: Report, name: str, options: argparse.Namespace, folder: Path) -> None:
    """Add the rows of one model."""
    net = build_float(name, options.size)
    batch = MODELS[name].batch(options.batch, options.size)
    model = tq.quantize(net, "w8a8", batch[0][:2])
    tq.calibrate(model, [batch[0]], with_targets=False, show_progress=False)
    tq.set_qmodule_state(model, tq.QModuleState.QUANT_AWARE_TRAIN)
    base, control = (TrainingStep(copy.deepcopy(model), *batch) for _ in range(2))
    looked = WatchedStep(copy.deepcopy(model), batch, 1, folder)
    comparison = compare(base, {LOOKED: looked}, options.rounds, control, clock=time.process_time)
    idle = idle_seconds(model)
    alone = min(comparison.seconds[BASELINE])
    average = (comparison.ratio(LOOKED).median + (EVERY - 1) * (1.0 + idle / alone)) / EVERY
    note = f"{len(looked.monitor.sites)} quantizers; a step between looks: {1e6 * idle:.0f} us more"
    report.add(name, comparison, {LOOKED: average}, None, TARGET, {LOOKED: note})


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    options = parser("Time of a watched training step over the same step alone.", threads=1, rounds=9, adapters=False)
    models = ["resnet18", "mobilenet_v2", "bert"]
    options.add_argument("--models", nargs="+", choices=list(MODELS), default=[m for m in models if m in MODELS])
    options.add_argument("--batch", type=int, default=16, help="images or texts a step (%(default)s)")
    options.add_argument("--size", type=int, default=96, help="pixels a side, or tokens (%(default)s)")
    return options.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run; 1 if a control failed."""
    options = arguments(argv)
    report = start("monitor", f"step time over the same step alone, a look every {EVERY} steps", "average", options)
    with tempfile.TemporaryDirectory() as folder:
        for name in options.models:
            measure(report, name, options, Path(folder))
    return finish(report, options.out)


if __name__ == "__main__":
    raise SystemExit(main())
