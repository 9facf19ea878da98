"""Stages that put something in float before or beside a layer: scales, rotations, low-rank products."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchquant as tq
from tests.ptq.nets import with_statistics
from tests.ptq.oracles import GOLDENS, TABLE, close, real
from tests.ptq.test_run import BATCHES, Net
from torchquant import ptq
from torchquant.errors import ConfigError
from torchquant.ptq.functional.orthogonal import hadamard
from torchquant.ptq.readers import same_values
from torchquant.qmodule import ChannelScale, Rotation
from torchquant.utils import weight_slots

SMOOTH, AWQ, LOW_RANK = GOLDENS["smoothquant"], GOLDENS["awq"], GOLDENS["low_rank"]
INPUT_STAGES = (
    *(pytest.param(s, marks=pytest.mark.slow) for s in ("smoothquant:steps=4", "awq:steps=4")),
    "rotate:seeds=2",
    pytest.param("split:ratio=0.3", marks=pytest.mark.slow),
)
SPECS = ("affine:3/channel", *(pytest.param(s, marks=pytest.mark.slow) for s in ("esb:4,k=1", "nvfp4", "twn", "nf4")))


class Attention(nn.Module):
    """Three layers read one value; two more read another, one of them as a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.gate, self.up, self.down = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16)
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        y = torch.softmax(self.q(x) @ self.k(x).mT, -1) @ self.v(x)
        y = self.norm(x + self.out(y))
        return y + self.down(torch.sigmoid(self.gate(y)) * self.up(y))


RULES = [{"types": ["Linear"], "weight": "affine:4/channel", "input": "affine:8"}]
DRAWN = torch.Generator().manual_seed(3)
TOKENS = list((torch.randn(12, 6, 16, generator=DRAWN) * torch.logspace(-1, 1.3, 16)).split(4))


@pytest.fixture(scope="module")
def attention() -> nn.Module:
    torch.manual_seed(0)
    return Attention().eval()


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return with_statistics(Net)


def one_layer(weight: Any, rule: dict[str, Any]) -> nn.Module:
    layer = nn.Linear(len(weight[0]), len(weight), bias=False)
    layer.weight.data = torch.tensor(weight, dtype=torch.float32)
    return tq.quantize(nn.Sequential(layer), [{"types": ["Linear"], **rule}], torch.zeros(1, len(weight[0])))


def lost(model: nn.Module, float_net: nn.Module, batches: list[Tensor]) -> float:
    with torch.no_grad():
        return float(sum((model(x) - float_net(x)).square().sum() for x in batches))


def test_readers_are_found_by_the_tensor_that_arrives(attention: nn.Module) -> None:
    model = tq.quantize(attention, RULES, TOKENS[0])
    layers = {slot.path: slot.module for slot in weight_slots(model)}
    found = same_values(layers, [lambda: model(TOKENS[0])])
    assert found == [["q", "k", "v"], ["out"], ["gate", "up"], ["down"]]
    report = ptq.run(model, ["smoothquant"], TOKENS)
    said = {step.path: (step.note, step.error) for step in report.steps}
    assert said["q"] == said["k"] == said["v"] != said["gate"] == said["up"]


@pytest.mark.parametrize("alpha", SMOOTH["alpha"])
def test_published_smoothing(alpha: str) -> None:
    x, golden = torch.tensor(SMOOTH["X"]), SMOOTH["alpha"][alpha]
    rule = {"weight": "affine:4,symmetric=narrow/channel", "input": "affine:4,symmetric=narrow"}
    model = one_layer(SMOOTH["W"], rule)
    report = ptq.run(model, [f"smoothquant:alpha={alpha}"], [x], keep="always")
    signal = (real(SMOOTH["X"]) @ real(SMOOTH["W"]).T).square().mean()
    close(report.steps[0].error * signal, golden["mse"], 1e-5)  # type: ignore[operator]
    close(report.steps[0].nearest_error * signal, SMOOTH["without"], 1e-5)  # type: ignore[operator]
    close(1.0 / model.get_submodule("0").input_transform[0].factor, golden["s"], 1e-6)
    close((model(x) - x @ torch.tensor(SMOOTH["W"]).T).square().mean(), golden["mse"], 1e-5)


