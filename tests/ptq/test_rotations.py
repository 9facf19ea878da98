"""Rotations folded into the layers that share channels, drawn and learned: the float function stays, outliers go."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchquant as tq
from tests.ptq.test_input_folding import IDS, RMS, RULES, bypassed, decoder
from tests.ptq.test_paths import Net
from tests.ptq.test_transformers import MODELS, logits
from torchquant import ptq
from torchquant.errors import ConfigError
from torchquant.ptq.rotating import measured, start_of
from torchquant.ptq.rotation_sets import rotation_sets
from torchquant.utils import weight_slots

NORMS: dict[str, Callable[[int], nn.Module]] = {
    "rms": RMS,
    "plus one": partial(RMS, plus=1.0),
    "torch": nn.RMSNorm,
    "layer norm": nn.LayerNorm,
}


def with_outliers(norm: Callable[[int], nn.Module] = RMS) -> nn.Module:
    """A decoder whose residual stream and values have a channel of large values."""
    net = decoder(norm, adds_mean=False)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, RMS | nn.RMSNorm | nn.LayerNorm):
                module.weight[3] /= 30.0 if float(module.weight[3]) > 10 else 1.0
        net.get_submodule("table").weight[:, 5] *= 40.0
        net.get_submodule("v").weight[2] *= 20.0
    return net


def rotated(net: nn.Module, stage: str, rules: Any = RULES) -> tuple[nn.Module, str]:
    model = tq.quantize(net, rules, IDS)
    steps = ptq.run(model, [stage, "calibrate"], [IDS]).steps
    return model, next(step.note for step in steps if step.stage == stage)


@pytest.mark.parametrize(
    ("norm", "stage"), [*((norm, "quarot") for norm in NORMS), ("layer norm", "spinquant:steps=3,seeds=1")]
)
def test_the_stream_and_the_values_are_rotated(norm: str, stage: str) -> None:
    net = with_outliers(NORMS[norm])
    model, note = rotated(net, stage)
    torch.testing.assert_close(bypassed(model, IDS), net(IDS), rtol=1e-11, atol=1e-11)
    assert "folded 3 norms; rotated (error " in note
    assert "rotated): table, o, down; " in note
    assert "rotated): v; rotated at run time: down; not rotated, because an operator treats each" in note
    now, before = (m.get_submodule("table").weight.detach() for m in (model, net))
    torch.testing.assert_close(now @ now.mT, before @ before.mT)
    assert now.abs().max() < 0.5 * before.abs().max()
    assert [slot.path for slot in weight_slots(model) if slot.module.has_slots] == ["down"]


def test_outliers_no_longer_hurt() -> None:
    net, errors = with_outliers(), {}
    for stages in ([], ["quarot:online=False"], ["quarot"], ["spinquant:steps=10,seeds=1"]):
        model = tq.quantize(net, RULES, IDS)
        ptq.run(model, [*stages, "calibrate", "nearest"], [IDS])
        with torch.no_grad():
            errors["".join(stages)] = float((model(IDS) - net(IDS)).square().mean())
    assert errors["quarot"] < 0.4 * errors[""]
    assert errors["quarot:online=False"] < errors[""]
    assert errors["spinquant:steps=10,seeds=1"] < 0.4 * errors[""]


@pytest.mark.parametrize("norm", ["rms", "layer norm"])
def test_learning_keeps_rotations_and_lowers_the_error(norm: str) -> None:
    model = tq.quantize(with_outliers(NORMS[norm]), RULES, IDS)
    ptq.run(model, ["fold_norm"], [IDS])
    sets, _ = rotation_sets(model, IDS)
    assert [(one.size, one.keeps_mean) for one in sets] == [(16, norm == "layer norm"), (4, False)]
    for one in measured(model, sets, [IDS]):
        start = start_of(one.found.size, one.found.keeps_mean, torch.Generator().manual_seed(0))
        learned = one.learned(start, 10, 0.05)
        for rotation in (start, learned):
            torch.testing.assert_close(rotation @ rotation.mT, torch.eye(len(start)).double(), rtol=0, atol=1e-10)
            if one.found.keeps_mean:
                torch.testing.assert_close(rotation.sum(0), torch.ones(len(start)).double(), rtol=0, atol=1e-10)
        assert one.error(learned) < one.error(start)


def test_batches_are_not_needed_for_one_rotation() -> None:
    net = with_outliers()
    weights = [{"types": ["Linear"], "weight": "affine:4/channel"}]
    model = tq.quantize(net, weights, IDS)
    note = ptq.run(model, ["quarot"]).steps[0].note
    assert "rotated: table, o, down; rotated: v; rotated at run time: down" in note
    torch.testing.assert_close(bypassed(model, IDS), net(IDS), rtol=1e-11, atol=1e-11)
    with pytest.raises(ConfigError, match="spinquant looks at inputs and needs batches, got none"):
        ptq.run(tq.quantize(net, weights, IDS), ["spinquant"])


class PostNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(20, 16), nn.LayerNorm(16)
        self.a, self.b, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 20, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = self.norm(x + self.b(torch.relu(self.a(x)))) * torch.arange(1.0, 17.0)
        y: Tensor = self.head(x)
        return y


def test_what_cannot_be_rotated_is_said_and_stays_tied() -> None:
    torch.manual_seed(0)
    net = PostNorm().eval()
    model, note = rotated(net, "quarot:online=False")
    assert "an operator treats each of its channels by itself: table, b, a" in note
    assert "rotated (" not in note
    assert model.get_submodule("head").weight is model.get_submodule("table").weight
    torch.testing.assert_close(bypassed(model, IDS), net(IDS), rtol=1e-5, atol=1e-5)
    for stage in ("quarot:seeds=0", "spinquant:steps=0", "spinquant:rate=0"):
        with pytest.raises(ConfigError, match=stage.partition("=")[0].partition(":")[2]):
            rotated(net, stage)


def test_a_tied_head_gets_its_own_table() -> None:
    net = with_outliers()
    net.get_submodule("head").weight = net.get_submodule("table").weight
    model, note = rotated(net, "quarot")
    assert note.startswith("head has a table of its own now; folded 3 norms; rotated (error ")
    torch.testing.assert_close(bypassed(model, IDS), net(IDS), rtol=1e-11, atol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "tied", "qwen2", "gemma", "opt", "vit"])
def test_models_of_transformers(name: str) -> None:
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    net, inputs = MODELS[name](hf)
    with torch.no_grad():
        for path, weight in net.named_parameters():
            if path.endswith(("embed_tokens.weight", "o_proj.weight", "out_proj.weight")) and weight.shape[-1] == 32:
                (weight if "embed" in path else weight.mT)[:, 7] *= 30.0
    wanted = logits(net.eval(), inputs)
    rules = [{"types": ["Linear"], "weight": "affine:4/channel", "input": "affine:4"}]
    errors = {}
    for stage in ("fold_norm", "quarot", "spinquant:steps=10"):
        model = tq.quantize(net, rules, inputs)
        said = str(ptq.run(model, [stage, "calibrate"], [inputs]))
        assert ("rotated (error" in said) == (stage != "fold_norm")
        with tq.qmodule_state(model, tq.QModuleState.BYPASSED):
            found = logits(model, inputs)
        assert float((found - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
        errors[stage] = float((logits(model, inputs) - wanted).square().mean())
    if name not in ("tied", "vit"):  # whose outliers are not in the stream alone
        assert errors["quarot"] < errors["fold_norm"] > errors["spinquant:steps=10"]


def head_norm(m: Any, x: Tensor) -> Tensor:
    h = m.a(x).unflatten(-1, (4, 4))
    h = h * (h.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
    y: Tensor = m.b(h.flatten(-2))
    return y


FORWARDS: dict[str, tuple[Callable[[Any, Tensor], Tensor], list[int], str]] = {
    "routed": (lambda m, x: m.b(m.a(x) * m.c(x)[..., :1].softmax(-1) / 3.0), [16], ""),
    "norm of each head": (head_norm, [4], ""),
    "sum and parameter": (lambda m, x: m.b(m.a(x) + m.c(x) + m.p), [16], ""),
    "gate": (lambda m, x: m.b(m.a(x) * m.c(x).sigmoid()), [], "an operator treats each of its channels by itself"),
    "relu": (lambda m, x: m.b(m.a(x).relu()), [], "an operator treats each of its channels by itself"),
    "half": (lambda m, x: m.b(m.a(x).roll(3, -1)), [], "its channels do not arrive in whole runs everywhere"),
    "output": (lambda m, x: m.b(h := m.a(x)) + h, [], "it is an output of the model"),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_every_rotation_of_a_found_set_keeps_the_function(name: str) -> None:
    forward, sizes, why = FORWARDS[name]
    torch.manual_seed(0)
    net, x = Net(forward, **{c: nn.Linear(16, 16) for c in "abc"}), torch.randn(3, 5, 16).double()
    net.p = nn.Parameter(torch.randn(1, 5, 16).double())
    model = tq.quantize(net.eval(), RULES, x)
    before = bypassed(model, x)
    sets, left = rotation_sets(model, x)
    assert [one.size for one in sets] == sizes
    assert not why or any(why in reason for _, reason in left)
    for one in sets:
        one.rotate(start_of(one.size, False, torch.Generator().manual_seed(0)))
        torch.testing.assert_close(bypassed(model, x), before, rtol=1e-11, atol=1e-11)
        assert not torch.allclose(model.get_submodule("a").weight, net.a.weight)
