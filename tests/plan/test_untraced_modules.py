"""A plan puts quantizers where `quantize` put them, also into modules that only their default call can be traced in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import torchquant as tq


class Cache:
    """Nothing that torch.fx can hand on to a module."""


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, cache: Any = None) -> Tensor:
        return self.layer(x) if x.isfinite().all() else x  # a branch that no graph has


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * self.b(x)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.gate = Inner(), nn.LayerNorm(4), Gate()

    def forward(self, x: Tensor, cache: Any = None) -> Tensor:
        return self.gate(self.norm(self.inner(x, cache)))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = Block(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x, cache=Cache()))


def test_a_plan_of_an_example_is_applied_without_it() -> None:
    net, x = Decoder(), torch.randn(3, 4)
    model = tq.quantize(net, "w8a8", x)
    assert any(left.path == "block" and "cannot trace" in left.why for left in model.plan.floats)
    saved = tq.QuantPlan.from_dict(model.plan.to_dict())
    for plan in (model.plan, saved):
        assert list(tq.quantize(net, plan).state_dict()) == list(model.state_dict())
