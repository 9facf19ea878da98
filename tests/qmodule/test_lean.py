"""Lean training keeps less for backward, and gives the same gradients bit for bit."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import torchquant as tq
from torchquant.qmodule import recorder
from torchquant.quantizers._catalogue import weight_spec
from torchquant.quantizers._spec import find_scheme, schemes
from torchquant.quantizers_functional.formats import UniformGrid

WAYS = {"plain": (False, False), "lean": (True, False), "recompute": (True, True)}


@pytest.fixture(autouse=True)
def small_tensors_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "FEWEST_ELEMENTS", 16)


def rules(weight: str, acts: str) -> list[dict[str, str]]:
    return [{"weight": weight, "input": acts, "output": acts}]


W8A8 = rules("affine:8,symmetric=narrow/channel@clipped", "affine:8@clipped")


class Net(nn.Module):
    """Layers of all kinds: what is folded, pooled, added, shared, grouped, transposed, and read by several."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        self.left = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8), nn.SiLU())
        self.right = nn.Conv2d(8, 8, 1)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.act = nn.GELU()
        self.shared = nn.Linear(64, 64)
        self.norm = nn.LayerNorm(64)
        self.last = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = F.relu(self.left(x) + self.right(x))
        x = self.act(self.up(x)).flatten(2)
        x = self.norm(self.shared(F.relu(self.shared(x))))
        return self.last(x.mean(1))


def net(rules: Any = W8A8, dtype: torch.dtype = torch.float32, make: Callable[[], nn.Module] = Net) -> nn.Module:
    torch.manual_seed(0)
    model = tq.quantize(make().to(dtype), rules)
    with tq.qmodule_state(model, tq.QModuleState.CALIBRATION):
        model(images(dtype))
    tq.set_qmodule_state(model, tq.QModuleState.QUANT_AWARE_TRAIN)
    return model.train()


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


def gradients(model: nn.Module, lean: bool, recompute: bool, step: Callable[[nn.Module], Tensor]) -> list[Tensor]:
    """Return the loss and all gradients of one step of a copy of the model."""
    model = copy.deepcopy(model)
    tq.set_lean(model, lean, recompute=recompute)
    torch.manual_seed(2)
    loss = step(model)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def plain_step(model: nn.Module) -> Tensor:
    x = images(next(model.parameters()).dtype)
    return model(x).float().square().sum()


def assert_same_gradients(model: nn.Module, step: Callable[[nn.Module], Tensor] = plain_step) -> None:
    expected, *others = (gradients(model, *way, step) for way in WAYS.values())
    assert len(expected) > 1
    for found in others:
        assert len(found) == len(expected)
        assert all(bool(a.isfinite().all()) for a in expected)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def bytes_kept(model: nn.Module, lean: bool, recompute: bool = False) -> int:
    tq.set_lean(model, lean, recompute=recompute)
    held: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}

    def pack(x: Tensor) -> Tensor:
        held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        alive.append(x)
        return x

    alive: list[Tensor] = []
    with saved_tensors_hooks(pack, lambda x: x):
        loss = model(images()).sum()
    del loss
    return sum(size for pointer, size in held.items() if pointer not in own)


@pytest.mark.parametrize("name", [name for name, _ in schemes()])
def test_gradients_of_every_scheme(name: str) -> None:
    bits = next((n for n in (4, 2, 1, 8) if weight_spec(name, n)), None)
    weight = weight_spec(name, bits) if bits else None
    if weight is None:
        pytest.skip("a scheme of activations alone")
    acts = find_scheme(name)[0].typical_acts or "affine:{n}"
    assert_same_gradients(net(rules(weight, acts.format(n=bits))))


