"""Absorption, ranges, biases and inputs without data: against what data give."""

import copy

import pytest
import torch
from torch import Tensor, nn

import torchquant as tq
from tests.ptq.test_equalization import X, bypassed, mobile, quantized, sqnr
from torchquant.ptq.folding import fold_for_good, statistics_of
from torchquant.ptq.functional.without_data import statistics_error
from torchquant.ptq.moments import MomentsRun
from torchquant.qmodule import QWrapper


def pair(padding: int = 0, shift: float = 4.0) -> nn.Sequential:
    """Make two convolutions; the batch norm between has high biases, and statistics that are those of its input."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=padding), nn.ReLU()
    )
    net[1].weight.data.uniform_(0.5, 1.0)
    net[1].bias.data.uniform_(shift, shift + 1)
    with torch.no_grad():
        for _ in range(60):
            net.train()(torch.randn(32, 3, 10, 10))
    return net.eval()


IMAGES = torch.randn(32, 3, 10, 10, generator=torch.Generator().manual_seed(3))


def test_absorption_keeps_the_function_and_shrinks_the_activations():
    net = pair()
    model = quantized(net, IMAGES)
    report = tq.ptq.run(model, ["absorb"], [IMAGES])
    assert report.steps[0].note == "6 channels"
    error = (bypassed(model, IMAGES) - net(IMAGES)).abs()
    assert error.mean() < 1e-3
    with torch.no_grad(), tq.qmodule_state(model, tq.QModuleState.BYPASSED):
        assert model[0](IMAGES, fused=True).amax() < net[:3](IMAGES).amax() - 0.8


@pytest.mark.parametrize("edges", [False, True])
def test_absorption_leaves_zero_padded_convolutions_unless_told(edges):
    net = pair(padding=1)
    model = quantized(net, IMAGES)
    (step,) = tq.ptq.run(model, [f"absorb:edges={edges}"], [IMAGES]).steps
    assert ("zero padding" in step.note) is not edges
    inside = (bypassed(model, IMAGES) - net(IMAGES)).abs()
    assert inside[:, :, 1:-1, 1:-1].mean() < 1e-3
    assert bool(inside[:, :, 0].mean() > 0.05) is edges


def test_absorption_without_a_batch_norm_measures_the_batches():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    net[0].bias.data += 5.0
    x = torch.randn(400, 4)
    model, blind = quantized(net, x), quantized(net, x)
    assert tq.ptq.run(model, ["absorb"], [x]).steps[0].note == "6 channels"
    assert (bypassed(model, x) - net(x)).abs().mean() < 1e-3
    assert "give batches" in tq.ptq.run(blind, ["absorb"]).steps[0].note


def test_statistics_follow_folding_and_equalization():
    model = quantized(pair(), IMAGES)
    wrapper = model[0]
    mean, deviation = statistics_of(wrapper)
    fold_for_good({"0": wrapper})
    assert torch.equal(statistics_of(wrapper)[0], mean)
    tq.ptq.run(model, ["cle"], [IMAGES])
    found = statistics_of(copy.deepcopy(model)[0])
    with torch.no_grad(), tq.qmodule_state(model, tq.QModuleState.BYPASSED):
        y = wrapper.bn(wrapper.layer(IMAGES))
    torch.testing.assert_close(found[0], y.mean((0, 2, 3)), rtol=0.05, atol=0.02)
    torch.testing.assert_close(found[1], y.std((0, 2, 3)), rtol=0.05, atol=0.02)
    assert not torch.allclose(found[0], mean, rtol=0.05)
    assert set(model.state_dict()) == set(quantized(pair(), IMAGES).state_dict())


def test_moments_are_those_of_samples():
    net, x = pair(), torch.randn(4000, 3, 7, 7)
    net = nn.Sequential(*net, nn.AvgPool2d(3), nn.Flatten(), nn.SiLU())
    run = MomentsRun(net)
    with torch.no_grad(), run:
        found = run.of(net(run.begin(x[:1])))
        model = quantized(net, x[:2])
    run = MomentsRun(model)
    with torch.no_grad(), run:
        found = run.of(model(run.begin(x[:1])))
    y = net(x)
    torch.testing.assert_close(found.mean[0], y.mean(0), rtol=0.1, atol=0.1)
    assert bool((found.low[0] <= y.amin(0) + 0.05).all())
    assert bool((found.high[0] >= y.amax(0) - 0.05).all())


def test_ranges_without_data_cover_what_data_show():
    model, shown = quantized(pair(), IMAGES), quantized(pair(), IMAGES)
    note = tq.ptq.run(model, ["fold_bn", "bn_ranges"]).steps[1].note
    assert note == "3 ranges of 6 deviations"
    tq.ptq.run(shown, ["fold_bn", "calibrate"], [IMAGES])
    for (path, found), (_, expected) in zip(ranges(model), ranges(shown), strict=True):
        low, high = found.get_ranges()
        assert float(low) <= float(expected.get_ranges()[0]) + 0.1, path
        assert float(expected.get_ranges()[1]) <= float(high) < 4 * float(expected.get_ranges()[1]), path
    assert float(ranges(model)[1][1].get_ranges()[0]) == 0.0


def ranges(model: nn.Module) -> list:
    return [(p, m) for p, m in model.named_modules() if type(m).__name__ == "ExpAvgMinMax"]


def test_biases_without_data_are_near_those_of_data():
    rules = [{"types": ["Conv2d"], "weight": "affine:3,symmetric=narrow", "fold_bn": True}]
    net = pair()
    y = net(IMAGES).detach()
    plain, blind, seeing = (quantized(net, IMAGES, rules) for _ in range(3))
    tq.ptq.run(plain, ["fold_bn", "nearest"])

    note = tq.ptq.run(blind, ["fold_bn", "analytic_bias"]).steps[1].note
    tq.ptq.run(seeing, ["fold_bn", "nearest", "bias_correction:match=layer"], [IMAGES])
    assert note == "2 biases"
    before, without, with_data = (sqnr(m, IMAGES, y) for m in (plain, blind, seeing))
    assert without > before + 1.0
    assert without > with_data - 1.5


def test_biases_without_data_leave_what_is_rounded():
    model = quantized(pair(), IMAGES)
    tq.ptq.run(model, ["fold_bn", "nearest"])
    assert "it is rounded already" in tq.ptq.run(model, ["analytic_bias"]).steps[0].note


def test_the_recipe_without_data():
    net = mobile(spread=2.0)
    y = net(X).detach()
    recipe = tq.ptq.find_recipe("dfq")
    plain, model = quantized(net, X, recipe.rules), quantized(net, X, recipe.rules)
    tq.ptq.run(plain, ["fold_bn", "bn_ranges"])
    tq.ptq.run(model, recipe.stages)
    assert sqnr(model, X, y) > sqnr(plain, X, y) + 5.0
    assert all(m.bn is None or m.bn_frozen for m in model.modules() if isinstance(m, QWrapper))


def test_options_out_of_range():
    with pytest.raises(tq.errors.ConfigError, match="deviations must be a number > 0, got 0"):
        tq.ptq.make_stage("bn_ranges:deviations=0")
    with pytest.raises(tq.errors.ConfigError, match="deviations must be a number >= 0, got -1"):
        tq.ptq.make_stage("absorb:deviations=-1")


@torch.no_grad()
def distance(net: nn.Module, x: Tensor) -> float:
    """Return how far what the batch norms read is from what they remember."""
    errors = []

    def look(norm, args):
        errors.append(statistics_error(args[0], norm.running_mean, (norm.running_var + norm.eps).sqrt()))

    handles = [m.register_forward_pre_hook(look) for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    net(x)
    for handle in handles:
        handle.remove()
    return float(torch.stack(errors).sum())


def test_distilled_inputs_have_the_statistics_of_the_norms():
    net = mobile(spread=0.0)
    start, made = (tq.ptq.distilled_inputs(net, (16, 3, 8, 8), steps=steps)[0] for steps in (0, 60))
    losses = [distance(net, x) for x in (start, made)]
    assert losses[1] < 0.7 * losses[0]
    again = tq.ptq.distilled_inputs(net, (16, 3, 8, 8), steps=60)[0]
    assert torch.equal(made, again)
    assert all(p.grad is None for p in net.parameters())
    model = quantized(net, X)
    tq.ptq.run(model, ["calibrate", "gptq", "bias_correction"], [made])
    assert sqnr(model, X, net(X).detach()) > 20


def test_distilled_inputs_need_batch_norms():
    with pytest.raises(tq.errors.ConfigError, match="has no batch norm"):
        tq.ptq.distilled_inputs(nn.Linear(3, 3), (4, 3))
    model = quantized(mobile(), X)
    tq.ptq.run(model, ["fold_bn"])
    with pytest.raises(tq.errors.ConfigError, match="before its batch norms are folded"):
        tq.ptq.distilled_inputs(model, (4, 3, 8, 8))
    with pytest.raises(tq.errors.ConfigError, match="at least 2 inputs"):
        tq.ptq.distilled_inputs(mobile(), (1, 3, 8, 8))
