"""Transforms before a layer's input and low-rank products beside it: the float function stays, in every form."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

import torchquant as tq
from torchquant.errors import ConfigError
from torchquant.graph.own_inputs import read_own_input
from torchquant.qmodule import ChannelScale, ChannelSplit, InputTransform, LowRank, Rotation, float_state_dict

S = tq.QModuleState
TWO = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
LAYERS = {
    "linear": (lambda: nn.Linear(8, 6), (3, 5, 8)),
    "conv": (lambda: nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect"), (2, 8, 5, 5)),
    "unbatched": (lambda: nn.Conv1d(8, 6, 3, bias=False), (8, 7)),
    "grouped": (lambda: nn.Conv2d(8, 6, 3, groups=2, stride=2), (2, 8, 7, 7)),
    "transposed": (lambda: nn.ConvTranspose2d(8, 6, 3, groups=2), (2, 8, 4, 4)),
}


def steps(axis: int, seed: int = 0) -> list[InputTransform]:
    drawn = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (8,), generator=drawn) * 2.0 - 1.0
    return [Rotation(signs, [TWO, TWO], axis), ChannelScale(torch.rand(8, generator=drawn) + 0.5, axis)]


def put(wrapper: tq.QWrapper) -> None:
    """Put both transforms before a layer and move a part of rank 2 of its weight beside it."""
    for step in steps(wrapper.channel_axis):
        wrapper.transform_input(step)
    (slot,) = wrapper.weight_slots()
    rows, drawn = slot.rows(), torch.Generator().manual_seed(1)
    up = 0.1 * torch.randn(*rows.shape[:2], 2, generator=drawn, dtype=rows.dtype)
    down = torch.randn(len(rows), 2, rows.shape[2], generator=drawn, dtype=rows.dtype)
    slot.set_weight((rows - up @ down).reshape(slot.seen().shape))
    wrapper.set_low_rank(up, down)


class Reader(nn.Module):
    """Three layers read one value, which the sum reads too."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x + torch.softmax(self.q(x) @ self.k(x).mT, -1) @ self.v(x)))


RULES = [{"types": ["Linear"], "weight": "affine:4/channel", "input": "affine:8"}]
X = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return Reader().eval()


def with_slots(net: nn.Module, *paths: str) -> nn.Module:
    model = tq.quantize(net, RULES, X)
    for path in paths:
        read_own_input(model, path)
        put(model.get_submodule(path))  # type: ignore[arg-type]
    tq.calibrate(model, [X], with_targets=False)
    return model