@pytest.mark.parametrize("acts", ["affine:1", "affine:2@clipped", "affine:4@clipped", "affine:8", "affine:12", "lsq:4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gradients_of_every_width_and_type(acts: str, dtype: torch.dtype) -> None:
    assert_same_gradients(net(rules("affine:4,symmetric=narrow/channel@clipped", acts), dtype))


def test_gradients_in_float16_of_levels_beyond_its_range() -> None:
    quantizer = tq.make_quantizer("affine:8@clipped")
    quantizer.observer.force_ranges(0.0, 1e5)
    model = tq.QWrapper(nn.Linear(512, 4).half(), input_quantizer=quantizer)
    model.state = tq.QModuleState.QUANT_EVAL
    with torch.no_grad():
        model.weight.fill_(1e-4)
    x = torch.linspace(0.0, 65504.0, 512).half()[None]
    assert_same_gradients(model, lambda model: model(x).float().sum() * 1e-4)


@pytest.mark.parametrize("rule", ["w8a8", "w4a4-lsq", "w8a8-transformer", "int8-ort"])
def test_gradients_of_rule_sets(rule: str) -> None:
    assert_same_gradients(net(rule))


@pytest.mark.parametrize("mode", ["running", "batch", "corrected", "rescale"])
def test_gradients_of_folded_batch_norms(mode: str) -> None:
    assert_same_gradients(net([{**W8A8[0], "fold_bn": mode}]))


def test_gradients_under_autocast() -> None:
    def step(model: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(images()).float().square().sum()

    assert_same_gradients(net(), step)


def test_gradients_in_channels_last() -> None:
    model = net().to(memory_format=torch.channels_last)
    x = images().to(memory_format=torch.channels_last)
    assert_same_gradients(model, lambda model: model(x).square().sum())


def test_gradients_of_frozen_batch_norms() -> None:
    model = net()
    tq.freeze_bn(model)
    assert_same_gradients(model)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_of_a_checkpointed_model(reentrant: bool) -> None:
    def step(model: nn.Module) -> Tensor:
        x = images().requires_grad_()
        y: Tensor = checkpoint(model, x, use_reentrant=reentrant)
        return y.square().sum()

    assert_same_gradients(net(), step)


def test_gradients_where_a_part_is_checkpointed() -> None:
    class Part(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = checkpoint(self.first, x, use_reentrant=False)
            return self.last(self.act(self.up(self.right(x))).flatten(2).mean(1))

    assert_same_gradients(net(make=Part))


def test_gradients_of_two_forwards_before_backward() -> None:
    """The second moves the ranges, which the first must not see."""
    assert_same_gradients(net(), lambda model: model(images()).square().sum() + model(3 * images() + 1).square().sum())


def test_gradients_of_a_layer_called_twice_with_other_ranges() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            first = self.conv(x)
            second = self.conv(5 * x)
            return first.exp() * second

    assert_same_gradients(net(make=Twice))


def test_a_copy_of_levels_has_their_scale_when_they_were_made() -> None:
    scale = torch.tensor(0.25).add_(0.25)  # has been written to, as statistics are
    grid = UniformGrid(scale, 0, -8, 7)
    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    value, lean = grid.quantize(x), recorder.LeanRecorder(False)
    lean.note_quantized(value, grid, x)
    scale.mul_(2.0)
    copied = value.t().contiguous()
    lean.note_input(copied)
    assert lean.knows(copied)
    assert torch.equal(recorder.unpack(lean.pack(copied.detach())), copied)


def test_second_derivatives() -> None:
    def step(model: nn.Module) -> Tensor:
        x = images().requires_grad_()
        (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return grad.square().sum()

    assert_same_gradients(net(), step)


class Padded(nn.Conv2d):
    """A convolution that pads with zeros itself, as those of EfficientNet do."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 0, 0, 1)), self.weight, self.bias)


class PaddedWithOnes(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 0, 0, 1), value=1.0), self.weight, self.bias)


@pytest.mark.parametrize("kind", [Padded, PaddedWithOnes])
def test_gradients_of_layers_that_pad(kind: type[nn.Conv2d]) -> None:
    def make() -> nn.Module:
        return nn.Sequential(kind(2, 16, 3), nn.ReLU(), kind(16, 8, 3), nn.ReLU())

    model = net(make=make)
    assert_same_gradients(model)
    assert bytes_kept(model, True) < (0.35 if kind is Padded else 0.9) * bytes_kept(model, False)


def test_gradients_of_attention() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
            self.linear = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            x = x.reshape(4, -1, 16)
            return F.gelu(self.linear(self.attention(x, x, x, need_weights=False)[0]))

    model = net(make=Block)
    assert_same_gradients(model)
    assert bytes_kept(model, True) < bytes_kept(model, False)


def test_less_is_kept() -> None:
    model = net()
    plain, lean, again = (bytes_kept(model, *way) for way in WAYS.values())
    assert again < lean < 0.6 * plain


def test_quantize_makes_lean_models_and_revert_makes_plain_ones() -> None:
    model = net()
    as_made = copy.deepcopy(model)
    hooks = len(as_made._forward_pre_hooks), len(as_made._forward_hooks)
    assert bytes_kept(copy.deepcopy(model), True) < bytes_kept(copy.deepcopy(model), False)
    assert hooks == (1, 1)
    reverted = model.plan.revert(model)
    assert not reverted._forward_pre_hooks
    assert not reverted._forward_hooks


def test_set_twice_is_set_once() -> None:
    model = net()
    tq.set_lean(model)
    tq.set_lean(model, recompute=True)
    assert len(model._forward_pre_hooks) == len(model._forward_hooks) == 1
    tq.set_lean(model, False)
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


def test_hooks_of_others_get_what_is_kept() -> None:
    def step(model: nn.Module) -> Tensor:
        with save_on_cpu():
            return model(images()).square().sum()

    assert_same_gradients(net(), step)


@pytest.mark.parametrize("recompute", [False, True])
def test_codes_that_hooks_of_others_have_copied_are_let_go(recompute: bool) -> None:
    codes: list[weakref.ref[Tensor]] = []

    def copied(x: Tensor) -> Tensor:
        if x.dtype == torch.uint8:
            codes.append(weakref.ref(x))
        return x.clone()

    model = net()
    tq.set_lean(model, True, recompute=recompute)
    with saved_tensors_hooks(copied, lambda x: x):
        loss = plain_step(model)
    assert codes
    assert not [code for code in codes if code() is not None]
    loss.backward()


def test_an_optimizer_step_before_backward_is_refused() -> None:
    model = net()
    loss = plain_step(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_levels_changed_in_place_are_kept_as_they_are() -> None:
    class Changes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(2, 8, 3), nn.Conv2d(8, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            x += 0.123
            return self.second(x)

    model = net(make=Changes)
    assert_same_gradients(model)


def test_a_nan_reaches_the_gradient() -> None:
    model = net()
    tq.set_qmodule_state(model, tq.QModuleState.QUANT_EVAL)
    x = images()
    x[0, 0, 0, 0] = float("nan")
    grads = gradients(model, True, False, lambda model: model(x)[1].nan_to_num().sum())
    first = dict(model.named_parameters())["first.0.weight"]
    assert any(g.shape == first.shape and bool(g.isnan().any()) for g in grads)


def test_a_forward_that_fails_leaves_nothing_behind() -> None:
    model = net()
    with pytest.raises(RuntimeError):
        model(torch.randn(1, 5, 8, 8))
    assert_same_gradients(model)
    x = torch.ones(2, requires_grad=True)
    y = x.exp()
    y.backward(torch.ones(2))  # no hooks are left that would keep it


def test_without_a_graph_nothing_is_recorded() -> None:
    model = net().eval()
    tq.set_qmodule_state(model, tq.QModuleState.QUANT_EVAL)
    with torch.no_grad():
        y = model(images())
    assert torch.equal(y, model(images()))


def test_copies_and_pickles() -> None:
    model = net()
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(images()), copy.deepcopy(model)(images()))
        assert len(again._forward_pre_hooks) == 1
