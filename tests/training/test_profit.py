"""Progressive freezing: the measure against its formula, the rounds, what is frozen and what goes on."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import torchquant as tq
from torchquant.errors import ConfigError
from torchquant.training import ProgressiveFreezing
from torchquant.training.profit import divergence

X = torch.randn(16, 1, 6, 6, generator=torch.Generator().manual_seed(0))


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 3)]
    found = tq.quantize(nn.Sequential(*layers), [{"weight": "affine:3,symmetric=narrow/channel"}], X[:2])
    tq.calibrate(found, [X], show_progress=False)
    tq.set_qmodule_state(found, tq.QModuleState.QUANT_AWARE_TRAIN)
    return found.train()


def train(net: nn.Module, schedule: ProgressiveFreezing, n_steps: int, rate: float = 0.05) -> None:
    optimizer = torch.optim.SGD(net.parameters(), rate, weight_decay=0.1)
    for _ in range(n_steps):
        optimizer.zero_grad()
        net(X).square().mean().backward()
        optimizer.step()
        schedule.step()


def test_the_divergence_is_that_of_gaussians() -> None:
    before, after = torch.randn(500, 3) * 2 + 1, torch.randn(500, 3)
    gaussians = [
        torch.distributions.Normal(y.double().mean(0), y.double().std(0, correction=0)) for y in (before, after)
    ]
    torch.testing.assert_close(divergence(before, after), torch.distributions.kl_divergence(*gaussians).mean())
    assert float(divergence(torch.ones(4, 2), torch.ones(4, 2))) == 0.0


def test_the_layers_that_jump_most_are_frozen_first_and_stay() -> None:
    net = model()
    schedule = ProgressiveFreezing(net, freeze_at=[6, 9], every=2)
    train(net, schedule, 5)
    jumps = [entry.divergence for entry in schedule.report()]
    assert all(jump > 0 for jump in jumps)
    train(net, schedule, 1)
    first = [entry.is_frozen for entry in schedule.report()]
    assert sum(first) == 1
    held = {n: p.clone() for n, p in net.named_parameters()}
    train(net, schedule, 3)
    entries = schedule.report()
    assert sum(entry.is_frozen for entry in entries) == 2
    assert all(now.is_frozen for now, was in zip(entries, first, strict=True) if was)
    frozen = next(entry.path for entry, was in zip(entries, first, strict=True) if was)
    moved = {n for n, p in net.named_parameters() if not torch.equal(p, held[n])}
    assert f"{frozen}.layer.weight" not in moved
    assert any("bias" in name for name in moved)
    assert len(moved) >= 4


def test_measuring_changes_nothing() -> None:
    alone, watched = model(), model()
    train(watched, ProgressiveFreezing(watched, [100], every=1), 4)
    optimizer = torch.optim.SGD(alone.parameters(), 0.05, weight_decay=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        alone(X).square().mean().backward()
        optimizer.step()
    assert all(
        torch.equal(a, b) for a, b in zip(alone.state_dict().values(), watched.state_dict().values(), strict=True)
    )


def test_a_schedule_goes_on_from_its_state() -> None:
    whole, parts = model(), model()
    train(whole, ProgressiveFreezing(whole, [2, 4], every=1), 6)
    first = ProgressiveFreezing(parts, [2, 4], every=1)
    train(parts, first, 3)
    other = model()
    other.load_state_dict(parts.state_dict())
    second = ProgressiveFreezing(other, [2, 4], every=1)
    second.load_state_dict(first.state_dict())
    train(other, second, 3)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), other.state_dict().values(), strict=True))


def test_what_is_wrong_is_named() -> None:
    net = model()
    for steps in ([], [3, 2], [0]):
        with pytest.raises(ConfigError, match="freeze_at must be rising steps from 1 on, got"):
            ProgressiveFreezing(net, steps)
    with pytest.raises(ConfigError, match="the model has no layer with a quantized weight that trains"):
        ProgressiveFreezing(nn.Linear(2, 2), [1])
    with pytest.raises(ConfigError, match="every must be at least 1, got 0"):
        ProgressiveFreezing(net, [1], every=0)