@pytest.mark.parametrize("name", LAYERS)
def test_the_float_function_stays(name: str) -> None:
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer, x = make().double(), torch.randn(shape, dtype=torch.float64)
    expected, before = layer(x), layer.weight.detach().clone()
    wrapper = tq.QWrapper(copy.deepcopy(layer))
    put(wrapper)
    assert not torch.allclose(wrapper.weight, before)
    torch.testing.assert_close(wrapper(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(wrapper.fold()(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(wrapper.stored_weight_of(wrapper.float_weight_of(wrapper.weight)), wrapper.weight)
    wrapper.set_low_rank(None)
    wrapper.remove_input_transform()
    assert not wrapper.has_slots


def test_transforms_are_exact_inverses() -> None:
    weight, x = (torch.randn(5, 8, dtype=torch.float64) for _ in range(2))
    for step in steps(-1):
        torch.testing.assert_close(step(x) @ step.on_weight(weight).mT, x @ weight.mT, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(step.off_weight(step.on_weight(weight)), weight, rtol=1e-12, atol=1e-12)


def test_a_rotation_is_the_kronecker_product_of_its_matrices() -> None:
    first, second = torch.tensor([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]]), torch.tensor([[1.0, -2], [3, 5]])
    signs, x = torch.tensor([1.0, -1.0] * 6), torch.randn(4, 12, dtype=torch.float64)
    turned = Rotation(signs, [first, second])(x)
    whole = torch.kron(first, second).double() / 6**0.5
    expected = ((x * signs).unflatten(-1, (2, 6)) @ whole.mT).flatten(-2)
    torch.testing.assert_close(turned, expected, rtol=1e-12, atol=1e-12)


def test_a_folded_batch_norm() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6)), torch.randn(4, 8, 5, 5)
    net(x)
    expected = net.eval()(x)
    wrapper = tq.QWrapper(list(net), tq.make_quantizer("affine:8/channel"), fold_bn=True).eval()
    for step in steps(-3):
        wrapper.transform_input(step)
    torch.testing.assert_close(wrapper(x), expected)
    with pytest.raises(ConfigError, match="fold its batch norm permanently first"):
        wrapper.set_low_rank(torch.ones(1, 6, 1), torch.ones(1, 1, 72))


def test_layers_take_over_the_quantizer_of_their_input(net: nn.Module) -> None:
    model = with_slots(net, "q", "k")
    assert {path for path, m in model.named_modules() if isinstance(m, tq.QOp)} == {"quantize_x", "quantize_norm"}
    assert (model.q.input_quantizer, model.v.input_quantizer) != (None, None)
    assert model.v.input_quantizer is None
    observed = model.q.input_quantizer.observer.range_max
    assert observed == steps(-1)[1](steps(-1)[0](X)).max()
    model = with_slots(net, "q", "k", "v", "head")
    assert not any(isinstance(m, tq.QOp) for m in model.modules())
    with torch.no_grad():
        assert (model(X) - net(X)).square().mean() < 0.1 * net(X).square().mean()


def test_copies_checkpoints_and_the_way_back(net: nn.Module) -> None:
    model = with_slots(net, "q", "k", "v", "head")
    y, expected = model(X), net(X)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    assert torch.equal(torch.load(stored, weights_only=False)(X), y)
    assert torch.equal(copy.deepcopy(model)(X), y)
    fresh = tq.quantize(net, RULES, X)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.eval()(X), y)
    with tq.qmodule_state(model, S.BYPASSED):
        torch.testing.assert_close(model(X), expected)
    plain = Reader().eval()
    plain.load_state_dict(float_state_dict(model))
    torch.testing.assert_close(plain(X), expected)
    torch.testing.assert_close(model.plan.revert(model)(X), expected)
    with torch.no_grad():
        net.q.weight.mul_(-1.0)
    model.load_state_dict(net.state_dict())
    with tq.qmodule_state(model, S.BYPASSED):
        torch.testing.assert_close(model(X), net(X))


def test_a_checkpoint_without_the_slots_is_refused(net: nn.Module) -> None:
    model, other = with_slots(net, "q"), tq.quantize(net, RULES, X)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for strict in (True, False):
        with pytest.raises(ConfigError, match="q.input_transform is not in the checkpoint, and the weights there"):
            model.load_state_dict(other.state_dict(), strict=strict)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(RuntimeError, match="input_transform is not in the checkpoint"):
        model.q.load_state_dict(other.q.state_dict(), strict=False)
    assert other.load_state_dict(tq.quantize(net, RULES, X).state_dict()).missing_keys == []


@pytest.mark.parametrize(
    "state",
    [pytest.param(s, marks=() if s is S.QUANT_EVAL else pytest.mark.slow) for s in S],
)
def test_compiled_and_exported(state: S) -> None:  # type: ignore[valid-type]
    torch.manual_seed(0)
    wrapper = tq.QWrapper(
        nn.Linear(8, 6), tq.make_quantizer("affine:4/channel"), input_quantizer=tq.make_quantizer("affine:8", "input")
    )
    put(wrapper)
    tq.calibrate(wrapper, [X], with_targets=False)
    tq.set_qmodule_state(wrapper, state)
    expected = copy.deepcopy(wrapper)(X)
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(wrapper), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(X), expected)
    torch.testing.assert_close(torch.export.export(wrapper, (X,)).module()(X), expected)


def test_gradients_reach_the_weight_and_the_low_rank_product(net: nn.Module) -> None:
    model = with_slots(net, "q")
    tq.set_qmodule_state(model, S.QUANT_AWARE_TRAIN)
    model(X).sum().backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in (model.q.weight, model.q.low_rank.up, model.q.low_rank.down))


def test_half_types() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 6).bfloat16(), torch.randn(3, 8).bfloat16()
    wrapper = tq.QWrapper(copy.deepcopy(layer))
    put(wrapper)
    assert wrapper(x).dtype == torch.bfloat16
    torch.testing.assert_close(wrapper(x), layer(x), rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (lambda: ChannelScale(torch.ones(4)), "reads 8 channels on axis -1; the transform is for 4 on axis -1"),
        (lambda: ChannelScale(torch.ones(8), axis=-2), "the transform is for 8 on axis -2"),
        (lambda: ChannelScale(torch.ones(8), axis=1), "axis counts from the end"),
        (lambda: ChannelScale(torch.zeros(8)), "one finite number above 0 for each channel"),
        (lambda: Rotation(torch.ones(8), [torch.eye(3)]), "must be a multiple of 3, got signs"),
        (lambda: Rotation(torch.ones(8), []), "signs must be .K,. and matrices square"),
        (lambda: LowRank(torch.ones(3, 8), torch.ones(6, 2)), "down must be"),
    ],
)
def test_what_does_not_fit_is_refused(step: object, words: str) -> None:
    wrapper = tq.QWrapper(nn.Linear(8, 6))
    with pytest.raises(ConfigError, match=words):
        wrapper.transform_input(step())  # type: ignore[operator]
    assert not wrapper.has_slots