def test_published_awq() -> None:
    x = torch.tensor(SMOOTH["X"])
    model = one_layer(SMOOTH["W"], {"weight": "affine:3,symmetric=narrow/channel"})
    report = ptq.run(model, ["awq:fold=False"], [x])
    assert report.steps[0].note == "rho 0.6"
    close((model(x) - x @ torch.tensor(SMOOTH["W"]).T).square().mean(), AWQ["best"]["mse"], 1e-4)


def test_published_low_rank_corrections() -> None:
    x, rule = torch.tensor(TABLE["X"]), {"weight": "affine:2,symmetric=narrow/channel"}
    signal = float((real(TABLE["X"]) @ real(LOW_RANK["W"]).T).square().sum())
    report = ptq.run(one_layer(LOW_RANK["W"], rule), ["nearest", "low_rank:rank=1,damp=0.0"], [x])
    close(report.steps[1].nearest_error * signal, LOW_RANK["data_error"]["none"], 1e-5)  # type: ignore[operator]
    close(report.steps[1].error * signal, LOW_RANK["data_error"]["whitened_svd"], 1e-5)  # type: ignore[operator]
    model = one_layer(LOW_RANK["W"], rule)
    ptq.run(model, ["low_rank:rank=1,rounds=5"], [x], keep="always")
    layer = model.get_submodule("0")
    close(
        (layer.float_weight_of(layer.weight) - torch.tensor(LOW_RANK["W"])).square().sum(),
        LOW_RANK["loftq_errors"][4],
        1e-5,
    )


def test_a_rotation_is_that_of_the_hadamard_matrix(attention: nn.Module) -> None:
    model = tq.quantize(attention, RULES, TOKENS[0])
    ptq.run(model, ["rotate"], TOKENS, keep="always")
    rotation = model.get_submodule("down").input_transform[0]
    x = torch.randn(2, 32)
    torch.testing.assert_close(rotation(x), (x * rotation.signs) @ hadamard(32).float().T / 32**0.5)


@pytest.mark.parametrize("weight", SPECS)
@pytest.mark.parametrize("stage", INPUT_STAGES)
def test_every_stage_for_inputs(net: nn.Module, stage: str, weight: str) -> None:
    rules = [{"types": ["Conv2d", "ConvTranspose2d", "Linear"], "weight": weight, "input": "affine:4", "fold_bn": True}]
    model, again = (tq.quantize(net, rules, BATCHES[0]) for _ in range(2))
    report = ptq.run(model, [stage, "gptq"], BATCHES)
    ours = [step for step in report.steps if step.stage == stage]
    assert len(ours) == 5
    assert all(step.error <= step.nearest_error for step in ours)  # type: ignore[operator]
    helped = any(step.error < step.nearest_error for step in ours)  # type: ignore[operator]
    is_folded = any("folded into" in step.note for step in ours)
    assert (any(slot.module.has_slots for slot in weight_slots(model)) or is_folded) == helped
    ptq.run(again, [stage, "gptq"], BATCHES)
    state = again.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    fresh = tq.quantize(net, rules, BATCHES[0])
    fresh.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(fresh.eval()(BATCHES[0]), model(BATCHES[0]))
    only = tq.quantize(net, rules, BATCHES[0])
    ptq.run(only, [stage], BATCHES)
    with tq.qmodule_state(only, tq.QModuleState.BYPASSED):
        torch.testing.assert_close(only(BATCHES[0]), net(BATCHES[0]), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_outliers_in_channels_no_longer_hurt(attention: nn.Module) -> None:
    def error(*stages: str) -> float:
        rules = [{"types": ["Linear"], "weight": "affine:8/channel", "input": "affine:4"}]
        model = tq.quantize(attention, rules, TOKENS[0])
        ptq.run(model, [*stages, "calibrate", "gptq"], TOKENS)
        return lost(model, attention, TOKENS)

    plain = error()
    assert error("smoothquant") < plain
    assert error("rotate") < plain
    assert error("rotate", "smoothquant") < plain


def test_low_rank_products_lower_the_error(attention: nn.Module) -> None:
    def error(*stages: str) -> float:
        model = tq.quantize(attention, [{"types": ["Linear"], "weight": "affine:3/channel"}], TOKENS[0])
        report = ptq.run(model, stages, TOKENS)
        assert not any("undone" in step.note for step in report.steps if step.stage.startswith("low_rank"))
        return lost(model, attention, TOKENS)

    assert error("gptq", "low_rank:rank=3") < 0.7 * error("gptq")
    assert error("gptq", "low_rank:rank=3", "bias_correction") < error("gptq", "bias_correction")
    assert error("svdquant:rank=3", "nearest") < error("nearest")


def test_a_bias_behind_a_low_rank_product_makes_the_means_equal() -> None:
    torch.manual_seed(0)
    x, net = torch.rand(50, 8), nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 6))
    model = tq.quantize(net, [{"types": ["Linear"], "weight": "affine:2/channel"}], x)
    ptq.run(model, ["nearest", "low_rank:rank=2", "bias_correction"], [x])
    torch.testing.assert_close(model(x).mean(0), net(x).mean(0), rtol=1e-5, atol=1e-6)


