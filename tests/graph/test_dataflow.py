"""Which site reads which: through operators, float modules, views, branches, loops and forwards that are not traced."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from torchquant.graph.dataflow import site_edges
from torchquant.plan import quantize
from torchquant.utils import qmodules

WEIGHTS = [{"weight": "affine:8"}]


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))
        self.norm = nn.LayerNorm(4)


class Branches(Parts):
    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.a(x)).softmax(-1)
        left, right = self.b(y), self.c(y[:, [1, 0, 2, 3]])
        joined = torch.cat([left, right], 1)[:, :4]
        return self.d(joined.clone().add_(x))


class Loops(Parts):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(int(x.abs().sum() > 0) + 1):  # not traced
            x = self.b(self.a(x))
        return self.d(self.c(weight_free(x)))


def weight_free(x: Tensor) -> Tensor:
    return x.new_zeros(x.shape)


def test_values_are_followed_through_operators_and_float_modules() -> None:
    model = quantize(Branches(), WEIGHTS, torch.randn(2, 4))
    assert set(site_edges(model, torch.randn(2, 4))) == {("a", "b"), ("a", "c"), ("b", "d"), ("c", "d")}


@pytest.mark.filterwarnings("ignore::torchquant.errors.StaysFloatWarning")
def test_a_forward_that_is_not_traced_is_followed_too() -> None:
    model = quantize(Loops(), WEIGHTS, torch.randn(2, 4))
    edges = site_edges(model, torch.randn(2, 4))
    assert {("a", "b"), ("b", "a"), ("c", "d")} <= set(edges)


def test_values_that_are_written_into_a_tensor_are_followed() -> None:
    class Fills(Parts):
        def forward(self, x: Tensor) -> Tensor:
            y = torch.zeros(2, 8)
            y[:, :4] = self.a(x)
            y[:, 4:] = self.b(x)
            return self.c(y[:, 2:6])

    model = quantize(Fills(), WEIGHTS, torch.randn(2, 4))
    assert set(site_edges(model, torch.randn(2, 4))) == {("a", "c"), ("b", "c")}


def test_added_operators_are_sites_of_the_graph() -> None:
    class Adds(Parts):
        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.b(y + self.c(y))

    model = quantize(Adds(), "w8a8", torch.randn(2, 4))
    edges = site_edges(model, torch.randn(2, 4))
    assert {("a", "c"), ("a", "add"), ("c", "add"), ("add", "b")} <= set(edges)
    assert {name for edge in edges for name in edge} <= {path for path, _ in qmodules(model)}


def test_the_model_is_left_as_it_was() -> None:
    model = quantize(Branches(), "w8a8", torch.randn(2, 4)).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x = torch.randn(2, 4)
    given = x.clone()
    site_edges(model, x)
    assert model.training
    assert torch.equal(x, given)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for _, module in qmodules(model))
