"""Measure one step of quantization-aware training, W8A8: time and bytes saved for backward, over the float model.

python -m benchmarks.qat_step --out qat_step.json
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.adapters.base import Adapter
from benchmarks.command import CLOCKS, add_clock, available, finish, parser, start
from benchmarks.harness import Clock, compare
from benchmarks.models import FUSED, MODELS, build_float, image_batch
from benchmarks.results import Report
from benchmarks.saved_bytes import saved_bytes, state_tensors


class TrainingStep:
    """A model, its optimizer and one batch; calling it is forward, backward and SGD."""

    def __init__(self, model: nn.Module, inputs: Tensor, labels: Tensor) -> None:
        self.model = model.train()
        self.inputs = inputs
        self.labels = labels
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def loss(self) -> Tensor:
        output = self.model(self.inputs)
        return F.cross_entropy(getattr(output, "logits", output), self.labels)

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()

    def saved_bytes(self) -> int:
        """Count the bytes saved for backward; parameters, buffers and the batch itself do not count."""
        return saved_bytes(self.loss, exclude=[self.inputs, self.labels, *state_tensors(self.model)])

    def void_because(self) -> str:
        """Say why the last step trained less than the float model does; empty if it trained everything."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        lost = sum(p.grad is None or not bool(torch.isfinite(p.grad).all()) for p in trained)
        return f"VOID: {lost} of {len(trained)} parameters have no finite gradient" if lost else ""


def measure(
    report: Report,
    adapters: Sequence[Adapter],
    name: str,
    batch: int,
    size: int,
    rounds: int,
    clock: Clock = CLOCKS["wall"],
) -> dict[str, TrainingStep]:
    """Add the rows of one model; return the measured steps by adapter."""
    net = build_float(name, size)
    images, labels = image_batch(batch, size)
    base, control = (TrainingStep(copy.deepcopy(net), images, labels) for _ in range(2))
    steps = {a.name: TrainingStep(a.quantize_model(net), images, labels) for a in adapters}
    calls: dict[str, Callable[[], object]] = {**steps}
    for step in steps.values():
        step()  # ranges exist from here on
    float_bytes = base.saved_bytes()
    saved = {adapter: step.saved_bytes() / float_bytes for adapter, step in steps.items()}
    comparison = compare(base, calls, rounds, control, clock=clock)
    case = MODELS[name]
    notes = {adapter: step.void_because() for adapter, step in steps.items()}
    report.add(name, comparison, saved, case.target, case.saved_target, notes)
    return steps


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    options = parser("Time and saved bytes of one QAT step, as ratios to the float model.", threads=2, rounds=15)
    options.add_argument("--models", nargs="+", choices=FUSED, default=FUSED)
    options.add_argument("--batch", type=int, default=32, help="images per step (%(default)s)")
    options.add_argument("--size", type=int, default=128, help="pixels per side (%(default)s)")
    add_clock(options)
    return options.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 1 if a control failed."""
    options = arguments(argv)
    report = start("qat_step", "step time over float, W8A8, every layer", "saved/float", options)
    adapters = available(options.adapters, report)
    for name in options.models:
        measure(report, adapters, name, options.batch, options.size, options.rounds, CLOCKS[options.clock])
    return finish(report, options.out)


if __name__ == "__main__":
    raise SystemExit(main())
