"""The mean of state_dicts, as federated averaging takes it of every entry: the same state, or a loud refusal."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torchquant as tq
from torchquant.errors import ConfigError

S = tq.QModuleState
SHARES = [[1, 1, 1], [300, 200, 100], [0.3, 0.6, 0.1], [0.7, 0.2, 0.1]]


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)]
    return nn.Sequential(*layers).eval()


def client(seed: int, rules: Any = "w8a8", state: tq.QModuleState = S.QUANT_EVAL) -> nn.Module:
    x = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    model = tq.quantize(net(), rules, x)
    with tq.qmodule_state(model, S.CALIBRATION):
        model(x)
    tq.set_qmodule_state(model, state)
    return model


def averaged(models: list[nn.Module], shares: list[Any]) -> dict[str, Tensor]:
    """As Flower does it: every entry as an array, weighted, summed, divided, and cast back."""
    entries = [[value.numpy() for value in model.state_dict().values()] for model in models]
    means = [
        np.sum([value * share for value, share in zip(values, shares, strict=True)], 0) / sum(shares)
        for values in zip(*entries, strict=True)
    ]
    own = models[0].state_dict()
    return {key: torch.as_tensor(mean).to(own[key].dtype) for key, mean in zip(own, means, strict=True)}


@pytest.mark.parametrize("rules", ["w8a8", "w4a4-lsq"])
def test_the_mean_of_models_in_one_state_is_in_that_state(rules: str) -> None:
    models = [client(seed, rules) for seed in range(3)]
    mean: Any = tq.quantize(net(), rules, torch.ones(1, 1, 8, 8))
    x = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(9))
    for state, shares, frozen in itertools.product(list(S), SHARES, [True, False]):
        for model in models:
            tq.set_qmodule_state(model, state)
            tq.freeze_bn(model, frozen)
        mean.load_state_dict(averaged(models, shares), strict=True)
        assert {row.state for row in tq.state_report(mean)} == {state.name}
        assert all(row.calibrated for row in tq.state_report(mean))
        assert mean[0].bn_frozen is frozen
    with torch.no_grad():
        assert torch.allclose(mean(x), models[0](x), atol=0.5)


@pytest.mark.parametrize("shares", SHARES, ids=str)
def test_the_mean_of_equal_quantizers_is_the_quantizer(shares: list[float]) -> None:
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    x[0] = 30.0
    quantizer: Any = tq.make_quantizer("qfmt:4,signed,rule=mse")
    quantizer.pre_observe(x)
    assert quantizer.fewer_bits > 1
    mean = tq.make_quantizer("qfmt:4,signed,rule=mse")
    mean.load_state_dict(averaged([quantizer] * 3, shares))
    assert torch.equal(mean(x), quantizer(x))


@pytest.mark.parametrize(
    "states", [(S.CALIBRATION, S.QUANT_EVAL), (S.BYPASSED, S.QUANT_EVAL), (S.CALIBRATION, S.BYPASSED)]
)
def test_the_mean_of_different_states_is_refused_and_no_third_state(states: tuple[tq.QModuleState, ...]) -> None:
    models = [client(seed, state=state) for seed, state in enumerate(states)]
    with pytest.raises(ConfigError, match="averaged over models in different states.*set_qmodule_state.*_extra_state"):
        client(0).load_state_dict(averaged(models, [1, 1]))


def test_the_mean_of_a_frozen_and_a_running_batch_norm_is_refused() -> None:
    models = [client(0), client(1)]
    tq.freeze_bn(models[0])
    with pytest.raises(ConfigError, match="averaged over models"):
        client(0).load_state_dict(averaged(models, [1, 1]))


def test_all_that_a_quantized_model_saves_can_be_averaged() -> None:
    every = [
        client(0, rules)
        for rules in ("w8a8", "w4a4-lsq", "w2a2-lsq", "ternary", "int8-ort", [{"weight": "qfmt:4,signed,rule=mse"}])
    ]
    whole = {key for model in every for key, value in model.state_dict().items() if not value.is_floating_point()}
    assert all(key.endswith("num_batches_tracked") for key in whole), whole  # torch's own


@pytest.mark.parametrize("place", range(10))
def test_states_of_older_files_load(place: int) -> None:
    op = tq.QOp(abs, None)
    op.load_state_dict({"_extra_state": torch.tensor(place, dtype=torch.uint8)})
    assert op.state is list(S)[place]
    wrapper = tq.QWrapper([nn.Linear(2, 2), nn.BatchNorm1d(2)], None, None)
    old = {**wrapper.state_dict(), "_extra_state": torch.tensor([place, 1], dtype=torch.uint8)}
    wrapper.load_state_dict(old)
    assert wrapper.state is list(S)[place]
    assert wrapper.bn_frozen


@pytest.mark.parametrize("saved", [[0.94], [1.5, 0.0], [1.0, 0.0, 0.0, 0.0, 1.0], [float("nan")] * 5, [], [0.0] * 7])
def test_what_is_no_saved_state_is_refused(saved: list[float]) -> None:
    wrapper = tq.QWrapper(nn.Linear(2, 2), None, None)
    state = {**wrapper.state_dict(), "_extra_state": torch.tensor(saved)}
    if saved == [1.0, 0.0, 0.0, 0.0, 1.0]:  # observes weights only
        wrapper.load_state_dict(state)
        assert wrapper.state is S.CALIBRATION_WEIGHT_ONLY
        return
    with pytest.raises(ConfigError, match="saved"):
        wrapper.load_state_dict(state)
