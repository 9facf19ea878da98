"""Measure what an analysis of all sites costs, as a ratio to (sites + 3) runs of the float model on the same batch.

python -m benchmarks.analysis --out analysis.json
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import nn

import torchquant as tq
from benchmarks.command import finish, parser, start
from benchmarks.harness import compare
from benchmarks.models import FUSED, build_float, image_batch
from benchmarks.results import Report
from torchquant.analysis import analyze

TARGET = 1.0


def measure(report: Report, name: str, options: argparse.Namespace) -> None:
    """Add the rows of one model."""
    net = build_float(name, options.size).eval()
    x = image_batch(options.batch, options.size, 0)[0]
    model = tq.quantize(net, "w8a8", x[:2])
    tq.calibrate(model, [x], show_progress=False)
    n_runs = sum(1 for _, module in tq.utils.qmodules(model) if module.quantizers()) + 3

    @torch.no_grad()
    def run_float(net: nn.Module = net) -> None:
        for _ in range(n_runs):
            net(x)

    calls = {"torchquant": lambda: analyze(model, [x], show_progress=False)}
    report.add(f"{name}, {n_runs - 3} sites", compare(run_float, calls, options.rounds), target=TARGET)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    options = parser(
        "An analysis of all sites, as a ratio to (sites + 3) runs of the float model.", threads=1, rounds=3
    )
    options.add_argument("--models", nargs="+", choices=FUSED, default=["resnet18", "mobilenet_v2"])
    options.add_argument("--batch", type=int, default=16, help="images (%(default)s)")
    options.add_argument("--size", type=int, default=160, help="pixels per side (%(default)s)")
    return options.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 1 if a control failed."""
    options = arguments(argv)
    report = start("analysis", "time over (sites + 3) runs of the float model", "", options)
    for name in options.models:
        measure(report, name, options)
    return finish(report, options.out)


if __name__ == "__main__":
    raise SystemExit(main())