def test_ranges_are_observed_again(attention: nn.Module) -> None:
    model = tq.quantize(attention, RULES, TOKENS[0])
    report = ptq.run(model, ["calibrate", "rotate", "gptq"], TOKENS, keep="always")
    names = [step.stage for step in report.steps]
    assert names.count("calibrate") == 2
    assert names.index("rotate") < len(names) - 1 - names[::-1].index("calibrate") < names.index("gptq")
    with torch.no_grad():
        seen = model.get_submodule("q").input_transform(torch.cat(TOKENS))
    assert float(model.get_submodule("q").input_quantizer.observer.range_max) <= float(seen.max())
    with pytest.raises(ConfigError, match="what it reads has changed, and its range must be observed again; give"):
        ptq.run(tq.quantize(attention, RULES, TOKENS[0]), ["rotate"])
    weights = [{"types": ["Linear"], "weight": "affine:4/channel"}]
    model = tq.quantize(attention, weights, TOKENS[0])
    assert "blocks of 32, signs 0" in str(ptq.run(model, ["rotate", "nearest"]))


@pytest.mark.parametrize("n_done", [pytest.param(3, marks=pytest.mark.slow), 9])
def test_killed_and_resumed_is_not_killed(attention: nn.Module, n_done: int, tmp_path: Path) -> None:
    stages = ["rotate:seeds=2", "svdquant:rank=2", "gptq", "bias_correction"]
    whole = tq.quantize(attention, RULES, TOKENS[0])
    expected = ptq.run(whole, stages, TOKENS)
    seen: list[ptq.StepReport] = []

    def stop(step: ptq.StepReport) -> None:
        seen.append(step)
        if len(seen) == n_done + 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ptq.run(tq.quantize(attention, RULES, TOKENS[0]), stages, TOKENS, out=tmp_path, on_step=stop)
    model = tq.quantize(attention, RULES, TOKENS[0])
    report = ptq.run(model, stages, TOKENS, out=tmp_path)
    state = whole.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [(s.stage, s.path, s.error) for s in report.steps] == [(s.stage, s.path, s.error) for s in expected.steps]


def test_padding_tokens_are_left_out(attention: nn.Module) -> None:
    mask, found = torch.ones(4, 6, dtype=torch.long), []
    mask[:, 4:] = 0
    for last in (0.0, 90.0):
        x = TOKENS[0].clone()
        x[:, 4:] = last
        batch = {"x": x, "attention_mask": mask}
        model = tq.quantize(attention, [{"types": ["Linear"], "weight": "affine:3/channel"}], batch)
        steps = ptq.run(model, ["awq"], [batch]).steps
        found.append([(step.path, step.rows, step.note) for step in steps if step.path in "qkv"])
    assert found[0] == found[1]
    assert found[0][0][1] == 16


def test_block_formats_are_rotated_in_their_blocks() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(64, 8)), torch.randn(20, 64)
    for spec, block in (("mxfp4", 32), ("nvfp4", 16), ("affine:4/channel", 64), ("affine:4/group=32", 64)):
        model = tq.quantize(net, [{"types": ["Linear"], "weight": spec}], x)
        assert ptq.run(model, ["rotate"], [x], keep="always").steps[0].note == f"blocks of {block}, signs 0"


