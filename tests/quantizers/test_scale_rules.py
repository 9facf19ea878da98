"""The scale of any format by the range of any observer: `esb:4,k=1,observer=percentile`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import torchquant as tq
from torchquant.errors import ConfigError
from torchquant.quantizers import LAWS
from torchquant.quantizers._scaled import ScaledQuantizer
from torchquant.range_observers import BatchMinMax

SPECS = [
    "esb:4,k=1,observer=percentile",
    "esb:4,k=1,center,observer=mse",
    "pot:4,observer=mse/channel",
    "fp8_e4m3,observer=histogram",
    "fp4_e2m1,observer=mse/channel",
    "nf4,observer=meanstd/channel",
    "twn,observer=mse",
    "xnor,observer=aciq",
    "ul2q:4,observer=percentile/channel",
    "vecq:3,observer=mse",
    "clipq:4,observer=minmax",
    "zoomq:3,observer=mse",
]
FAST = tuple(law for law in LAWS if law not in ("compiles", "keeps_device"))


@pytest.fixture
def x() -> Tensor:
    x = torch.randn(8, 400, generator=torch.Generator().manual_seed(0))
    x[0, 0] = 9.0
    return x


@pytest.mark.parametrize("text", SPECS)
def test_they_keep_the_laws(text: str) -> None:
    report = tq.check_quantizer(tq.make_quantizer(text), laws=FAST)
    assert set(report.skipped) == (set() if "channel" in text else {"per_channel"})


@pytest.mark.parametrize(
    "text", ["esb:4,k=1,observer=minmax", pytest.param("ul2q:4,observer=mse/channel", marks=pytest.mark.slow)]
)
def test_they_compile(text: str) -> None:
    tq.check_quantizer(tq.make_quantizer(text), laws=("compiles",))


@pytest.mark.parametrize("text", [spec for spec in SPECS if "percentile" not in spec and "meanstd" not in spec])
def test_the_largest_level_is_on_the_end_of_the_range(text: str, x: Tensor) -> None:
    quantizer = tq.make_quantizer(text)
    assert isinstance(quantizer, ScaledQuantizer)
    quantizer.pre_observe(x)
    low, high = quantizer.observer.get_ranges()
    levels = quantizer.levels()
    if quantizer.has_shift:
        torch.testing.assert_close(levels[..., 0], low)
        torch.testing.assert_close(levels[..., -1], high)
    else:
        torch.testing.assert_close(levels[..., -1], torch.maximum(-low, high))


@pytest.mark.parametrize(
    "name", ["esb:4,k=1", "esb:4,k=1,center", "pot:4", "fp4_e2m1", "nf4", "twn", "clipq:3", "vecq:2"]
)
def test_mse_looks_at_the_error_of_the_format_itself(name: str, x: Tensor) -> None:
    """No range among many has less error, to what the last factors and bins leave."""
    quantizer = tq.make_quantizer(f"{name},observer=mse")
    assert isinstance(quantizer, ScaledQuantizer)
    quantizer.pre_observe(x)
    found = float((quantizer(x) - x).square().sum())
    for factor in torch.linspace(0.02, 1.0, 200):
        other = quantizer.format_over(x.min() * factor, x.max() * factor).project(x)[0]
        assert found <= float((other - x).square().sum()) * 1.02, float(factor)


def test_an_activation_is_averaged_by_its_observer() -> None:
    quantizer = tq.make_quantizer("fp8_e4m3,observer=ema,momentum=0.5", "output")
    assert isinstance(quantizer, ScaledQuantizer)
    for largest in (1.0, 4.0):
        quantizer.pre_observe(torch.tensor([-largest, largest]))
    assert quantizer.observer.momentum == 0.5
    assert float(quantizer.levels()[-1]) == pytest.approx(float(quantizer.observer.get_ranges()[1]))
    assert float(quantizer.observer.get_ranges()[1]) == pytest.approx(3.0)


def test_a_clamp_is_observed_and_quantized_in_one_pass(x: Tensor) -> None:
    for rule in ("", ",observer=minmax"):
        fused, apart = (tq.make_quantizer(f"esb:4,k=1{rule}") for _ in range(2))
        assert fused.fuses_clamp
        fused.pre_observe(x, clamp=(0.0, 2.0))  # type: ignore[call-arg]
        apart.pre_observe(x.clamp(0.0, 2.0))
        assert torch.equal(fused(x, clamp=(0.0, 2.0)), apart(x.clamp(0.0, 2.0)))


def test_the_rule_of_the_scheme_stays_the_default(x: Tensor) -> None:
    quantizer = tq.make_quantizer("esb:4,k=1")
    quantizer.pre_observe(x)
    alone = quantizer(x)
    assert isinstance(quantizer, ScaledQuantizer)
    quantizer.set_observer(BatchMinMax())
    assert not quantizer.is_ready
    with pytest.raises(ConfigError, match="call observer.force_ranges"):
        quantizer.force(1.0)
    quantizer.observer.force_ranges(-3.0, 3.0)
    assert float(quantizer(x).max()) == 3.0
    quantizer.reset()
    assert not quantizer.is_ready
    assert float(alone.max()) != 3.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fp8_e4m3,scale=pow2,observer=mse", "scale=pow2 says where the scale comes from"),
        ("bnn,observer=mse", "scale=one says where the scale comes from"),
        ("ternary,method=exact,observer=mse", "method=exact says where the scale comes from"),
        ("esb:4,k=1,observer=mse,symmetric=narrow", "symmetric=narrow is for affine grids"),
        ("codebook:4,observer=mse", "codebook has no observer"),
        ("esb:4,k=1,percentile=99", "esb has no percentile .*; it has .*observer"),
    ],
)
def test_rules_that_contradict_each_other_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tq.make_quantizer(text)


def test_a_model_trains_saves_and_packs_with_it(tmp_path: object) -> None:
    layer = tq.QWrapper(
        torch.nn.Linear(16, 8),
        tq.make_quantizer("esb:4,k=1,observer=mse/channel"),
        tq.make_quantizer("fp8_e4m3,observer=histogram", "output"),
    )
    tq.set_qmodule_state(layer, tq.QModuleState.QUANT_AWARE_TRAIN)
    data = torch.randn(32, 16)
    layer(data).square().mean().backward()
    assert bool((layer.layer.weight.grad != 0).any())
    tq.set_qmodule_state(layer, tq.QModuleState.QUANT_EVAL)
    expected = layer(data)
    fresh = tq.QWrapper(
        torch.nn.Linear(16, 8),
        tq.make_quantizer("esb:4,k=1,observer=mse/channel"),
        tq.make_quantizer("fp8_e4m3,observer=histogram", "output"),
    )
    fresh.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(fresh(data), expected)
