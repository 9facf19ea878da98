"""Spec strings: what they name, what they print, and what they refuse with which words."""

from __future__ import annotations

import pytest
import torch

import torchquant as tq
from torchquant.errors import ConfigError, NoCodesError, UnknownNameError
from torchquant.quantizers import QUANTIZERS, AffineQuantizer, GroupQuantizer
from torchquant.quantizers._spec import find_scheme, schemes
from torchquant.range_observers import BatchMinMax

TEXTS = [
    "affine:8",
    "affine:8,symmetric=narrow/channel",
    "affine:8,symmetric/tensor@clipped",
    "affine:4,observer=ema,momentum=0.99",
    "qfmt:8,signed",
    "qfmt:8,signed=false,allow_clip,rule=sat",
    "esb:4,k=1/channel@ewgs",
    "esb:4,k=1,delta=0.01/group=16@ewgs",
    "twn/channel",
    "affine:4/in_channel",
    "lsq:4/in_channel",
    "esb:4,k=1/block=4x-1@ewgs",
    "affine:8/block=-1x5x1",
    "ternary:2,method=exact/channel@clipped",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_spec_prints_back_to_itself_and_builds(text: str) -> None:
    spec = tq.QuantSpec.parse(text)
    assert str(spec) == text
    assert tq.QuantSpec.parse(str(spec)) == spec
    quantizer = tq.make_quantizer(text)
    w = torch.randn(8, 5, 3, 3)
    quantizer.pre_observe(w)
    y = quantizer(w)
    assert y.shape == w.shape
    assert torch.equal(quantizer.decode(quantizer.encode(w)), y)


def test_every_word_arrives_where_it_belongs() -> None:
    q = tq.make_quantizer("affine:4,symmetric=full,observer=ema,momentum=0.5/channel@clipped", site="output")
    assert (q.n_bits, q.symmetric, q.axis, q.observer.momentum) == (4, "full", 1, 0.5)
    assert isinstance(q.observer, tq.ExpAvgMinMax)
    assert q.gradient.name == "clipped"
    q = tq.make_quantizer("esb:6,k=2,delta=0.25/channel@ewgs")
    assert (q.n_bits, q.significant_bits, q.axis, q.momentum, q.gradient.delta) == (6, 2, 0, 0.0, 0.25)
    assert tq.make_quantizer("esb:6,k=2", site="input").momentum == 0.9
    assert tq.make_quantizer("twn").method == "twn"
    assert tq.make_quantizer("affine:8,symmetric=true").symmetric is True
    assert isinstance(tq.make_quantizer("affine:8", site="output").observer, tq.ExpAvgMinMax)
    assert isinstance(tq.make_quantizer("affine:8").observer, tq.BatchMinMax)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("affine:8/row", "granularity 'row' is not tensor, channel or group=G"),
        ("affine:8/group=0", "granularity 'group=0' is not"),
        ("affine:8/block=4x0", "granularity 'block=4x0' is not .* block=AxB with whole sizes > 0 along the axes"),
        ("affine:8/block=4x-2", "granularity 'block=4x-2' is not"),
        ("affine:8/block", "granularity 'block' is not"),
        ("affine:8/in_channel=4", "granularity 'in_channel=4' is not"),
        ("mx:4,element=fp4_e2m1/in_channel", "mx works per tensor only"),
        ("affine:8/", "granularity '' is not"),
        ("affine:8@", "the gradient '' is not a name"),
        ("affine:8@magic", "affine takes the gradients clipped, dsq, ewgs, noise"),
        (":8", "the scheme '' is not a name"),
        ("affine:8,=3", "the argument '=3' is neither key=value nor a flag"),
        ("affine:8,symmetric=", "the argument 'symmetric=' is neither"),
        ("affine:8,symmetric,symmetric", "'symmetric' is given twice"),
        ("affine:8,colour=red", "affine has no colour; it has symmetric, observer"),
        ("affine", "affine needs n_bits"),
        ("affine:99", "n_bits must be a whole number from 1 to 24"),
        ("esb:4", "esb needs significant_bits"),
        ("esb:4,k=one", "significant_bits takes int, got 'one'"),
        ("esb:4,k", "significant_bits needs a value"),
        ("ternary:3", "ternary always has 2 bits"),
        ("twn,method=exact", "method is given twice, or fixed by twn"),
        ("qfmt:8", "qfmt needs signed"),
        ("esb:4,k=1,delta=-1@ewgs", "delta must be a number >= 0"),
        ("esb:4,k=1,delta=1@clipped", "esb has no delta; it has k, momentum, nonfinite"),
    ],
)
def test_what_is_wrong_is_named(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        tq.make_quantizer(text)


def test_an_unknown_scheme_is_told_the_nearest_and_the_known() -> None:
    with pytest.raises(UnknownNameError, match=r"no quantizer scheme 'afine'; did you mean 'affine'\?.*presets: .*twn"):
        tq.make_quantizer("afine:8")
    with pytest.raises(UnknownNameError, match="no range observer 'minmix'; did you mean 'minmax'"):
        tq.make_quantizer("affine:8,observer=minmix")
    with pytest.raises(ConfigError, match="site must be one of weight, input, output, got 'bias'"):
        tq.make_quantizer("affine:8", site="bias")
    with pytest.raises(ConfigError, match="groups are for weights"):
        tq.make_quantizer("affine:8/group=32", site="output")
    with pytest.raises(ConfigError, match="blocks of given sizes are for weights"):
        tq.make_quantizer("affine:8/block=4x4", site="input")
    with pytest.raises(ConfigError, match="in_channel is for weights; /channel gives each channel of an activation"):
        tq.make_quantizer("affine:8/in_channel", site="input")
    with pytest.raises(ConfigError, match="a spec must be a string"):
        tq.make_quantizer(8)  # type: ignore[arg-type]


def test_no_name_stands_for_two_things() -> None:
    names = [name for name, _ in schemes()] + [preset for _, cls in schemes() for preset in cls.presets]
    assert len(names) == len(set(names))
    for name in names:
        cls, fixed = find_scheme(name)
        assert issubclass(cls, tq.Quantizer)
        assert all(isinstance(key, str) for key in fixed)


def test_a_scheme_of_ones_own_has_a_spec_at_once() -> None:
    @QUANTIZERS.register("mine")
    class Mine(tq.TernaryQuantizer):
        presets = {"mine_exact": {"method": "exact"}}

    try:
        assert isinstance(tq.make_quantizer("mine,method=twn/channel@clipped"), Mine)
        assert tq.make_quantizer("mine_exact").method == "exact"
    finally:
        QUANTIZERS.unregister("mine")


@pytest.mark.parametrize("shape", [(4, 32), (4, 36), (3, 5, 3, 3), (2, 3)])
@pytest.mark.parametrize("text", ["affine:4,symmetric=narrow", "twn", "esb:4,k=1"])
def test_a_group_is_a_tensor_of_its_own(text: str, shape: tuple[int, ...]) -> None:
    w = torch.randn(shape)
    grouped = tq.make_quantizer(f"{text}/group=16")
    grouped.pre_observe(w)
    y = grouped(w)
    for row, got in zip(w.flatten(1), y.flatten(1), strict=True):
        for piece, found in zip(row.split(16), got.split(16), strict=True):
            alone = tq.make_quantizer(text)
            alone.pre_observe(piece)
            assert torch.equal(alone(piece), found)
    assert torch.equal(grouped.decode(grouped.encode(w)), y)
    fresh = tq.make_quantizer(f"{text}/group=16")
    fresh.load_state_dict(grouped.state_dict())
    assert torch.equal(fresh(w), y)


def test_groups_train_and_compile_in_a_wrapper() -> None:
    wrapper = tq.QWrapper(
        torch.nn.Conv2d(5, 4, 3), tq.make_quantizer("affine:4,symmetric=narrow/group=8@clipped"), None
    )
    tq.set_qmodule_state(wrapper, tq.QModuleState.QUANT_AWARE_TRAIN)
    x = torch.randn(2, 5, 6, 6)
    expected = wrapper(x)
    expected.sum().backward()
    assert wrapper.layer.weight.grad.isfinite().all()
    torch._dynamo.reset()
    assert torch.equal(torch.compile(wrapper, fullgraph=True, backend="aot_eager")(x), expected)


def test_a_group_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ConfigError, match="per channel on axis 0, got axis=None"):
        GroupQuantizer(tq.TernaryQuantizer(), 16)
    with pytest.raises(ConfigError, match="whole number > 0, got 0"):
        GroupQuantizer(tq.TernaryQuantizer(axis=0), 0)
    grouped = GroupQuantizer(tq.TernaryQuantizer(axis=0), 4)
    assert not grouped.is_ready
    with pytest.raises(NoCodesError):
        tq.Quantizer.encode(grouped, torch.ones(2))


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (
            "affine:4,observer=percentile,percentil=3",
            r"affine has no percentil \(did you mean 'percentile'\?\); .* symmetric, observer; its observer has",
        ),
        ("esb:4,k=1,mode=3", r"esb has no mode; it has k, momentum, nonfinite, center, observer\. A spec"),
    ],
)
def test_an_option_that_nobody_takes_is_refused_beside_those_there_are(spec: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        tq.make_quantizer(spec)


def test_an_option_without_a_declared_type_has_that_of_its_default() -> None:
    @QUANTIZERS.register("undeclared")
    class Undeclared(AffineQuantizer):
        def __init__(self, n_bits=4, axis=None, power=1.5, fold=False):  # type: ignore[no-untyped-def]
            super().__init__(n_bits, BatchMinMax(axis=axis))
            self.power, self.fold = power, fold

    try:
        made = tq.make_quantizer("undeclared:4,power=1.25,fold")
        assert (made.power, made.fold) == (1.25, True)
        with pytest.raises(ConfigError, match="power takes float, got 'high'"):
            tq.make_quantizer("undeclared:4,power=high")
    finally:
        QUANTIZERS.unregister("undeclared")
