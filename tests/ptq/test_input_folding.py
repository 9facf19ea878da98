"""Scales of inputs folded into the norm or the layer that gives the channels; the float function stays."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torchquant as tq
from tests.ptq.test_transformers import MODELS, logits
from torchquant import ptq
from torchquant.errors import ConfigError
from torchquant.utils import weight_slots

STAGES = ("smoothquant:steps=4", "awq:steps=4")
RULES = [{"types": ["Linear"], "weight": "affine:4/channel", "input": "affine:4"}]


class RMS(nn.Module):
    """An RMS norm written out; `plus` is added to its weight."""

    def __init__(self, n: int, plus: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(n) + 0.5 - plus)
        self.plus = plus

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return x * (self.plus + self.weight.to(x.dtype)) if self.plus else self.weight * x


class Decoder(nn.Module):
    """A pre-norm layer with two query heads for each value head, and a gated product; `norm`: its norms."""

    def __init__(self, norm: Callable[[int], nn.Module] = RMS, adds_mean: bool = False) -> None:
        super().__init__()
        self.table, self.adds_mean = nn.Embedding(20, 16), adds_mean
        self.before, self.middle, self.last = norm(16), norm(16), norm(16)
        self.q, self.k, self.v, self.o = nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(16, 8), nn.Linear(16, 16)
        self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)
        self.head = nn.Linear(16, 20, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        h = self.before(x)
        q, k, v = (f(h).unflatten(-1, (-1, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        k, v = (each.repeat_interleave(2, 1) for each in (k, v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        h = self.middle(x)
        h = self.last(x + self.down(F.silu(self.gate(h)) * self.up(h)))
        y: Tensor = self.head(h)
        return y + h.mean(-1, keepdim=True) if self.adds_mean else y


IDS = torch.randint(0, 20, (6, 7), generator=torch.Generator().manual_seed(0))


def decoder(norm: Callable[[int], nn.Module] = RMS, adds_mean: bool = True) -> nn.Module:
    torch.manual_seed(0)
    net = Decoder(norm, adds_mean).double().eval()
    with torch.no_grad():
        for weight in (net.before.weight, net.middle.weight, net.up.weight, net.v.weight, net.last.weight):
            weight[3] *= 30.0
    return net


def bypassed(model: nn.Module, x: Any) -> Tensor:
    with torch.no_grad(), tq.qmodule_state(model, tq.QModuleState.BYPASSED):
        found: Tensor = model(x)
    return found


@pytest.mark.parametrize(("stage", "plus"), [(STAGES[0], 0.0), (STAGES[1], 1.0)])
def test_scales_go_into_what_gives_the_channels(stage: str, plus: float) -> None:
    net = decoder(partial(RMS, plus=plus))
    model = tq.quantize(net, RULES, IDS)
    said = {step.path: step for step in ptq.run(model, [stage], [IDS], keep="always").steps}
    torch.testing.assert_close(bypassed(model, IDS), net(IDS), rtol=1e-12, atol=1e-12)
    places = {path: step.note.partition("; ")[2] for path, step in said.items()}
    assert places["q"] == places["k"] == places["v"] == "folded into before"
    assert (places["gate"], places["o"], places["down"]) == ("folded into middle", "folded into v", "folded into up")
    assert places["head"] == "before the layer, because read by mean in the model"
    assert [slot.path for slot in weight_slots(model) if slot.module.has_slots] == ["head"]
    norms = (model.get_submodule("before").weight, net.get_submodule("before").weight)
    assert not torch.equal(*norms)


@pytest.mark.parametrize("stage", [STAGES[0], pytest.param(STAGES[1], marks=pytest.mark.slow)])
def test_folded_scales_are_those_before_the_layers(stage: str) -> None:
    net = decoder()
    folded, kept = (tq.quantize(net, RULES, IDS) for _ in range(2))
    left = {s.path: s for s in ptq.run(kept, [f"{stage},fold=False"], [IDS]).steps}
    found = {s.path: s for s in ptq.run(folded, [stage], [IDS]).steps}
    assert "folded" not in str(left["q"].note)
    assert "before the layer" not in left["q"].note
    assert all(found[path].error == pytest.approx(left[path].error) for path in ("q", "gate", "down"))
    assert all(step.error < step.nearest_error for step in found.values() if "folded" in step.note)  # type: ignore[operator]
    assert "folded into v" in found["o"].note
    with torch.no_grad():
        lost = [(model(IDS) - net(IDS)).square().mean() for model in (folded, kept, plain(net))]
    assert lost[0] < 0.7 * lost[2]


def plain(net: nn.Module) -> nn.Module:
    model = tq.quantize(net, RULES, IDS)
    ptq.run(model, ["calibrate", "nearest"], [IDS])
    return model


def test_why_a_scale_stays_before_a_layer() -> None:
    torch.manual_seed(0)
    x = torch.randn(9, 8) * torch.logspace(-1, 1, 8)

    def note(net: nn.Module, rules: Any, path: str, skip: tuple[str, ...] = ()) -> str:
        model = tq.quantize(net, rules, x)
        steps = ptq.run(model, ["smoothquant:alpha=0.5"], [x], keep="always", skip=skip).steps
        return next(step.note for step in steps if step.path == path).partition("because ")[2]

    pair = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    whole = [{"types": ["Linear"], "weight": "affine:4"}]
    assert note(pair, whole, "2") == "the weight of 0 has one scale for several of its channels"
    assert note(pair, RULES, "0") == "what gives its input is unknown"
    assert note(nn.Sequential(nn.Linear(8, 8), nn.ReLU6(), nn.Linear(8, 4)), RULES, "2") == (
        "the values end at a bound that a factor would move"
    )

    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.b(y) + self.c(y.clone())  # type: ignore[no-any-return]

    assert note(Fork(), RULES, "b", skip=("c",)) == "c reads the channels too"


def test_a_fold_that_changes_the_function_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchquant.ptq.ends import Columns

    net = decoder()
    model = tq.quantize(net, RULES, IDS)
    monkeypatch.setattr(Columns, "multiply", lambda self, factors: None)
    with pytest.raises(ConfigError, match="it was undone.*keep the scales before the layers, fold=False"):
        ptq.run(model, ["smoothquant:steps=2"], [IDS])
    monkeypatch.undo()
    torch.testing.assert_close(bypassed(model, IDS), net(IDS), rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "tied", "qwen2", "gemma", "opt", "vit", "t5", "bert", "mixtral"])
@pytest.mark.parametrize("stage", STAGES)
def test_models_of_transformers_keep_their_function(name: str, stage: str) -> None:
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    net, inputs = MODELS[name](hf)
    model = tq.quantize(net.eval(), RULES, inputs)
    wanted = logits(net, inputs)
    notes = [step.note for step in ptq.run(model, [stage], [inputs], keep="always").steps]
    assert sum("folded into" in note for note in notes) >= 1
    with tq.qmodule_state(model, tq.QModuleState.BYPASSED):
        found = logits(model, inputs)
    assert float((found - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
