"""Every registered stage on what is hard for some: few rows, dead inputs, rows of zeros, bfloat16, no calibration."""

from __future__ import annotations

import copy
import functools
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchquant as tq
from torchquant import ptq
from torchquant.errors import ConfigError, UnobservedRangeError
from torchquant.utils import weight_slots

BRIEF = {
    "adaround": {"steps": 3},
    "autoround": {"steps": 3},
    "awq": {"steps": 2},
    "block_ap": {"steps": 2},
    "brecq": {"steps": 2, "activation_steps": 1},
    "let": {"steps": 2},
    "low_rank": {"rank": 1},
    "magr": {"steps": 3},
    "omniquant": {"steps": 2},
    "qdrop": {"steps": 2},
    "smoothquant": {"steps": 2},
    "step_tuning": {"steps": 2},
    "svdquant": {"rank": 1},
}
FOLLOWS_A_ROUNDING = ("bias", "ranges")
HARD = ("bfloat16", "one sample", "dead input", "rows of zeros", "only zeros")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.act = nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()
        self.middle, self.head = nn.Linear(16, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.middle(self.act(self.norm(self.first(x))).flatten(1))))


def hard(cases: tuple[str, ...]) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    net, batches = Net().eval(), list(torch.randn(8, 2, 4, 4).split(4))
    with torch.no_grad():
        if "dead input" in cases:
            net.norm.weight[1], net.norm.bias[1], net.middle.bias[2] = 0.0, 0.0, -90.0
            for x in batches:
                x[:, 1] = 0.0
        if "rows of zeros" in cases:
            for layer in (net.first, net.middle, net.head):
                layer.weight[2] = 0.0
        if "only zeros" in cases:
            batches = [torch.zeros_like(x) for x in batches]
    if "one sample" in cases:
        batches = [batches[0][:1]]
    if "bfloat16" in cases:
        return net.bfloat16(), [x.bfloat16() for x in batches]
    return net, batches


def stages_with(name: str, calibrates: bool = True) -> list[Any]:
    kind, own = ptq.PTQ[name], {name: BRIEF.get(name, {})}
    if name in ("step_tuning", "analytic_bias") or kind.changes == "bias":
        return ["nearest", own]
    if kind.changes in ("roundings", "ranges"):
        return [own, "nearest"] if kind.changes == "ranges" else [own]
    return [own, *(["calibrate"] if calibrates else []), "nearest"]


@functools.cache
def made(cases: tuple[str, ...], weight: str, calibrates: bool) -> tuple[nn.Module, list[Tensor]]:
    net, batches = hard(cases)
    rules = [{"types": ["Conv2d", "Linear"], "weight": weight, "output": "affine:8", "fold_bn": True}]
    model = tq.quantize(net, rules, batches[0])
    if calibrates:
        tq.calibrate(model, batches, with_targets=False)
    return model, batches


def quantized(
    cases: tuple[str, ...] = (), weight: str = "affine:4/channel", calibrates: bool = True
) -> tuple[nn.Module, list[Tensor]]:
    return copy.deepcopy(made(cases, weight, calibrates))


def check(name: str, cases: tuple[str, ...], weight: str) -> None:
    """What comes is on the grid and finite; a layer that is not rounded is one of which the report says why."""
    model, batches = quantized(cases, weight)
    report = ptq.run(model, stages_with(name), batches)
    said = {step.path for step in report.steps if "left as it is" in step.note}
    for slot in weight_slots(model):
        quantizer = slot.quantizer
        assert quantizer is not None
        levels = quantizer(slot.seen())
        assert quantizer.is_pinned or slot.label in said, slot.label
        assert torch.equal(quantizer.decode(quantizer.encode(slot.seen()), levels.dtype), levels), slot.label
        assert bool(levels.isfinite().all()), slot.label
    for step in report.steps:
        if step.error is not None and ptq.PTQ[name].changes not in ("weights", "structure"):
            assert step.nearest_error is not None
            assert step.error <= step.nearest_error * (1 + 1e-6), step
    with torch.no_grad():
        assert bool(model.eval()(batches[0]).isfinite().all())


@pytest.mark.parametrize("name", ptq.PTQ)
def test_all_that_is_hard_at_once(name: str) -> None:
    check(name, HARD[:4], "affine:4/channel")


@pytest.mark.slow
@pytest.mark.parametrize("weight", ["affine:4/channel", "esb:4,k=1/channel", "affine:3/group=3", "nvfp4", "twn", "nf4"])
@pytest.mark.parametrize("case", HARD)
@pytest.mark.parametrize("name", ptq.PTQ)
def test_what_is_hard_by_itself(name: str, case: str, weight: str) -> None:
    check(name, (case,), weight)


@pytest.mark.parametrize("name", ["gptq", "brecq"])
def test_without_ranges_nothing_is_changed(name: str) -> None:
    model, batches = quantized(calibrates=False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UnobservedRangeError, match="first: its output has no range yet.*put the stage calibrate"):
        ptq.run(model, [{name: BRIEF.get(name, {})}], batches)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    report = ptq.run(model, ["calibrate", "gptq"], batches)
    assert report.steps[-1].path == "head"


