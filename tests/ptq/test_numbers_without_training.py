"""Stages that choose scales and zero points: clip and opt_rtn in groups, hqq without data."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import torchquant as tq
from torchquant import ptq
from torchquant.ptq.functional.half_quadratic import half_quadratic_zero
from torchquant.quantizers import LSQPlusQuantizer
from torchquant.utils import weight_slots


def model_of(spec: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A layer of 10 inputs, so that groups of 4 end in a shorter one, with weights off the middle and outliers."""
    torch.manual_seed(seed)
    layer = nn.Linear(10, 6)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(6, 10).exp() - 0.5)
    weight = layer.weight.detach().clone()
    return tq.quantize(nn.Sequential(layer), [{"types": ["Linear"], "weight": spec}], torch.ones(1, 10)), weight


def error_after(spec: str, stages: list[str], seed: int = 0) -> tuple[float, str]:
    model, weight = model_of(spec, seed)
    steps = ptq.run(model, stages, []).steps
    return float((next(weight_slots(model)).seen().detach() - weight).abs().mean()), steps[0].note


@pytest.mark.parametrize("spec", ["lsqplus:3,offset/channel", "lsqplus:3,offset/group=4", "lsqplus:3,offset"])
def test_hqq_moves_real_zero_points(spec: str) -> None:
    assert error_after(spec, ["hqq", "nearest"])[0] < 0.99 * error_after(spec, ["nearest"])[0]


def test_hqq_of_one_layer_is_the_function() -> None:
    model, weight = model_of("lsqplus:3,offset/channel")
    tq.observe_weights(model)
    quantizer = next(weight_slots(model)).quantizer
    assert isinstance(quantizer, LSQPlusQuantizer)
    step, offset = (quantizer.numbers()[name].double()[:, None].clone() for name in ("step", "offset"))
    ptq.run(model, ["hqq", "nearest"], [])
    expected = half_quadratic_zero(weight.double(), step, -offset / step, 0, 7)
    torch.testing.assert_close(quantizer.numbers()["offset"].double()[:, None], -step * expected.zero)
    torch.testing.assert_close(next(weight_slots(model)).seen().double(), expected.rounded, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spec", ["affine:2/channel", "affine:2/group=4"])
def test_hqq_moves_whole_zero_points_only_where_it_helps(spec: str) -> None:
    after, note = error_after(spec, ["hqq", "nearest"])  # ranges that cover all weights
    assert (after, note) == (
        error_after(spec, ["nearest"])[0],
        "left as it is: no zero point has a smaller error than the present one",
    )
    model, _ = model_of(spec)
    (slot,) = weight_slots(model)
    assert slot.quantizer is not None
    weight = torch.rand(6, 10) * 3
    slot.set_weight(weight)
    tq.observe_weights(model)
    numbers = slot.quantizer.numbers()
    slot.quantizer.set_numbers(**{n: torch.full_like(v, -1.0 if "min" in n else 2.0) for n, v in numbers.items()})
    before = (slot.quantizer(weight) - weight).abs().mean()
    ptq.run(model, ["hqq", "nearest"], [])
    assert (slot.seen() - weight).abs().mean() < 0.9 * before
    assert {float(v) for n, ends in slot.quantizer.numbers().items() if "min" in n for v in ends} <= {-1.0, 0.0}


@pytest.mark.parametrize("spec", ["affine:4,symmetric=narrow/channel", "nf4/group=4", "esb:4,k=1"])
def test_hqq_says_where_no_zero_point_can_be_moved(spec: str) -> None:
    after, note = error_after(spec, ["hqq", "nearest"])
    assert after == error_after(spec, ["nearest"])[0]
    assert "has no zero point that can be moved; take affine:4, or lsqplus:4,offset" in note


@pytest.mark.parametrize("spec", ["affine:3/group=4", "esb:4,k=1/group=4", "affine:3/channel"])
@pytest.mark.parametrize("stage", ["clip", "opt_rtn"])
def test_ranges_of_groups_are_clipped_by_their_errors(stage: str, spec: str) -> None:
    model, weight = model_of(spec)
    x = torch.randn(50, 10) * torch.logspace(-1, 1, 10)
    whole = x.double().T @ x.double() / 50
    gram = whole if stage == "clip" else whole.diagonal().diag()
    ptq.run(model, [stage, "nearest"], [x], keep="always")
    (slot,) = weight_slots(model)
    assert slot.quantizer is not None
    found = slot.seen().detach() - weight
    size = 4 if "group" in spec else 10
    unclipped, _ = model_of(spec)
    tq.observe_weights(unclipped)
    (start,) = weight_slots(unclipped)
    assert start.quantizer is not None
    numbers, tried = {name: n.clone() for name, n in start.quantizer.numbers().items()}, []
    for step in range(20):
        ratio = 1 - 0.5 * step / 19
        start.quantizer.set_numbers(**{name: n * ratio for name, n in numbers.items()})
        tried.append((start.quantizer(weight) - weight).detach())
    for columns in torch.arange(10).split(size):
        own = gram[columns][:, columns]
        errors = torch.stack([((d[:, columns].double() @ own) * d[:, columns]).sum(1) for d in (found, *tried)])
        torch.testing.assert_close(errors[0], errors[1:].amin(0), rtol=1e-4, atol=1e-9)
