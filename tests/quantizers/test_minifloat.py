"""Mini-floats against torch's float8 types, golden ties, ESB and the tables; NF4 against its constants."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import torchquant as tq
from tests import oracles
from tests.oracles import GOLDEN
from torchquant.errors import ConfigError
from torchquant.quantizers_functional import FloatFormat, minifloat_quantize
from torchquant.quantizers_functional.minifloat import (
    FORMATS,
    minifloat_bits,
    minifloat_decode,
    minifloat_encode,
    nearest_floats,
)
from torchquant.quantizers_functional.nf4 import NF4_LEVELS

TORCH = {
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
    "fp8_e4m3fnuz": torch.float8_e4m3fnuz,
    "fp8_e5m2fnuz": torch.float8_e5m2fnuz,
}


@pytest.mark.parametrize("name", TORCH)
def test_all_256_codes_agree_with_torch(name: str) -> None:
    form = FORMATS[name]
    patterns = torch.arange(256, dtype=torch.uint8)
    known = patterns.view(TORCH[name]).to(torch.float32)
    number = known.isfinite() & ~((known == 0) & (patterns >= 128))  # -0 shares the code of 0
    codes = minifloat_encode(known[number], form)
    assert torch.equal(minifloat_decode(codes, form, torch.float32), known[number])
    assert torch.equal(minifloat_bits(codes, form), patterns[number].to(torch.int32))
    assert codes.unique().numel() == int(number.sum()) == 2 * form.largest_code + 1


@pytest.mark.parametrize("name", TORCH)
def test_random_floats_round_as_torch_does(name: str) -> None:
    form = FORMATS[name]
    x = torch.randn(20000) * torch.logspace(-8, 6, 20000)
    x = x.clamp(-form.largest, form.largest)
    assert torch.equal(nearest_floats(x, form), x.to(TORCH[name]).to(torch.float32))


@pytest.mark.parametrize("name", FORMATS)
def test_formats_have_the_tabled_limits_and_values(name: str) -> None:
    row = GOLDEN["minifloat"].get(name) or GOLDEN["minifloat"][name + "fn"]
    form = FORMATS[name]
    assert form.largest == row["max"]
    positive = minifloat_decode(torch.arange(form.largest_code + 1), form, torch.float64)
    assert len(positive) == row["n_nonneg_values"]
    assert float(positive[1]) == row["min_subnormal"]
    assert bool((positive.diff() > 0).all())


def test_ties_go_to_even() -> None:
    for text, expected in GOLDEN["golden"]["e2m1_ties_half_even"].items():
        assert float(minifloat_quantize(torch.tensor(float(text)), 1.0, FORMATS["fp4_e2m1"])) == expected


def test_e2m1_is_esb_4_1() -> None:
    x = torch.randn(5000) * 3
    esb = tq.ESBQuantizer(4, 1)
    esb.force(0.7)
    assert torch.equal(minifloat_quantize(x, torch.tensor(0.7), FORMATS["fp4_e2m1"]), esb(x))


@pytest.mark.parametrize("name", ["fp4_e2m1", "fp6_e2m3", "fp6_e3m2", "fp8_e4m3", "fp8_e5m2", "fp8_e3m4"])
def test_error_on_a_gaussian(name: str) -> None:
    row = GOLDEN["minifloat"].get(name) or GOLDEN["minifloat"][name + "fn"]
    known = row["N(0,1)"]
    x = torch.from_numpy(oracles.gaussian_quantile_grid(2**18))
    y = minifloat_quantize(x, known["best_scale"], FORMATS[name])
    assert float((x - y).square().mean()) == pytest.approx(known["mse"], rel=5e-3)


def test_scales() -> None:
    x = torch.tensor([3.0, -0.1])
    for text, unit in (("fp4_e2m1", 0.5), ("fp4_e2m1,scale=pow2", 0.5), ("fp4_e2m1,scale=one", 1.0)):
        quantizer = tq.make_quantizer(text)
        quantizer.pre_observe(x)
        assert float(quantizer.unit) == unit, text
    quantizer = tq.make_quantizer("fp4_e2m1,scale=pow2")
    quantizer.pre_observe(x * 1.1)
    assert float(quantizer.unit) == 1.0  # rounded up, so that nothing overflows


def test_any_split_of_the_bits_has_a_spec() -> None:
    quantizer = tq.make_quantizer("minifloat:7,e=3,m=3,bias=2/channel")
    assert quantizer.form == FloatFormat(3, 3, 2)
    with pytest.raises(ConfigError, match="1 sign, 4 exponent and 3 fraction bits are 8 bits, not 7"):
        tq.make_quantizer("minifloat:7,e=4,m=3")
    with pytest.raises(ConfigError, match="1..5 exponent bits and 0..10 fraction bits"):
        tq.make_quantizer("minifloat:8,e=7,m=0")
    with pytest.raises(ConfigError, match="special must be one of none, fn, ieee, fnuz"):
        FloatFormat(4, 3, special="fin")
    with pytest.raises(ConfigError, match="scale must be one of"):
        tq.make_quantizer("fp4_e2m1,scale=big")


def test_nf4_levels_and_nearest() -> None:
    golden = GOLDEN["golden"]["nf4"]
    assert list(NF4_LEVELS) == golden["published"]
    quantizer = tq.make_quantizer("nf4")
    quantizer.force(1.0)
    levels = quantizer.levels()
    assert levels.tolist() == pytest.approx(golden["published"], abs=1e-7)
    x = torch.linspace(-1.2, 1.2, 3001)
    assert torch.allclose((quantizer(x) - x).abs(), (x[:, None] - levels).abs().amin(1), atol=1e-6)


def test_nf4_in_blocks_of_a_gaussian() -> None:
    x = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    for size, expected in ((32, 0.00762342), (64, 0.00846005)):
        quantizer = tq.make_quantizer(f"nf4/group={size}")
        quantizer.pre_observe(x)
        assert error(x, quantizer(x)) == pytest.approx(expected, rel=0.01)


def test_integers_in_blocks_of_a_gaussian() -> None:
    x = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    for n_bits, size, expected in ((4, 32, 0.00940973), (4, 128, 0.0137519), (8, 32, 2.85773e-05), (2, 16, 0.342548)):
        quantizer = tq.make_quantizer(f"affine:{n_bits},symmetric=narrow/group={size}")
        quantizer.pre_observe(x)
        assert error(x, quantizer(x)) == pytest.approx(expected, rel=0.01)


def error(x: Tensor, y: Tensor) -> float:
    return float((x - y).double().square().mean())


@pytest.mark.parametrize("name", ["fp4_e2m1", "fp6_e2m3", "fp6_e3m2"])
def test_the_scale_of_least_error_on_a_gaussian(name: str) -> None:
    x = torch.from_numpy(oracles.gaussian_quantile_grid(2**15)).to(torch.float64)
    errors = {}
    for scale in ("mse", "absmax", "pow2"):
        quantizer = tq.make_quantizer(f"{name},scale={scale}").double()
        quantizer.pre_observe(x)
        errors[scale] = float((quantizer(x) - x).square().mean())
    optimum = GOLDEN["minifloat"][name]["N(0,1)"]["mse"]
    assert errors["mse"] == pytest.approx(optimum, rel=0.02)
    assert errors["mse"] <= min(errors.values())