@pytest.mark.parametrize("name", ptq.PTQ)
def test_options_without_a_meaning_are_refused(name: str) -> None:
    """Numbers that are too small, and those that are none, are refused by name before anything runs."""
    options = {
        "steps": 0,
        "rounds": -1,
        "sweeps": 0,
        "rate": 0.0,
        "activation_rate": -1.0,
        "scale_rate": float("inf"),
        "damp": -0.1,
        "block": 0,
        "rank": 0,
        "seeds": 0,
        "drop": 1.0,
        "alpha": -0.5,
        "weight": float("inf"),
        "deviations": float("inf"),
        "batches": 0,
        "bias_weight": -1.0,
    }
    for option in options.keys() & inspect.signature(ptq.PTQ[name]).parameters.keys():
        with pytest.raises(ConfigError, match=f": {option} must be a (whole )?number"):
            ptq.make_stage({name: {option: options[option]}})


@pytest.mark.parametrize(
    ("stages", "more", "words"),
    [
        (["gptq"], {"names": ["layers.*"]}, r"names: no quantized weight is called 'layers.\*'; there are first"),
        (["gptq"], {"skip": ["lm_head"]}, "skip: no quantized weight is called 'lm_head'; there are first, middle"),
        (["brecq"], {"blocks": ["model.layers.*"]}, "blocks: no module with layers is called 'model.layers"),
        (["autoround:unit=block,match=layer"], {}, "match='layer' is for unit='layer'"),
    ],
)
def test_a_recipe_of_another_model(stages: list[str], more: dict[str, Any], words: str) -> None:
    model, batches = quantized()
    with pytest.raises(ConfigError, match=words):
        ptq.run(model, stages, batches, **more)


def test_rounds_of_a_low_rank_product_do_not_lose_a_rounding() -> None:
    (model, batches), (expected, _) = quantized(), quantized()
    report = ptq.run(model, ["gptq", "low_rank:rank=1,rounds=2"], batches)
    said = [step.note for step in report.steps if "rounds" in step.stage]
    assert len(said) == 3
    assert all("left as it is: its weight is rounded already, which rounds > 0 would lose" in note for note in said)
    ptq.run(expected, ["gptq"], batches)
    assert torch.equal(model.head.weight, expected.head.weight)


def test_a_change_that_is_not_finite_leaves_the_layer_as_it_is() -> None:
    @ptq.PTQ.register("broken")
    class Broken(ptq.WeightChange):
        def change(self, layer: ptq.Layer, data: ptq.LayerData) -> Tensor:
            return layer.weight * float("nan")

    try:
        model, batches = quantized()
        before = model.head.weight.clone()
        report = ptq.run(model, ["broken"], batches)
    finally:
        ptq.PTQ.unregister("broken")
    assert report.steps[-1].note == "left as it is: its new weight has NaN or Inf"
    assert torch.equal(model.head.weight, before)


def one_layer(weight: str = "affine:3/channel") -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    x = torch.randn(40, 8)
    return tq.quantize(nn.Sequential(nn.Linear(8, 6)), [{"types": ["Linear"], "weight": weight}], x), [x]


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (["magr", "gptq"], ["magr", "calibrate", "gptq"]),
        (["magr", "nearest"], ["magr", "brecq:steps=1,rate=1e-6"]),
        (["magr", "clip", "nearest"], ["magr", "calibrate", "clip", "brecq:steps=1,rate=1e-6"]),
    ],
)
def test_a_later_pass_starts_from_what_an_earlier_one_left(one: list[str], two: list[str], tmp_path: Path) -> None:
    states = []
    for stages in (one, two):
        model, batches = one_layer()
        ptq.run(model, stages, batches)
        states.append(model.state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    model, batches = one_layer()
    seen: list[ptq.StepReport] = []

    def stop(step: ptq.StepReport) -> None:
        seen.append(step)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ptq.run(model, two, batches, out=tmp_path, on_step=stop)
    model, batches = one_layer()
    ptq.run(model, two, batches, out=tmp_path)
    assert all(torch.equal(value, states[1][key]) for key, value in model.state_dict().items())


def test_what_an_earlier_pass_has_not_rounded_can_still_be_clipped() -> None:
    model, batches = one_layer("affine:2/channel")
    report = ptq.run(model, ["clip", "omniquant:steps=2", "nearest"], batches)
    assert "rounded already" not in report.steps[1].note


@pytest.mark.parametrize("weight", ["twn/channel", "lsq:3/channel", "esb:3,k=0/channel"])
def test_codes_stay_when_scales_change_again_and_again(weight: str) -> None:
    model, batches = one_layer(weight)
    ptq.run(model, ["gptq"], batches)
    (slot,) = weight_slots(model)
    assert slot.quantizer is not None
    codes = slot.quantizer.encode(slot.seen())
    model, batches = one_layer(weight)
    ptq.run(model, ["gptq", "refit", "refit", "step_tuning:steps=3", "refit"], batches)
    (slot,) = weight_slots(model)
    assert slot.quantizer is not None
    assert torch.equal(slot.quantizer.encode(slot.seen()), codes)
