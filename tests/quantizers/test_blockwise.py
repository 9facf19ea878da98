"""Numbers for each input channel and each block of a weight."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor, nn

import torchquant as tq
from torchquant.errors import ConfigError, NoCodesError
from torchquant.quantizers import BlockwiseQuantizer

FAST = tuple(law for law in tq.quantizers.LAWS if law not in ("compiles", "keeps_device"))
TEXTS = ["affine:4,symmetric=narrow", "twn", "esb:4,k=1", "qfmt:4,signed", "lsq:4"]


def boxes(x: Tensor, sizes: tuple[int, ...]) -> list[tuple[slice, ...]]:
    """The places of all blocks, one after the other."""
    full = [n if size == -1 else size for n, size in zip(x.shape, (*sizes, *[-1] * x.ndim), strict=False)]
    starts = [range(0, n, size) for n, size in zip(x.shape, full, strict=True)]
    return [tuple(slice(i, i + n) for i, n in zip(at, full, strict=True)) for at in product(*starts)]


@pytest.mark.parametrize(
    ("granularity", "sizes"),
    [
        ("block=2x3", (2, 3)),
        ("block=-1x2", (-1, 2)),
        ("block=1x3x-1x1", (1, 3, -1, 1)),
        ("block=4", (4,)),
        ("block=-1x-1", (-1, -1)),
        ("block=1", (1,)),
        ("block=-1x1", (-1, 1)),
        ("in_channel", (-1, 1)),
    ],
)
@pytest.mark.parametrize("text", TEXTS)
def test_a_block_is_a_tensor_of_its_own(text: str, granularity: str, sizes: tuple[int, ...]) -> None:
    w = torch.randn(8, 6, 3, 3)
    quantizer = tq.make_quantizer(f"{text}/{granularity}")
    quantizer.allocate_for(w)
    parameters = [id(parameter) for parameter in quantizer.parameters()]
    quantizer.pre_observe(w)
    assert parameters == [id(parameter) for parameter in quantizer.parameters()]  # an optimizer that has them trains
    y = quantizer(w)
    for box in boxes(w, sizes):
        alone = tq.make_quantizer(text)
        alone.pre_observe(w[box])
        assert torch.equal(alone(w[box]), y[box])
    assert torch.equal(quantizer.decode(quantizer.encode(w)), y)
    fresh = tq.make_quantizer(f"{text}/{granularity}")
    fresh.load_state_dict(quantizer.state_dict(), strict=True)
    assert torch.equal(fresh(w), y)


def test_blocks_along_one_axis_are_slices_of_it() -> None:
    """Where blocks are what another granularity is, the spec makes that one, which files and kernels know."""
    made = {text: tq.make_quantizer(f"affine:4/block={text}") for text in ("-1", "1x-1", "-1x1", "-1x-1x1", "2")}
    assert [q.axis for q in made.values()] == [None, 0, 1, 2, None]
    assert [isinstance(q, BlockwiseQuantizer) for q in made.values()] == [False, False, False, False, True]


def test_blocks_of_a_row_are_groups() -> None:
    w = torch.randn(4, 32)
    for text in TEXTS:
        blocks, groups = (tq.make_quantizer(f"{text}/{g}") for g in ("block=1x8", "group=8"))
        blocks.pre_observe(w)
        groups.pre_observe(w)
        assert torch.equal(blocks(w), groups(w))
        assert blocks.side_bytes(w) == groups.side_bytes(w)


def test_blocks_keep_the_laws() -> None:
    report = tq.check_quantizer(tq.make_quantizer("lsq:3/block=-1x2x1"), laws=FAST)
    assert set(report.skipped) == {"per_channel", "levels_used"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "text", ["affine:4/block=2x3", "esb:4,k=1/block=2x3", "lsqplus:4,offset/block=2x3", "dorefa:4/block=-1x2"]
)
def test_blocks_keep_all_laws(text: str) -> None:
    tq.check_quantizer(tq.make_quantizer(text))


LAYERS = [nn.Conv2d(4, 8, 3, groups=2), nn.ConvTranspose2d(8, 4, 3, groups=2), nn.Linear(12, 8), nn.Embedding(8, 12)]


@pytest.mark.parametrize("text", ["lsq:4/in_channel", "affine:4,symmetric=narrow/block=2x2"])
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_layers_train_and_load(layer: nn.Module, text: str) -> None:
    net = nn.Sequential(layer)
    x = torch.randint(8, (5,)) if isinstance(layer, nn.Embedding) else torch.randn(2, layer.weight.shape[0], 12, 12)
    x = x[:, :4] if isinstance(layer, nn.Conv2d) else x
    model = tq.quantize(net, [{"weight": text}], x)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    tq.set_qmodule_state(model, tq.QModuleState.QUANT_AWARE_TRAIN)
    model(x).square().sum().backward()
    assert all(
        p.grad is not None and p.grad.isfinite().all() for group in optimizer.param_groups for p in group["params"]
    )
    tq.set_qmodule_state(model.eval(), tq.QModuleState.QUANT_EVAL)
    (slot,) = tq.utils.weight_slots(model)
    expected, seen = model(x), slot.seen()
    codes = slot.quantizer.quantize(seen)
    if text.startswith("lsq"):  # a step for each input channel of the layer, counted within its groups
        assert slot.quantizer.step.shape == seen.shape[1:2]
        stored = (
            layer.weight.shape[0] // layer.groups if isinstance(layer, nn.ConvTranspose2d) else layer.weight.shape[1]
        )
        assert seen.shape[1] == stored
    assert not torch.equal(codes, seen)
    fresh = tq.quantize(net, [{"weight": text}], x)
    fresh.load_state_dict(model.state_dict(), strict=True)
    tq.set_qmodule_state(fresh.eval(), tq.QModuleState.QUANT_EVAL)
    assert torch.equal(fresh(x), expected)


def test_compiled_without_breaks() -> None:
    wrapper = tq.QWrapper(nn.Conv2d(4, 8, 3), tq.make_quantizer("affine:4,symmetric=narrow/block=2x2"), None)
    tq.set_qmodule_state(wrapper, tq.QModuleState.QUANT_AWARE_TRAIN)
    x = torch.randn(2, 4, 6, 6)
    expected = wrapper(x)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(wrapper, fullgraph=True, backend="eager")(x), expected)


def test_what_has_no_such_blocks_is_refused_with_its_site() -> None:
    net, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)), torch.ones(1, 3, 8, 8)
    said = r"site '0'.*: blocks of 4x4 do not divide a weight of shape \(8, 3, 3, 3\)"
    with pytest.raises(ConfigError, match=said):
        tq.quantize(net, [{"weight": "affine:4/block=4x4"}], x)
    with pytest.raises(ConfigError, match="blocks of 1x1x1x1x1 do not divide a weight of shape"):
        tq.quantize(net, [{"weight": "affine:4/block=1x1x1x1x1"}], x)
    with pytest.raises(ConfigError, match=r"a weight of shape \(8,\) has no axis 1, along which AffineQuantizer"):
        tq.make_quantizer("affine:4/in_channel").allocate_for(torch.ones(8))
    for sizes in ((), (0,), (2, -2)):
        with pytest.raises(ConfigError, match="the sizes of a block"):
            BlockwiseQuantizer(tq.make_quantizer("affine:4/channel"), sizes)
    blockwise = tq.make_quantizer("affine:4/block=2x2")
    blockwise.pre_observe(torch.randn(4, 4))
    with pytest.raises(NoCodesError, match=r"cannot quantize columns alone: .* Call pin\(weight\) first"):
        blockwise.nearest(torch.ones(4, 1), torch.tensor([0]))


def test_a_report_shows_the_ranges_of_blocks_and_groups() -> None:
    net, x = nn.Sequential(nn.Linear(4, 4)), torch.ones(1, 4)
    net[0].weight.data.copy_(torch.arange(16.0).view(4, 4))
    for granularity, said in (
        ("block=2x2", "block_range_max 5..15 (4 parts)"),
        ("group=2", "whole_range_max 1..15 (8"),
    ):
        model = tq.quantize(net, [{"weight": f"affine:4/{granularity}"}], x)
        tq.observe_weights(model)
        assert said in str(tq.state_report(model))


def test_a_rule_may_be_a_dictionary() -> None:
    net, x = nn.Sequential(nn.Linear(4, 4)), torch.ones(1, 4)
    rule = {"scheme": "affine", "n_bits": 4, "granularity": "block=2x2"}
    assert isinstance(tq.quantize(net, [{"weight": rule}], x)[0].weight_quantizer, BlockwiseQuantizer)
    assert "affine:4/in_channel" in str(tq.QuantPlan.from_rules([{"weight": "affine:4/in_channel"}], net, x))