def test_more_of_what_is_refused() -> None:
    depthwise = tq.QWrapper(nn.Conv2d(8, 8, 3, groups=8))
    with pytest.raises(ConfigError, match="runs of 4 channels would mix groups of 1 channels"):
        depthwise.transform_input(steps(-3)[0])
    depthwise.transform_input(steps(-3)[1])
    rounded = tq.QWrapper(nn.Linear(8, 6), tq.make_quantizer("affine:4/channel"))
    rounded.weight_quantizer.pin(rounded.weight_slots()[0].seen())
    with pytest.raises(ConfigError, match="its weight has been rounded"):
        rounded.transform_input(steps(-1)[0])
    computed = tq.QWrapper(torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 6)))
    with pytest.raises(ConfigError, match="its weight is computed from other parameters"):
        computed.transform_input(steps(-1)[0])


INDEX = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 2, 2, 5])


@pytest.mark.parametrize("name", ["linear", "conv", "unbatched"])
def test_split_channels_leave_the_float_function(name: str) -> None:
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer, x = make().double(), torch.randn(shape, dtype=torch.float64)
    expected, before = layer(x), layer.weight.detach().clone()
    wrapper = tq.QWrapper(copy.deepcopy(layer))
    wrapper.transform_input(ChannelSplit(INDEX, wrapper.channel_axis))
    assert wrapper.weight.shape[1] == 11
    put_behind = ChannelScale(torch.linspace(0.5, 2.0, 11), wrapper.channel_axis)
    wrapper.transform_input(put_behind)
    torch.testing.assert_close(wrapper(x), expected, rtol=1e-12, atol=1e-12)
    assert wrapper.fold().weight.shape == before.shape
    torch.testing.assert_close(wrapper.fold()(x), expected, rtol=1e-12, atol=1e-12)
    fresh = tq.QWrapper(copy.deepcopy(layer))
    fresh.load_state_dict(wrapper.state_dict())
    assert torch.equal(fresh(x), wrapper(x))
    wrapper.remove_input_transform()
    torch.testing.assert_close(wrapper.weight.detach(), before, rtol=1e-12, atol=1e-12)


def test_split_channels_in_checkpoints_and_reverted(net: nn.Module) -> None:
    model, expected = tq.quantize(net, RULES, X), net(X)
    for path in ("q", "head"):
        read_own_input(model, path)
        model.get_submodule(path).transform_input(ChannelSplit(INDEX))  # type: ignore[operator]
    with tq.qmodule_state(model, S.BYPASSED):
        torch.testing.assert_close(model(X), expected, rtol=1e-5, atol=1e-6)
    assert {key: value.shape for key, value in float_state_dict(model).items()} == {
        key: value.shape for key, value in net.state_dict().items()
    }
    tq.calibrate(model, [X], with_targets=False)
    y = model(X)
    fresh = tq.quantize(net, RULES, X)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.eval()(X), y)
    fresh.load_state_dict(net.state_dict())
    assert torch.equal(fresh(X), y)
    with pytest.raises(ConfigError, match="input_transform is not in the checkpoint"):
        model.load_state_dict(tq.quantize(net, RULES, X).state_dict())
    reverted = model.plan.revert(model)  # type: ignore[union-attr, operator]
    assert reverted.q.weight.shape == (8, 8)
    assert reverted.q.in_features == 8
    torch.testing.assert_close(reverted(X), expected, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_split_is_said() -> None:
    wrapper = tq.QWrapper(nn.Conv2d(8, 8, 3, groups=2))
    with pytest.raises(ConfigError, match="groups of 4 channels cannot be split"):
        wrapper.transform_input(ChannelSplit(INDEX, -3))
    with pytest.raises(ConfigError, match="with each channel from 0 on"):
        ChannelSplit(torch.tensor([0, 2]))