def test_a_transform_that_changes_the_function_is_taken_off() -> None:
    class Shifted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + 1.0)

    torch.manual_seed(0)
    net, x = nn.Sequential(Shifted(8, 6)), torch.randn(20, 8) * torch.logspace(-1, 1, 8)
    model = tq.quantize(net, [{"types": ["Shifted"], "weight": "affine:3/channel"}], x)
    before = copy.deepcopy(net[0].weight)
    report = ptq.run(model, ["rotate"], [x], keep="always")
    assert report.steps[0].note.endswith("taken off 0, whose forward does more than one product")
    assert torch.equal(model.get_submodule("0").weight, before)


def test_what_cannot_be_done_is_said(attention: nn.Module) -> None:
    model = tq.quantize(attention, RULES, TOKENS[0])
    for stages, words in (
        (["smoothquant:alpha=2.0", "gptq"], "alpha must be a number >= 0 and <= 1 or None, got 2.0"),
        (["rotate:block=1"], "block must be a whole number >= 2 or None, got 1"),
        (["svdquant:rank=0"], "rank must be a whole number >= 1, got 0"),
        (["gptq", "rotate"], "rotate changes structure, which gptq has settled before it"),
        (["magr", "rotate"], "rotate changes structure, and magr works on what comes of it; swap them"),
        (["low_rank", "svdquant"], "svdquant changes weights, which low_rank has settled before it"),
    ):
        with pytest.raises(ConfigError, match=words):
            ptq.run(model, stages, TOKENS)
    with pytest.raises(ConfigError, match="smoothquant looks at inputs and needs batches, got none"):
        ptq.run(model, ["smoothquant"])
    report = ptq.run(model, ["calibrate", "low_rank:rank=8"], TOKENS)
    assert "a product of rank 8 has as many values as its weight of 16 rows and 16 columns" in report.steps[1].note
    model = tq.quantize(attention, RULES, TOKENS[0])
    ptq.run(model, ["calibrate", "svdquant:rank=2", "low_rank:rank=2"], TOKENS, keep="always")
    assert isinstance(model.q.low_rank, nn.Module)
    mixed = nn.Sequential(nn.LSTM(8, 8), *[])
    lstm = tq.quantize(mixed, [{"types": ["LSTM"], "weight": "affine:4/channel"}], torch.randn(3, 2, 8))
    said = ptq.run(lstm, ["rotate", "low_rank:rank=1"], [torch.randn(3, 2, 8)]).steps
    assert said[0].note == "left as it is: a transform is for layers with one weight"
    assert "a low-rank product is for layers with one weight" in said[-1].note
    assert {Rotation.named_by, ChannelScale.named_by} == {"signs", "factor"}


def test_splitting_channels_with_large_weights_lowers_the_error() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 6)), [torch.randn(40, 16) for _ in range(2)]
    with torch.no_grad():
        net[0].weight[:, 3] *= 6
        net[2].weight[1, 5] *= 9
    rules = [{"types": ["Linear"], "weight": "affine:4", "input": "affine:8"}]

    def run(*stages: str) -> tuple[nn.Module, ptq.PTQReport]:
        model = tq.quantize(net, rules, x[0])
        return model, ptq.run(model, [*stages, "calibrate", "gptq"], x)

    split, report = run("split:ratio=0.2")
    assert [(step.path, step.note) for step in report.steps[:2]] == [
        ("0", "4 of 16 channels split"),
        ("2", "3 of 12 channels split"),
    ]
    assert all(step.gain is not None and step.gain > 1.0 for step in report.steps[:2])
    assert lost(split, net, x) < 0.7 * lost(run()[0], net, x)
    with tq.qmodule_state(split, tq.QModuleState.BYPASSED):
        assert split.get_submodule("0").weight.shape == (12, 20)
    only = tq.quantize(net, rules, x[0])
    ptq.run(only, ["split:ratio=0.2"], x)
    with tq.qmodule_state(only, tq.QModuleState.BYPASSED):
        torch.testing.assert_close(only(x[0]), net(x[0]), rtol=1e-5, atol=1e-5)
    fresh = tq.quantize(net, rules, x[0])
    fresh.load_state_dict(split.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh.eval()(x[0]), split(x[0]))
