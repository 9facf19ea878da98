"""Measure fake-quantization forward and backward, counted in passes over memory.

python -m benchmarks.fake_quant --out fake_quant.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from benchmarks.adapters.base import CASES, WEIGHT, Adapter
from benchmarks.command import available, finish, parser, start
from benchmarks.harness import compare, memory_pass
from benchmarks.results import Report
from benchmarks.saved_bytes import saved_bytes, state_tensors

TARGET = 15.0
SIZES = {"1M": 1 << 20, "16M": 1 << 24}
WEIGHT_SHAPE = (512, 512, 3, 3)
SAMPLE_S = 0.05


def forward_backward(module: nn.Module, x: Tensor) -> Callable[[], object]:
    """Make a call: forward and backward of `module` at x, including gradients of its parameters."""
    inputs = list({id(t): t for t in (x, *module.parameters())}.values())
    grad = torch.randn_like(x)

    def call() -> object:
        return torch.autograd.grad(module(x), inputs, grad)

    return call


def measure(report: Report, adapters: Sequence[Adapter], case: str, size: str, layer: nn.Module, rounds: int) -> None:
    """Add the rows of one case at one size. `layer`: its weight is the tensor to quantize."""
    x = layer.weight
    modules = {adapter.name: adapter.fake_quant(case, layer) for adapter in adapters}
    calls: dict[str, Callable[[], object]] = {}
    saved: dict[str, float] = {}
    for name, module in modules.items():
        if module is None:
            continue
        calls[name] = forward_backward(module, x)
        calls[name]()  # the range exists from here on
        counted = saved_bytes(lambda module=module: module(x), exclude=[x, *state_tensors(module)])
        saved[name] = counted / x.numel()
    if calls:
        comparison = compare(memory_pass(x.numel()), calls, rounds, memory_pass(x.numel()), SAMPLE_S)
        report.add(f"{case}, {size}", comparison, saved, TARGET)


def tensor_holder(case: str, numel: int) -> nn.Module:
    """Make a layer whose weight is the tensor of the case: a convolution for WEIGHT, else (1, numel)."""
    torch.manual_seed(0)
    if case == WEIGHT:
        return nn.Conv2d(*WEIGHT_SHAPE[1::-1], WEIGHT_SHAPE[2:], bias=False)
    layer = nn.Linear(1, 1, bias=False)
    layer.weight = nn.Parameter(torch.randn(numel))
    return layer


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    options = parser("Fake-quantization forward + backward in memory passes.", threads=1, rounds=15)
    options.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES), help="elements of activations")
    options.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    return options.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 1 if a control failed."""
    options = arguments(argv)
    report = start("fake_quant", "memory passes for forward + backward", "saved B/el", options)
    adapters = available(options.adapters, report)
    for case in options.cases:
        for size in ["x".join(map(str, WEIGHT_SHAPE))] if case == WEIGHT else options.sizes:
            measure(report, adapters, case, size, tensor_holder(case, SIZES.get(size, 1)), options.rounds)
    return finish(report, options.out)


if __name__ == "__main__":
    raise SystemExit(main())
