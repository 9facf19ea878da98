"""Schedules, batch-norm re-estimation, oscillating weights and the delta of EWGS."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import torchquant as tq
from torchquant.errors import ConfigError
from torchquant.qmodule import QModuleState
from torchquant.quantizers import EWGSQuantizer
from torchquant.training import (
    BitSchedule,
    GradientSchedule,
    OscillationTracker,
    QuantizationSchedule,
    Ramp,
    adapt_ewgs,
    dampening_loss,
    reestimate_bn,
)


def network(weight: str = "affine:4,symmetric=narrow/channel", fold_bn: bool | str = "rescale") -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        tq.QWrapper(
            [nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU()],
            tq.make_quantizer(weight),
            tq.make_quantizer("affine:8", site="output"),
            fold_bn,
        ),
        nn.Flatten(),
        tq.QWrapper(nn.Linear(96, 3), tq.make_quantizer(weight), None),
    )


def test_ramps_have_their_ends_and_their_shape() -> None:
    for shape in ("linear", "cosine"):
        ramp = Ramp(2.0, -1.0, 10, shape)
        assert (ramp(0), ramp(5), ramp(10), ramp(99)) == pytest.approx((2.0, 0.5, -1.0, -1.0))
    assert Ramp(0.0, 1.0, 4, "cosine")(1) == pytest.approx((1 - math.cos(math.pi / 4)) / 2)


def test_quantization_starts_and_observers_freeze_when_said() -> None:
    model = network()
    schedule = QuantizationSchedule(model, quant_start_step=2, freeze_observer_step=4, freeze_bn_step=5)
    model.train()
    seen, ranges = [], []
    for i in range(7):
        model(torch.randn(4, 1, 6, 6) * (1 + i))
        seen.append(model[0].state.name)
        ranges.append(float(model[0].acts_quantizer.observer.range_max))
        schedule.step()
    assert seen == ["CALIBRATION"] * 2 + ["QUANT_AWARE_TRAIN"] * 2 + ["QUANT_EVAL"] * 3
    assert len(set(ranges[:4])) == 4
    assert len(set(ranges[3:])) == 1
    assert model[0].bn_frozen
    resumed_model = network()
    resumed = QuantizationSchedule(resumed_model, quant_start_step=2, freeze_observer_step=4, freeze_bn_step=5)
    for part, source in ((resumed_model, model), (resumed, schedule)):
        part.load_state_dict(source.state_dict())
    assert resumed_model[0].state is QModuleState.QUANT_EVAL
    assert int(resumed.n_steps) == 7
    assert list(schedule.state_dict()) == ["n_steps"]


def test_frozen_observers_still_train_the_weights() -> None:
    model = network()
    schedule = QuantizationSchedule(model, 0, 1)
    model.train()
    model(torch.randn(4, 1, 6, 6))
    schedule.step()
    model(torch.randn(4, 1, 6, 6)).sum().backward()
    assert bool((model[0].layer.weight.grad != 0).any())


def test_rho_moves_and_evaluation_stays_on_the_grid() -> None:
    model = network()
    schedule = GradientSchedule(model, "pwl", rho=Ramp(1.0, 0.0, 4))
    tq.set_qmodule_state(model, QModuleState.QUANT_AWARE_TRAIN)
    x = torch.randn(4, 1, 6, 6)
    model(x)
    distances = []
    for _ in range(5):
        w = model[2].layer.weight
        soft = model[2].weight_quantizer(w)
        distances.append(float((soft - model[2].weight_quantizer.eval()(w)).detach().abs().sum()))
        model[2].weight_quantizer.train()
        schedule.step()
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 0.0
    assert distances[-1] == 0.0
    with pytest.raises(ConfigError, match="no quantizer of the model supports the gradient 'hardtanh'"):
        GradientSchedule(model, "hardtanh")


def test_bits_go_down_step_by_step() -> None:
    model = network()
    schedule = BitSchedule(model, {0: 8, 2: 4, 3: 2}, "affine:{n},symmetric=narrow/channel", acts="affine:{n}")
    tq.set_qmodule_state(model, QModuleState.QUANT_AWARE_TRAIN)
    widths = []
    for _ in range(5):
        model(torch.randn(4, 1, 6, 6))
        q = model[2].weight_quantizer
        widths.append((q.n_bits, model[0].acts_quantizer.n_bits, q(model[2].layer.weight)[0].unique().numel()))
        schedule.step()
    assert [w[:2] for w in widths] == [(8, 8), (8, 8), (4, 4), (2, 2), (2, 2)]
    assert widths[-1][2] <= 3
    model[2].weight_quantizer.pin(model[2].layer.weight)
    with pytest.raises(ConfigError, match=r"2.weight is pinned, and a quantizer of another width would lose"):
        schedule.apply_at(0)
    with pytest.raises(ConfigError, match="the width at step 0"):
        BitSchedule(model, {5: 4}, "affine:{n}")
    with pytest.raises(ConfigError, match="n_bits must be"):
        BitSchedule(model, {0: 8, 5: 99}, "affine:{n}")


@pytest.mark.parametrize("fold_bn", [False, "rescale"])
def test_statistics_are_those_of_the_quantized_network(fold_bn: bool | str) -> None:
    model = network("affine:2,symmetric=narrow/channel", fold_bn)
    batches = [torch.randn(16, 1, 6, 6) * 2 + 1 for _ in range(6)]
    with tq.qmodule_state(model, QModuleState.CALIBRATION):
        model.eval()(batches[0])
    wrapper = model[0]
    expected_x = []
    with torch.no_grad():
        weight = wrapper.weight_quantizer(wrapper.float_weight())
        if fold_bn:
            factor = wrapper.bn.weight / (wrapper.bn.running_var + wrapper.bn.eps).sqrt()
            weight = weight / factor.view(-1, 1, 1, 1)
        expected_x = [nn.functional.conv2d(x, weight, wrapper.layer.bias) for x in batches]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    momentum, tracked = wrapper.bn.momentum, int(wrapper.bn.num_batches_tracked)
    assert reestimate_bn(model, [(x, 0) for x in batches]) == 6
    mean = torch.stack([y.mean((0, 2, 3)) for y in expected_x]).mean(0)
    var = torch.stack([y.var((0, 2, 3)) for y in expected_x]).mean(0)
    assert torch.allclose(wrapper.bn.running_mean, mean, atol=1e-5)
    assert torch.allclose(wrapper.bn.running_var, var, rtol=1e-5)
    assert (wrapper.bn.momentum, int(wrapper.bn.num_batches_tracked)) == (momentum, tracked)
    assert not model.training
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert all("running" in key or "weight_quantizer" in key for key in changed)
    with pytest.raises(ConfigError, match="at least one batch"):
        reestimate_bn(model, [])


def test_reestimation_mends_statistics_that_are_off() -> None:
    model = network("affine:3,symmetric=narrow/channel", "rescale")
    batches = [torch.randn(32, 1, 6, 6) for _ in range(8)]
    tq.set_qmodule_state(model, QModuleState.QUANT_AWARE_TRAIN)
    for x in batches * 8:
        model.train()(x)
    model.eval()
    tq.set_qmodule_state(model, QModuleState.QUANT_EVAL)
    right = copy.deepcopy(model)
    model[0].bn.running_mean.add_(1.0)
    reestimate_bn(model, batches)
    assert torch.allclose(model[0].bn.running_mean, right[0].bn.running_mean, atol=0.05)


def oscillating_layer(start: float) -> tq.QWrapper:
    """One weight whose float optimum lies between two levels: it jumps; a second one holds the range."""
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data.copy_(torch.tensor([[start, 3.0]]))
    return tq.QWrapper(layer, tq.make_quantizer("affine:3,symmetric=narrow"), None)


def train_on_an_optimum_between_levels(model: tq.QWrapper, after_step=lambda: None, extra=lambda: 0.0) -> list[float]:  # noqa: ANN001
    tq.set_qmodule_state(model, QModuleState.QUANT_AWARE_TRAIN)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    history = []
    for _ in range(300):
        loss = (model(torch.tensor([[1.0, 0.0]])) - 0.55).square().sum() + extra()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        after_step()
        history.append(float((model.layer.weight[0, 0].detach()).round()))
    return history


def test_a_weight_between_two_levels_oscillates_and_is_seen() -> None:
    model = oscillating_layer(0.4)
    model.observe_weight()
    tracker = OscillationTracker(model)
    history = train_on_an_optimum_between_levels(model, tracker.step)
    assert sum(a != b for a, b in zip(history, history[1:], strict=False)) > 20
    report = tracker.report()[0]
    assert (report.path, report.n_weights, report.oscillating, report.frozen) == ("(root)", 2, 0.5, 0.0)


def test_freezing_stops_it_at_the_level_it_was_at_most() -> None:
    model = oscillating_layer(0.4)
    model.observe_weight()
    tracker = OscillationTracker(model, freeze_above=Ramp(0.5, 0.02, 100))
    history = train_on_an_optimum_between_levels(model, tracker.step)
    assert len(set(history[-100:])) == 1
    assert tracker.report()[0].frozen == 0.5
    assert float(model.layer.weight[0, 0].detach()) == history[-1]
    assert history[-1] in (0.0, 1.0)
    again = OscillationTracker(model, freeze_above=0.02)
    again.load_state_dict(tracker.state_dict())
    assert again.report() == tracker.report()


def test_dampening_keeps_the_weight_at_a_level() -> None:
    model = oscillating_layer(0.4)
    model.observe_weight()
    calm = train_on_an_optimum_between_levels(model, extra=lambda: dampening_loss(model, 1.0))
    wild = train_on_an_optimum_between_levels(oscillating_layer(0.4))

    def turns(history: list[float]) -> int:
        return sum(a != b for a, b in zip(history, history[1:], strict=False))

    assert turns(calm) < turns(wild) / 4


def test_dampening_is_the_distance_to_the_levels() -> None:
    model = network(fold_bn=False)
    with tq.qmodule_state(model, QModuleState.CALIBRATION):
        model(torch.randn(2, 1, 6, 6))
    expected, wrappers = 0.0, [model[0], model[2]]
    for wrapper in wrappers:
        w = wrapper.float_weight().detach()
        expected += float((wrapper.weight_quantizer(w) - w).detach().square().sum())
    loss = dampening_loss(model, 0.5)
    assert float(loss.detach()) == pytest.approx(0.5 * expected, rel=1e-5)
    loss.backward()
    w = model[2].float_weight().detach()
    assert torch.allclose(model[2].layer.weight.grad, w - model[2].weight_quantizer(w), atol=1e-6)


@pytest.mark.parametrize("fold_bn", ["rescale", False])
def test_a_frozen_weight_stays_frozen_under_a_folded_batch_norm(fold_bn: bool | str) -> None:
    model = network(fold_bn=fold_bn)
    tq.set_qmodule_state(model, QModuleState.QUANT_AWARE_TRAIN)
    model.train()(torch.randn(4, 1, 6, 6))
    tracker = OscillationTracker(model, freeze_above=0.0, momentum=1.0)
    tracker.layers[0].frozen.fill_(True)
    codes = tracker.layers[0].codes.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(4, 1, 6, 6)).square().mean().backward()
        optimizer.step()
        tracker.step()
    assert torch.equal(tracker.layers[0].codes, codes)


def test_delta_of_ewgs_is_the_curvature() -> None:
    """Of a loss `sum a y**2 / 2` the Hessian is a on the diagonal: the estimate is exact with random signs."""
    quantizer = EWGSQuantizer(3).double()
    x = torch.randn(50, dtype=torch.float64, requires_grad=True)
    quantizer.pre_observe(x)
    a = torch.rand(50, dtype=torch.float64) + 0.5
    deltas = adapt_ewgs(quantizer, lambda: (a * quantizer(x).square() / 2).sum())
    g = (a * quantizer(x)).detach()
    assert deltas[""] == pytest.approx(float(a.mean() / (3 * g.std())), rel=1e-6)
    assert float(quantizer.delta) == pytest.approx(deltas[""], rel=1e-5)
    assert adapt_ewgs(quantizer, lambda: -quantizer(x).square().sum())[""] == 0.0


def test_delta_reaches_every_site_of_a_network() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        tq.QWrapper(
            [nn.Linear(6, 8), nn.ReLU()], tq.make_quantizer("ewgs:2/channel"), tq.make_quantizer("ewgs:2", "output")
        ),
        tq.QWrapper(nn.Linear(8, 2), tq.make_quantizer("affine:4/channel@ewgs"), None),
    )
    tq.set_qmodule_state(model, QModuleState.QUANT_AWARE_TRAIN)
    x, labels = torch.randn(32, 6), torch.randint(0, 2, (32,))
    model(x)

    def loss() -> Tensor:
        return nn.functional.cross_entropy(model(x), labels)

    deltas = adapt_ewgs(model, loss, samples=4, generator=torch.Generator().manual_seed(0))
    assert set(deltas) == {"0.weight_quantizer", "0.acts_quantizer", "1.weight_quantizer"}
    assert deltas["1.weight_quantizer"] > 0.0
    assert model[1].weight_quantizer.gradient.delta == deltas["1.weight_quantizer"]
    loss().backward()
    with pytest.raises(ConfigError, match="no quantizer with EWGS"):
        adapt_ewgs(nn.Linear(1, 1), loss)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ramp(0.0, 1.0, 0), "n_steps must be at least 1"),
        (lambda: Ramp(0.0, 1.0, 5, "steep"), "shape must be one of linear, cosine"),
        (lambda: QuantizationSchedule(network(), -1), "quant_start_step must be at least 0"),
        (lambda: QuantizationSchedule(network(), 5, 5), "freeze_observer_step must come after quant_start_step 5"),
        (lambda: OscillationTracker(nn.Linear(1, 1)), "no weight quantizer with codes"),
        (lambda: OscillationTracker(network(), momentum=0.0), "momentum must be above 0"),
    ],
)
def test_bad_settings_are_refused(make, message: str) -> None:  # noqa: ANN001
    with pytest.raises(ConfigError, match=message):
        make()
