"""Schedules, aids of training, errors, sizes and files work on the weights of every QModule, not on QWrappers alone."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import torchquant as tq
from torchquant.analysis import layer_errors, weight_bytes
from torchquant.compat.autoqnn.utils import stats_quantized_sparsity
from torchquant.deploy import export_onnx, load_packed, run_onnx, save_packed
from torchquant.qmodule import QModuleState
from torchquant.training import (
    BitSchedule,
    GradientSchedule,
    OscillationTracker,
    QuantizationSchedule,
    adapt_ewgs,
    dampening_loss,
)
from torchquant.utils import weight_slots

TOKENS = torch.arange(12).view(4, 3)


class Network(nn.Module):
    """A table, an attention, an LSTM, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.lstm = nn.LSTM(8, 6, batch_first=True)
        self.head = nn.Linear(6, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        x = self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.lstm(x)[0])


SEVERAL = ["attention.in_proj_weight", "attention.out_proj.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0"]
WEIGHTS = ["table", *SEVERAL, "head"]
"""As tables call them, in the order of the model."""


def network(weight: str = "affine:4,symmetric=narrow/channel") -> nn.Module:
    torch.manual_seed(0)
    rules = [{"weight": weight, "output": "affine:8", "input": "affine:8"}]
    model = tq.quantize(Network(), rules, TOKENS)
    with tq.qmodule_state(model, QModuleState.CALIBRATION), torch.no_grad():
        model(TOKENS)
    tq.set_qmodule_state(model, QModuleState.QUANT_AWARE_TRAIN)
    return model


def widths(model: nn.Module) -> dict[str, int]:
    return {slot.label: slot.quantizer.n_bits for slot in weight_slots(model) if slot.quantizer is not None}


def test_bits_of_every_weight_go_down() -> None:
    model = network()
    schedule = BitSchedule(model, {0: 8, 1: 3}, "affine:{n},symmetric=narrow/channel", acts="affine:{n}")
    assert widths(model) == dict.fromkeys(WEIGHTS, 8)
    model(TOKENS)
    schedule.step()
    assert widths(model) == dict.fromkeys(WEIGHTS, 3)
    model(TOKENS)
    for slot in weight_slots(model):
        assert slot.quantizer is not None
        assert max(len(row.unique()) for row in slot.quantizer(slot.seen().detach())) <= 2**3


