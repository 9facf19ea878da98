"""One way to the weights of every QModule: what a slot shows is what QUANT_EVAL quantizes."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import torchquant as tq
from torchquant.errors import ConfigError, NonFiniteError, RoundingLostError
from torchquant.qmodule import QModule, QModuleState, QOp, QWeights, QWrapper
from torchquant.qmodule.weight_slots import WeightSlot
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
    "depthwise": (lambda: wrapped([nn.Conv2d(4, 8, 3, groups=4)]), IMAGES),
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


def rounded_by_chance(slot: WeightSlot) -> Tensor:
    """Each element of a weight rounded up or down, on the numbers that are pinned."""
    assert slot.quantizer is not None
    slot.quantizer.pin(slot.seen())
    below, above = slot.quantizer.neighbours(slot.seen())
    generator = torch.Generator().manual_seed(2)
    return torch.where(torch.rand(below.shape, generator=generator) < 0.5, below, above)


def test_rows_are_the_groups_of_output_channels(quantized: tuple[QModule, tuple[Tensor, ...]]) -> None:
    module, _ = quantized
    for slot in module.weight_slots():
        seen = slot.seen()
        groups = 3 if slot.name == "in_proj_weight" else getattr(module.layer, "groups", 1)
        assert slot.rows().shape == (groups, len(seen) // groups, seen[0].numel())
        assert torch.equal(slot.rows().flatten(), seen.flatten())


def test_rows_times_patches_are_the_output_of_every_group() -> None:
    """Row r of group g is what output channel g * rows + r multiplies its inputs by, also of a transposed layer."""
    for kind in (nn.Conv2d, nn.ConvTranspose2d):
        layer = kind(4, 6, 1, groups=2, bias=False)
        (slot,) = wrapped([layer]).weight_slots()
        by_group = X.unflatten(1, (2, 2)).permute(1, 2, 0, 3, 4)
        expected = torch.einsum("grk,knhwg->ngrhw", slot.rows(), by_group.movedim(0, -1)).flatten(1, 2)
        torch.testing.assert_close(layer(X), expected)


def test_what_is_committed_is_what_quant_eval_has(quantized: tuple[QModule, tuple[Tensor, ...]]) -> None:
    module, inputs = quantized
    for slot in module.weight_slots():
        values = rounded_by_chance(slot)
        if slot.is_computed:
            with pytest.raises(ConfigError, match="weight is computed from other parameters"):
                slot.commit(values)
            return
        slot.commit(values.view_as(slot.rows()))
        assert slot.quantizer.is_pinned  # type: ignore[union-attr]
        module.observe_weight()
        assert torch.equal(slot.quantizer(slot.seen()), values)  # type: ignore[misc]
        slot.commit(values)
    other = copy.deepcopy(module)
    fresh = {slot.name: slot for slot in other.weight_slots()}
    other.load_state_dict(module.state_dict())
    seen = seen_in_forward(module, inputs)
    for slot in module.weight_slots():
        assert slot.quantizer is not None
        assert torch.equal(slot.quantizer(seen[id(slot.quantizer)]), fresh[slot.name].quantizer(slot.seen()))  # type: ignore[misc]


@pytest.mark.parametrize(
    "spec", ["mxfp4", "nvfp4", "affine:4/group=5", "ttq/channel", "esb:4,k=1", "apot:4/channel", "residual:3", "lsq:2"]
)
@pytest.mark.parametrize("fold_bn", [False, "running"])
def test_any_scheme_keeps_a_rounding(spec: str, fold_bn: bool | str) -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)]
    module = wrapped(layers, fold_bn).eval()
    module.weight_quantizer = tq.make_quantizer(spec)
    (slot,) = module.weight_slots()
    values = rounded_by_chance(slot)
    slot.commit(values)
    tq.set_qmodule_state(module.train(), QModuleState.QUANT_AWARE_TRAIN)
    module.observe_weight()
    assert torch.equal(module.weight_quantizer(slot.seen()), values)
    assert torch.equal(module.weight_quantizer.decode(module.weight_quantizer.encode(slot.seen())), values)


def test_a_commit_keeps_the_numbers_there_are() -> None:
    """A scale that was fitted or set is not measured anew."""
    module = wrapped([nn.Linear(4, 3)])
    (slot,) = module.weight_slots()
    quantizer = module.weight_quantizer
    module.observe_weight()
    quantizer.set_numbers(range_min=torch.full((3,), -0.25), range_max=torch.full((3,), 0.25))
    values = quantizer(slot.seen()).detach()
    slot.commit(values)
    assert torch.equal(quantizer(slot.seen()), values)
    assert quantizer.numbers()["range_max"].tolist() == [0.25] * 3


def test_dorefa_commits_levels_in_units_of_its_own() -> None:
    module = wrapped([nn.Linear(8, 3)])
    module.weight_quantizer = tq.make_quantizer("dorefa:3")
    (slot,) = module.weight_slots()
    module.observe_weight()
    values = module.weight_quantizer.levels()[torch.randint(8, (3, 8), generator=torch.Generator().manual_seed(0))]
    slot.commit(values)
    assert torch.equal(module.weight_quantizer(slot.seen()), values)


def test_a_rounding_that_is_lost_is_said_and_undone() -> None:
    module = wrapped([nn.Linear(4, 3)])
    (slot,) = module.weight_slots()
    before = slot.weight.detach().clone()
    values = slot.seen().detach() + 0.01
    with pytest.raises(
        RoundingLostError, match=r"weight: 1?\d of 12 values are not levels of AffineQuantizer"
    ) as caught:
        slot.commit(values)
    assert "Use values from neighbours, nearest or quantize" in str(caught.value)
    assert torch.equal(slot.weight, before)
    assert not module.weight_quantizer.is_pinned
    with pytest.raises(NonFiniteError):
        slot.commit(torch.full_like(values, float("nan")))
    assert torch.equal(slot.weight, before)
    with pytest.raises(ConfigError, match=r"values must be of shape \(1, 3, 4\) or \(3, 4\), got \(3, 3\)"):
        slot.commit(torch.zeros(3, 3))
    with pytest.raises(ConfigError, match="weight has no quantizer, so that it has no levels"):
        QWrapper(nn.Linear(4, 3)).weight_slots()[0].commit(values)


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
