"""Seven networks with one planted fault each: the first finding and the first remedy must be the planted one."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import torchquant as tq
from torchquant.analysis import Advice, Analysis, Effect, advise, analyze
from torchquant.analysis.advice import helps

PER_TENSOR = {"weight": "affine:8,symmetric=narrow", "output": "affine:8", "input": "affine:8"}


class Net(nn.Module):
    """A small residual network for pictures; `gain` is the activation behind the second convolution."""

    def __init__(self, gain: nn.Module | None = None) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.act = gain or nn.ReLU()
        self.third = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        y = self.act(self.norm(self.second(x)))
        return self.head((self.third(y) + x).relu().mean((2, 3)))


class Tied(nn.Module):
    """A language model whose head has the weight of its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        self.hidden = nn.Linear(32, 32)
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(self.embedding(x)).relu())


def pictures(n: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 3, 8, 8, generator=generator) for _ in range(n)]


def trained(net: nn.Module) -> nn.Module:
    """Give batch norms the statistics of the pictures."""
    net.train()
    with torch.no_grad():
        for _ in range(40):
            net(pictures(1)[0])
    return net.eval()


def calibrated(net: nn.Module, rules: list[dict[str, object]], batches: list[Tensor]) -> nn.Module:
    model = tq.quantize(net, rules, batches[0])
    tq.calibrate(model, batches)
    return model


def force(quantizer: tq.Quantizer, low: float, high: float) -> None:
    quantizer.observer.force_ranges(low, high)  # type: ignore[union-attr]


def outlier_channel() -> tuple[nn.Module, list[Tensor]]:
    net = Net()
    with torch.no_grad():
        net.second.weight[3] *= 60
    return calibrated(trained(net), [{**PER_TENSOR, "fold_bn": False}], pictures()), pictures()


def dead_layer() -> tuple[nn.Module, list[Tensor]]:
    model = calibrated(trained(Net()), [{**PER_TENSOR, "fold_bn": True}], pictures())
    force(model.third.weight_quantizer, -90.0, 90.0)
    return model, pictures()


def two_bits() -> tuple[nn.Module, list[Tensor]]:
    rules = [{"weight": "affine:8/channel", "output": "affine:8"}, {"names": ["third"], "weight": "affine:2/channel"}]
    return calibrated(trained(Net()), rules, pictures()), pictures()


def wrong_data() -> tuple[nn.Module, list[Tensor]]:
    model = calibrated(trained(Net()), [{**PER_TENSOR, "fold_bn": True}], pictures())
    other = copy.deepcopy(model)
    tq.calibrate(other, [0.05 * x for x in pictures()])
    model.first.acts_quantizer.load_state_dict(other.first.acts_quantizer.state_dict())
    return model, pictures()


def saturating_addition() -> tuple[nn.Module, list[Tensor]]:
    model = calibrated(trained(Net()), [{**PER_TENSOR, "fold_bn": True}], pictures())
    (addition,) = (m for path, m in tq.utils.qmodules(model) if "add" in path)
    force(addition.acts_quantizer, 0.0, 0.3)
    return model, pictures()


def tied_head() -> tuple[nn.Module, list[Tensor]]:
    batches = [torch.randint(50, (8, 12), generator=torch.Generator().manual_seed(i)) for i in range(2)]
    model = calibrated(Tied().eval(), [{"weight": "affine:8,symmetric=narrow"}], batches)
    force(model.head.weight_quantizer, -80.0, 80.0)
    return model, batches


def batch_norm_gain() -> tuple[nn.Module, list[Tensor]]:
    net = trained(Net(nn.ReLU6()))
    with torch.no_grad():
        net.norm.weight[5] = 200.0
    return calibrated(net, [{**PER_TENSOR, "fold_bn": True}], pictures()), pictures()


PLANTED: dict[str, tuple[Callable[[], tuple[nn.Module, list[Tensor]]], str, str, str]] = {
    "outlier channel": (outlier_channel, "second weight", "channels differ", "per channel"),
    "dead layer": (dead_layer, "third weight", "killed channels", "observe again"),
    "two bits among eight": (two_bits, "third weight", "few bits", "8 bits"),
    "range of other data": (wrong_data, "first output", "clipped", "observe again"),
    "saturating addition": (saturating_addition, "add output", "clipped", "observe again"),
    "tied head with two ranges": (tied_head, "head weight", "tied weights differ", "embedding weight"),
    "gain of a batch norm": (batch_norm_gain, "second weight", "batch norm gain", "per channel"),
}


def looked_at(fault: str) -> tuple[Analysis, Advice]:
    torch.manual_seed(0)
    model, batches = PLANTED[fault][0]()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    analysis = analyze(model, batches)
    advice = advise(model, batches, analysis, n_sites=2)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    return analysis, advice


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_faults_are_named_first_and_the_remedy_helps(fault: str) -> None:
    _, where, cause, change = PLANTED[fault]
    analysis, advice = looked_at(fault)
    path = where.split()[0]
    assert analysis.worst()[0].path == path
    first, best = analysis.findings()[0], advice.remedies[0]
    assert (first.name, first.cause) == (where, cause)
    assert (best.name, best.cause) == (where, cause)
    assert change in best.change
    assert best.gain_db > 6.0
    assert best in advice.kept
    assert advice.together.sqnr_db >= best.after.sqnr_db
    assert best.because in best.words
    assert f"{best.after.sqnr_db:.1f} dB" in best.words


def test_a_remedy_that_raises_the_loss_is_none() -> None:
    """Of a model that was trained quantized the float weights may be the worse ones."""
    now = Effect(10.0, loss=1.0)
    assert helps(now, Effect(12.0, loss=0.9))
    assert helps(now, Effect(12.0, loss=1.005))
    assert not helps(now, Effect(12.0, loss=1.2))
    assert not helps(now, Effect(10.05, loss=0.5))
    assert helps(Effect(10.0), Effect(12.0))


def test_advice_for_a_loss_that_likes_the_error_is_empty() -> None:
    torch.manual_seed(0)
    model, batches = two_bits()
    with torch.no_grad():
        pairs = [(x, model(x)) for x in batches]
    advice = advise(model, pairs, loss=nn.functional.mse_loss, with_targets=True, n_sites=2)
    assert advice.before.loss == 0.0
    assert advice.remedies == advice.kept == ()