def test_states_and_estimators_of_every_weight_follow_their_schedules() -> None:
    model = network()
    GradientSchedule(model, "pwl", rho=0.25)
    assert {slot.quantizer.gradient.rho for slot in weight_slots(model)} == {0.25}  # type: ignore[union-attr]
    before = model.lstm.weight_ih_l0.detach().clone()
    schedule = QuantizationSchedule(model, quant_start_step=1, freeze_observer_step=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for state in (QModuleState.CALIBRATION, QModuleState.QUANT_AWARE_TRAIN, QModuleState.QUANT_EVAL):
        assert {module.state for _, module in tq.utils.qmodules(model)} == {state}
        optimizer.zero_grad()
        model(TOKENS).square().sum().backward()
        optimizer.step()
        schedule.step()
    assert not torch.equal(model.lstm.weight_ih_l0, before)


def test_every_weight_is_watched_and_frozen() -> None:
    model = network()
    tracker = OscillationTracker(model, freeze_above=0.0, momentum=1.0)
    assert [entry.path for entry in tracker.report()] == WEIGHTS
    assert [entry.n_weights for entry in tracker.report()] == [slot.weight.numel() for slot in weight_slots(model)]
    codes = []
    for layer in tracker.layers:
        layer.frozen.fill_(True)
        codes.append(layer.codes.clone())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(TOKENS).square().sum().backward()
        optimizer.step()
        tracker.step()
    for slot, expected in zip(weight_slots(model), codes, strict=True):
        assert slot.quantizer is not None
        assert torch.equal(slot.quantizer.encode(slot.seen()), expected), slot.label
    assert {entry.frozen for entry in tracker.report()} == {1.0}


def test_the_state_of_a_tracker_of_0_1_loads() -> None:
    """It has the weights of QWrappers alone: here the last one."""
    model = network()
    tracker = OscillationTracker(model)
    tracker.layers[-1].frequency.fill_(0.5)
    state = tracker.state_dict()
    own = {key.replace("layers.5.", "layers.0."): value for key, value in state.items() if key.startswith("layers.5.")}
    again = OscillationTracker(model)
    again.load_state_dict({**own, "n_steps": torch.tensor(7)})
    assert [entry.oscillating for entry in again.report()] == [0.0] * 5 + [1.0]
    assert int(again.n_steps) == 7
    other = OscillationTracker(model)
    other.load_state_dict(again.state_dict())
    assert other.report() == again.report()


def test_dampening_draws_every_weight() -> None:
    model = network()
    dampening_loss(model, 1.0).backward()
    for slot in weight_slots(model):
        assert slot.quantizer is not None
        w = slot.seen().detach()
        expected = slot.stored_layout(2 * (w - slot.quantizer(w)))
        assert slot.weight.grad is not None
        torch.testing.assert_close(slot.weight.grad, expected.detach(), rtol=0, atol=1e-6)


def test_delta_of_every_weight_is_set() -> None:
    model = network("ewgs:3")
    deltas = adapt_ewgs(model, lambda: model(TOKENS).pow(4).mean(), generator=torch.Generator().manual_seed(0))
    expected = {slot.state_prefix.removesuffix(".") for slot in weight_slots(model)}
    assert expected <= deltas.keys()
    assert all(math.isfinite(delta) for delta in deltas.values())
    assert sum(deltas[path] > 0 for path in expected) >= 3


def test_errors_of_every_weight() -> None:
    model = network()
    found = {error.path: error for error in layer_errors(model, TOKENS)}
    errors = {f"{path}.{name}": error for path, layer in found.items() for name, error in layer.weights.items()}
    assert errors.keys() == {slot.key for slot in weight_slots(model)}
    for slot in weight_slots(model):
        assert slot.quantizer is not None
        w = slot.seen().detach().double()
        noise = (w - slot.quantizer(slot.seen().detach()).double()).square().sum()
        assert errors[slot.key].sqnr_db == pytest.approx(float(10 * torch.log10(w.square().sum() / noise)))
    lstm = found["lstm"]
    assert lstm.weight.sqnr_db == min(error.sqnr_db for error in lstm.weights.values())
    assert list(lstm.to_dict()) == ["path", "weight", "output", "weights"]
    assert list(found["table"].to_dict()) == ["path", "weight", "output"]
    assert lstm.output is not None
    assert found["attention"].output is not None


def test_bytes_and_zeros_of_every_weight() -> None:
    model = network()
    assert [(site.path, site.n_bits) for site in weight_bytes(model)] == [(path, 4) for path in WEIGHTS]
    zeros = stats_quantized_sparsity(model)
    assert list(zeros) == [slot.key for slot in weight_slots(model)]
    for slot in weight_slots(model):
        assert slot.quantizer is not None
        assert zeros[slot.key] == pytest.approx(float((slot.quantizer(slot.seen()) == 0).double().mean()))


def test_a_file_has_every_weight(tmp_path: Path) -> None:
    model = network().eval()
    tq.set_qmodule_state(model, QModuleState.QUANT_EVAL)
    expected = model(TOKENS)
    loaded = load_packed(save_packed(model, tmp_path / "model.safetensors"), copy.deepcopy(model))
    assert torch.equal(loaded(TOKENS), expected)
    assert {type(slot.quantizer).__name__ for slot in weight_slots(loaded)} == {"CodesQuantizer"}
    path = export_onnx(model, tmp_path / "model.onnx", TOKENS)
    found = run_onnx(path, TOKENS)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05)


def test_weights_that_hooks_compute_are_counted_too() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    with pytest.warns(FutureWarning, match="weight_norm"):
        net = nn.Sequential(nn.utils.weight_norm(nn.GRU(4, 3), "weight_hh_l0"))
    x = torch.randn(5, 2, 4)
    sizes = {site.path: site.total for site in weight_bytes(net)}
    assert sizes == {"0.weight_ih_l0": 4 * 9 * 4, "0.weight_hh_l0": 4 * 9 * 3}
    assert [site.total for site in weight_bytes(layer)] == [4 * 16]
    model = tq.quantize(net, [{"weight": "affine:4/channel"}], x)
    assert sum(site.weight_bytes for site in model.plan.cost(net, x)) == 9 * 4 // 2 + 14 + 2 * 9 * (4 + 1)
