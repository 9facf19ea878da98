"""How much of a model is quantized: the share that a plan tells, the warning below 95 %, `strict`."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchquant as tq
from torchquant.errors import ConfigError, StaysFloatWarning
from torchquant.plan import RULE_SETS

pytestmark = pytest.mark.filterwarnings("error::torchquant.errors.StaysFloatWarning")
X = torch.randn(2, 5, 8)
ALL = [{"weight": "affine:8/channel", "input": "affine:8", "output": "affine:8"}]


class Mixed(nn.Module):
    """256 of 1,088 weights in a Linear, 512 in an LSTM, 320 raw; multiply-adds of 5 steps: 1280, 2560, 1600."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.lstm = nn.Linear(8, 32, bias=False), nn.LSTM(8, 8, batch_first=True)
        self.raw = nn.Parameter(torch.randn(8, 40))

    def forward(self, x: Tensor) -> Tensor:
        y = self.lstm(x)[0]
        return F.linear(self.linear(y), self.raw.view(10, 32))


class Attention(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(n, 3 * n)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v) + (q @ k.transpose(1, 2)) @ v


def test_the_shares_are_those_counted_by_hand() -> None:
    with pytest.warns(
        StaysFloatWarning, match=r"leaves part of Mixed float, 29\.4 % of the weights and 29\.4 % of the"
    ):
        model = tq.quantize(Mixed().eval(), "w8a8", X)
    coverage = model.plan.coverage
    assert (coverage.weights, coverage.quantized_weights) == (1088, 768)
    assert (coverage.macs, coverage.quantized_macs) == (5440, 3840)
    assert {(p.path, p.what, p.weights, p.macs) for p in coverage.parts} == {
        ("raw", "Mixed.raw", 320, 0),
        ("", "linear", 0, 1600),
    }
    assert str(model.plan).endswith("quantized: 70.6 % of 1,088 weights, 70.6 % of 5,440 multiply-adds")
    assert "Mixed.raw" in str(coverage)


def test_a_saved_plan_holds_it_and_a_changed_one_does_not() -> None:
    plan = tq.QuantPlan.from_rules("w8a8", Mixed(), X)
    loaded = tq.QuantPlan.from_dict(plan.to_dict())
    assert loaded.coverage == plan.coverage
    assert str(loaded) == str(plan)
    assert plan.replace("linear", weight=None).coverage is None
    for bad in ({}, {"parts": [{}]}, {"weights": 1, "parts": []}, 3):
        with pytest.raises(ConfigError, match="coverage must be the coverage as a saved plan holds it"):
            tq.QuantPlan.from_dict({**plan.to_dict(), "coverage": bad})


def test_without_an_example_only_weights_are_known() -> None:
    coverage = tq.QuantPlan.from_rules("w8a8", Mixed()).coverage
    assert coverage is not None
    assert (coverage.weights, coverage.macs, coverage.mac_share) == (1088, None, None)
    assert coverage.summary() == "quantized: 70.6 % of 1,088 weights"


@pytest.mark.parametrize("inplace", [False, True])
def test_strict_raises_and_leaves_the_model_as_it_was(inplace: bool) -> None:
    net = Mixed().eval()
    state, y = copy.deepcopy(net.state_dict()), net(X)
    with pytest.raises(ConfigError, match=r"raw \(Mixed.raw, 29.4 % of the weights\)"):
        tq.quantize(net, "w8a8", X, inplace=inplace, strict=True)
    assert not any(isinstance(module, tq.QModule) for module in net.modules())
    assert net.state_dict().keys() == state.keys()
    assert torch.equal(net(X), y)
    with pytest.raises(ConfigError, match="nothing to quantize"):
        tq.quantize(nn.ReLU(), "w8a8", torch.ones(1, 2), strict=True)


def test_a_ready_set_that_passes_a_kind_of_layer_over_warns() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    recurrent = nn.ModuleDict({"a": net, "lstm": nn.LSTM(8, 8)})
    with pytest.warns(StaysFloatWarning, match=r"lstm \(LSTM, 88.9 % of the weights\): no rule gives it a quantizer"):
        tq.quantize(recurrent, "int8-ort")


@pytest.mark.parametrize(
    "rules",
    [
        [*ALL, {"names": ["0"], "skip": True}],
        [{**ALL[0], "types": ["LSTM", "LSTMCell", "Embedding", "GRU", "Linear"], "position": "last"}],
        [{"output": "affine:8"}],
        [{"weight": "affine:8/channel"}],
    ],
)
def test_what_the_rules_of_a_user_leave_float_is_counted_but_no_reason_to_warn(rules: Any) -> None:
    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    coverage = tq.quantize(net, rules, X, strict=True).plan.coverage
    assert coverage.weights == 512
    assert coverage.quantized_weights == {"skip": 256}.get("", coverage.quantized_weights)
    assert coverage.weight_share == coverage.mac_share
    assert all(part.is_wanted for part in coverage.parts)


def test_products_of_activations_count_where_both_are_quantized() -> None:
    n, length = 8, 5
    coverage = tq.quantize(Attention(n).eval(), "w8a8", X).plan.coverage
    assert coverage.macs == 3 * n * n * length + 4 * length * length * n
    assert coverage.mac_share == 1
    coverage = tq.quantize(Attention(n).eval(), [{"types": ["Linear"], "weight": "affine:8"}], X).plan.coverage
    assert coverage.quantized_macs == 3 * n * n * length
    with pytest.warns(StaysFloatWarning, match="which no quantizer sees"):
        inside = tq.quantize(Inside(), "w8a8", X).plan.coverage
    assert inside.macs == inside.quantized_macs + 2 * length * length * n


def test_counting_moves_nothing_that_a_weight_is_computed_with() -> None:
    net = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 8)).train()
    model = tq.quantize(net, "w8a8", X)
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), model[0].held.buffers(), strict=True))


class Inside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


def test_a_tied_weight_counts_once_and_is_float_if_one_of_its_places_is() -> None:
    table, head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
    head.weight = table.weight
    net = nn.Sequential(table, nn.Linear(8, 8), head)
    tokens = torch.tensor([[1, 2, 3]])
    coverage = tq.QuantPlan.from_rules("w8a8", net, tokens).coverage
    assert coverage is not None
    assert (coverage.weights, coverage.quantized_weights) == (224, 224)
    coverage = tq.QuantPlan.from_rules([{"types": ["Linear"], "weight": "affine:8"}], net, tokens).coverage
    assert coverage is not None
    assert coverage.quantized_weights == 64


def test_a_forward_that_cannot_be_followed_is_counted_whole() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.w = nn.Linear(8, 8), nn.Parameter(torch.randn(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) @ self.w if bool(x.sum() > -1e9) else x

    with pytest.warns(StaysFloatWarning, match=r"w \(Branch.w, 50.0 % of the weights\)"):
        coverage = tq.quantize(Branch(), "w8a8", X).plan.coverage
    assert (coverage.macs, coverage.quantized_macs) == (640, 320)


@pytest.mark.parametrize("rules", RULE_SETS)
def test_ready_sets_do_not_warn_where_all_is_quantized(rules: str) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net.append(nn.Linear(8, 4))
    plan = tq.quantize(net.eval(), rules, torch.randn(2, 3, 8, 8), strict=True).plan
    assert plan.coverage.weight_share == plan.coverage.mac_share == 1
    assert plan.coverage.parts == ()


def test_the_warning_names_the_line_of_the_caller_and_can_be_ignored() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tq.quantize(Mixed().eval(), "w8a8", X)
    assert [(w.category, w.filename) for w in caught] == [(StaysFloatWarning, __file__)]
