"""The learned equivalent transformation: the float function stays, and no scales of a search are better."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import torchquant as tq
from tests.ptq.test_input_folding import IDS, RULES, bypassed, decoder
from torchquant import ptq
from torchquant.errors import ConfigError
from torchquant.ptq.report import StepReport


def with_means(norm: type[nn.Module] = nn.LayerNorm) -> nn.Module:
    """A decoder whose norms give channels of different means."""
    net = decoder(norm, adds_mean=False)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.LayerNorm):
                module.bias.copy_(torch.linspace(-6, 6, 16))
    return net


def said_by(net: nn.Module, *stages: str) -> tuple[nn.Module, dict[str, StepReport]]:
    model = tq.quantize(net, RULES, IDS)
    report = ptq.run(model, stages, [IDS], names=["q", "k", "v", "o", "gate", "up"])
    return model, {step.path: step for step in report.steps}


def test_shifts_and_scales_are_folded() -> None:
    net = with_means()
    model, said = said_by(net, "let:steps=2")
    torch.testing.assert_close(bypassed(model, IDS), net(IDS), rtol=1e-11, atol=1e-11)
    assert said["q"].note.endswith("folded with a shift into before")
    assert said["gate"].note.endswith("folded with a shift into middle")
    assert not any(module.input_transform for module in model.modules() if isinstance(module, tq.QWrapper))
    bias = model.get_submodule("before").bias
    assert not torch.allclose(bias, net.get_submodule("before").bias)


def test_learning_is_better_than_searching() -> None:
    net = with_means()
    stages = ("smoothquant", "let:shift=False,steps=10,rate=0.02", "let:steps=10,rate=0.02")
    found = [said_by(net, stage)[1] for stage in stages]
    searched, unshifted, shifted = ([said[path].error or 0.0 for path in ("q", "gate")] for said in found)
    assert all(a <= b for a, b in zip(unshifted, searched, strict=True))
    assert sum(unshifted) < sum(searched)
    assert shifted[1] < 0.5 * searched[1]


def test_no_pair_of_scales_is_much_better() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(2, 6, bias=False)), torch.randn(40, 2) * torch.tensor([8.0, 0.5])
    rules = [{"types": ["Linear"], "weight": "affine:3/channel", "input": "affine:4"}]
    model = tq.quantize(net, rules, x)
    learned = ptq.run(model, ["let:steps=60,rate=0.02"], [x]).steps[0].error

    class Every(ptq.InputStage):
        source = "every pair of scales"

        def candidates(self, readers: ptq.Readers) -> list[tuple[str, tq.qmodule.ChannelScale]]:
            logs = torch.linspace(-4, 4, 161)
            return [("", tq.qmodule.ChannelScale(torch.stack([s.exp(), torch.ones(())]))) for s in logs]

    every = ptq.run(tq.quantize(net, rules, x), [Every()], [x]).steps[0].error
    assert learned is not None
    assert every is not None
    assert learned <= 1.1 * every


def test_what_has_no_bias_is_not_shifted() -> None:
    _, said = said_by(with_means(nn.RMSNorm), "let:steps=2")
    assert said["q"].note.endswith("folded into before")
    assert said["o"].note.endswith("folded with a shift into v")
    with pytest.raises(ConfigError, match="steps"):
        said_by(with_means(), "let:steps=0")
