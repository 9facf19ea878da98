"""One way to the weights of every QModule: what a slot shows is what QUANT_EVAL quantizes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import torchquant as tq
from torchquant.errors import ConfigError
from torchquant.qmodule import QModule, QModuleState, QOp, QWeights, QWrapper
from torchquant.qmodule.weights import weight_names
from torchquant.utils import weight_slots

WEIGHT = "affine:4,symmetric=narrow/channel"
X = torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(0))


def wrapped(layers: list[nn.Module], fold_bn: bool | str = False) -> QWrapper:
    for norm in layers[1:2]:
        nn.init.uniform_(norm.weight, 0.5, 2.0)  # type: ignore[arg-type]
        nn.init.uniform_(norm.running_var, 0.5, 2.0)  # type: ignore[arg-type]
    return QWrapper(layers, tq.make_quantizer(WEIGHT), fold_bn=fold_bn)


def with_weights(layer: nn.Module) -> QWeights:
    return QWeights(layer, {name: tq.make_quantizer(WEIGHT) for name in weight_names(layer)})


def weight_normed() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3))


IMAGES, ROWS, STEPS = (X,), (X[:, :, 0, :4],), (torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(1)),)
KINDS: dict[str, tuple[Callable[[], QModule], tuple[Tensor, ...]]] = {
    "conv": (lambda: wrapped([nn.Conv2d(4, 4, 3)]), IMAGES),
    "folded": (lambda: wrapped([nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)], "running"), IMAGES),
    "transposed": (lambda: wrapped([nn.ConvTranspose2d(4, 6, 3, groups=2)]), IMAGES),
    "transposed, folded": (lambda: wrapped([nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)], True), IMAGES),
    "weight norm": (lambda: wrapped([weight_normed()]), IMAGES),
    "linear": (lambda: wrapped([nn.Linear(4, 3)]), ROWS),
    "bilinear": (lambda: with_weights(nn.Bilinear(4, 4, 2)), ROWS * 2),
    "embedding": (lambda: with_weights(nn.Embedding(9, 4)), (torch.arange(9).view(3, 3),)),
    "lstm": (lambda: with_weights(nn.LSTM(4, 3, 2, bidirectional=True)), STEPS),
    "gru": (lambda: with_weights(nn.GRU(4, 3)), STEPS),
    "cell": (lambda: with_weights(nn.LSTMCell(4, 3)), (STEPS[0][0],)),
    "attention": (lambda: with_weights(nn.MultiheadAttention(4, 2)), STEPS * 3),
    "attention of other widths": (lambda: with_weights(nn.MultiheadAttention(4, 2, kdim=4, vdim=4)), STEPS * 3),
}


@pytest.fixture(params=KINDS)
def quantized(request: pytest.FixtureRequest) -> tuple[QModule, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    make, inputs = KINDS[request.param]
    module = make().eval()
    module.observe_weight()
    tq.set_qmodule_state(module, QModuleState.QUANT_EVAL)
    return module, inputs


def seen_in_forward(module: QModule, inputs: tuple[Tensor, ...]) -> dict[int, Tensor]:
    """What each weight quantizer is given in a forward, by the id of the quantizer."""
    seen: dict[int, Tensor] = {}

    def note(quantizer: nn.Module, args: Any, output: Tensor) -> None:
        seen[id(quantizer)] = args[0].detach().clone()

    handles = [slot.quantizer.register_forward_hook(note) for slot in module.weight_slots()]  # type: ignore[union-attr]
    with torch.no_grad():
        module(*inputs)
    for handle in handles:
        handle.remove()
    return seen


def test_a_slot_sees_what_the_quantizer_sees(quantized: tuple[QModule, tuple[Tensor, ...]]) -> None:
    module, inputs = quantized
    seen = seen_in_forward(module, inputs)
    assert len(module.weight_slots()) == len(seen)
    for slot in module.weight_slots():
        assert torch.equal(slot.seen(), seen[id(slot.quantizer)]), slot.name


def test_a_weight_that_is_set_is_what_the_quantizer_sees(quantized: tuple[QModule, tuple[Tensor, ...]]) -> None:
    module, inputs = quantized
    for slot in module.weight_slots():
        levels = slot.quantizer(slot.seen()).detach()  # type: ignore[misc]
        if slot.is_computed:
            with pytest.raises(ConfigError, match="weight is computed from other parameters"):
                slot.set_weight(levels)
            continue
        where = torch.zeros_like(levels, dtype=torch.bool)
        where.view(-1)[::2] = True
        before = slot.seen().detach().clone()
        slot.set_weight(levels, where)
        torch.testing.assert_close(slot.seen()[where], levels[where])
        assert torch.equal(slot.seen()[~where], before[~where])
        slot.set_weight(levels)
        torch.testing.assert_close(seen_in_forward(module, inputs)[id(slot.quantizer)], levels)


def test_another_quantizer_takes_the_weight(quantized: tuple[QModule, tuple[Tensor, ...]]) -> None:
    module, inputs = quantized
    for slot in module.weight_slots():
        slot.replace_quantizer(tq.make_quantizer("affine:2,symmetric=narrow/channel"))
    module.observe_weight()
    for slot in module.weight_slots():
        assert slot.quantizer is not None
        assert slot.quantizer.n_bits == 2
    assert seen_in_forward(module, inputs).keys() == {id(slot.quantizer) for slot in module.weight_slots()}


def test_keys_of_a_quantizer_begin_with_its_prefix(quantized: tuple[QModule, tuple[Tensor, ...]]) -> None:
    model = nn.Sequential(nn.Identity(), quantized[0])
    state = model.state_dict()
    for slot in weight_slots(model):
        assert slot.quantizer is not None
        own = slot.quantizer.state_dict()
        found = {key.removeprefix(slot.state_prefix) for key in state if key.startswith(slot.state_prefix)}
        assert found == own.keys() != set()
        assert slot.key == f"1.{slot.name}"


def test_the_gradient_of_what_is_seen_reaches_the_parameter(quantized: tuple[QModule, tuple[Tensor, ...]]) -> None:
    module, _ = quantized
    for slot in module.weight_slots():
        slot.seen().square().sum().backward()
    weights = [parameter for name, parameter in module.named_parameters() if name in weight_names(module.layer)]
    weights = weights or [p for name, p in module.named_parameters() if "weight" in name and not name.startswith("bn.")]
    assert weights
    assert all(parameter.grad is not None for parameter in weights)


def test_a_slot_does_not_age() -> None:
    layer = nn.Linear(4, 3)
    module = QWrapper(layer, tq.make_quantizer(WEIGHT))
    (slot,) = module.weight_slots()
    layer.weight = nn.Parameter(torch.ones(3, 4))
    module.weight_quantizer = tq.make_quantizer("affine:2")
    assert torch.equal(slot.seen(), torch.ones(3, 4))
    assert slot.quantizer is module.weight_quantizer


def test_weights_without_a_quantizer_have_slots_too() -> None:
    table = QWeights(nn.LSTM(2, 2), {"weight_hh_l0": tq.make_quantizer(WEIGHT)})
    assert [(slot.name, slot.quantizer is None) for slot in table.weight_slots()] == [
        ("weight_ih_l0", True),
        ("weight_hh_l0", False),
    ]
    table.weight_slots()[0].replace_quantizer(tq.make_quantizer("affine:4"))
    assert list(table.quantizers()) == ["weight_hh_l0", "weight_ih_l0"]
    assert QOp(torch.relu).weight_slots() == []


@pytest.mark.parametrize("prepare", [lambda net: prune.l1_unstructured(net, "weight", 0.5), nn.utils.spectral_norm])
def test_a_weight_that_a_hook_computes_is_computed(prepare: Callable[[nn.Module], object]) -> None:
    layer = nn.Linear(4, 3)
    prepare(layer)
    (slot,) = QWrapper(layer, tq.make_quantizer(WEIGHT)).weight_slots()
    assert slot.is_computed
    assert not QWrapper(nn.Linear(4, 3)).weight_slots()[0].is_computed
    parametrize.register_parametrization(other := nn.Linear(4, 3), "weight", nn.Tanh())
    assert QWrapper(other).weight_slots()[0].is_computed


def test_a_wrapper_without_quantizers_is_its_layer_in_every_state() -> None:
    layer = nn.Linear(4, 3)
    for module, inputs in ((QWrapper(layer), ROWS), (QOp(torch.relu), ROWS), (QWeights(nn.GRU(4, 3)), STEPS)):
        expected = module(*inputs)
        for state in QModuleState:
            module.state = state
            for ours, theirs in zip(module(*inputs), expected, strict=True):
                assert torch.equal(ours, theirs)
    assert torch.equal(QWrapper(layer)(*ROWS), layer(*ROWS))


def test_mode_is_the_state() -> None:
    wrapper = QWrapper(nn.Linear(4, 3))
    assert wrapper.mode is QModuleState.BYPASSED
    wrapper.mode = QModuleState.CALIBRATION
    assert wrapper.state is wrapper.mode is QModuleState.CALIBRATION
    with pytest.raises(ConfigError, match="state must be a QModuleState"):
        wrapper.mode = "calibrate"


def test_a_mode_of_the_layer_stays_its_own() -> None:
    """A wrapper is its layer: LSTM and EmbeddingBag have a `mode` that code reads."""
    lstm, bag = QWeights(nn.LSTM(2, 2)), QWeights(nn.EmbeddingBag(4, 2, mode="sum"))
    assert (lstm.mode, bag.mode) == ("LSTM", "sum")
    bag.mode = "max"
    assert bag.layer.mode == "max"
    bag.mode = QModuleState.QUANT_EVAL
    assert (bag.state, bag.mode) == (QModuleState.QUANT_EVAL, "max")


def test_nobody_outside_asks_for_the_kind_of_wrapper() -> None:
    package = Path(tq.__file__).parent
    asks = re.compile(r"isinstance\([^()]*\b(QWrapper|QWeights|QOp)\b")
    found = [
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if path.relative_to(package).parts[0] != "qmodule" and asks.search(path.read_text(encoding="utf-8"))
    ]
    assert found == []
