"""The pure functions against golden numbers, numpy oracles and known optima."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests import oracles
from tests.oracles import GOLDEN
from torchquant.errors import ConfigError
from torchquant.quantizers_functional import (
    affine_params,
    affine_quantize,
    esb_quantize,
    gradient_clip,
    qfmt_int_bits,
    qfmt_params,
    qfmt_quantize,
    ternary_params,
    ternary_quantize,
)
from torchquant.quantizers_functional._bits import pack_mask, unpack_mask
from torchquant.quantizers_functional.affine import quantize_uniform
from torchquant.quantizers_functional.esb import ESB_ALPHA, esb_decode, esb_encode, esb_max
from torchquant.quantizers_functional.uniform import uniform_codes

HALVES = [torch.float16, torch.bfloat16]


def double(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "symmetric"),
    [("affine_asym_u4", False), ("affine_sym_narrow_s4", "narrow"), ("affine_sym_full_s4", "full")],
)
def test_affine_golden(name: str, symmetric: bool | str) -> None:
    golden = GOLDEN["golden"][name]
    x = double(golden["x"])
    params = affine_params(x.min(), x.max(), golden["bits"], symmetric)
    assert float(params.delta) == pytest.approx(golden["scale"], rel=1e-12)
    assert int(params.zero_point) == golden["zero_point"]
    codes = uniform_codes(x, params.delta, params.qmin - params.zero_point, params.qmax - params.zero_point)
    assert (codes + params.zero_point).tolist() == golden["codes"]
    assert quantize_uniform(x, params).tolist() == pytest.approx(golden["dequant"], rel=1e-12)


@pytest.mark.parametrize("case", GOLDEN["golden"]["qfmt"], ids=lambda c: f"{c['n_bits']}b-{c['signed']}-{c['x']}")
def test_qfmt_golden(case: dict) -> None:
    x = double(case["x"])
    m = qfmt_int_bits(x.min(), x.max(), case["n_bits"], case["signed"], case["rule"])
    assert int(m) == case["int_bits"]
    params = qfmt_params(m, case["n_bits"], case["signed"], torch.float64)
    assert float(params.delta) == case["step"]
    y = qfmt_quantize(x, params.delta, params.qmin, params.qmax)
    assert (y / params.delta).tolist() == case["codes"]
    assert y.tolist() == case["dequant"]


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=30),
    bits=st.integers(1, 16),
)
def test_affine_equals_the_oracle_up_to_ties(values: list[float], bits: int) -> None:
    x = double(values)
    params = affine_params(x.min(), x.max(), bits)
    ours = affine_quantize(x, params.delta, params.zero_point, 2**bits).numpy()
    oracle = oracles.affine(x.numpy(), float(params.delta), int(params.zero_point), 2**bits)
    assert ours.tolist() == oracle.tolist()
    assert np.abs(ours - x.numpy()).max() <= float(params.delta) * (0.5 + 1e-9)


def test_rounds_half_to_even_then_adds_the_zero_point() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5])
    for zero_point in (0, 3):  # adding an odd zero point before rounding would flip every tie
        y = affine_quantize(x, 1.0, zero_point + 8, 32)
        assert y.tolist() == [0.0, 2.0, 2.0, 0.0, -2.0]


@pytest.mark.parametrize(("n_bits", "k"), list(ESB_ALPHA))
def test_esb_is_nearest_level_of_its_grid(n_bits: int, k: int) -> None:
    levels = oracles.esb_levels(n_bits, k)
    assert len(levels) == 2**n_bits - 1
    assert levels.max() == esb_max(n_bits, k)
    largest = levels.max()
    x = np.concatenate([np.linspace(-1.2, 1.2, 997) * largest, np.geomspace(1e-3, 1, 400) * largest])
    midpoints = (levels[1:] + levels[:-1]) / 2
    x = x[np.abs(x[:, None] - midpoints[None]).min(1) > 1e-9 * largest]
    assert esb_quantize(double(x), 1.0, n_bits, k).tolist() == oracles.nearest(x, levels).tolist()


@pytest.mark.parametrize(("n_bits", "k"), list(ESB_ALPHA))
def test_every_esb_code_round_trips_and_is_monotone(n_bits: int, k: int) -> None:
    largest = 2 ** (n_bits - 1) - 1
    codes = torch.arange(-largest, largest + 1, dtype=torch.int32)
    values = esb_decode(codes, n_bits, k, torch.float32)
    assert values.tolist() == oracles.esb_levels(n_bits, k).tolist()
    assert torch.equal(esb_encode(values, n_bits, k), codes)


def test_esb_4_1_is_fp4_with_ieee_ties() -> None:
    ties = GOLDEN["golden"]["e2m1_ties_half_even"]
    x = double([float(v) for v in ties])
    assert esb_quantize(x, 1.0, 4, 1).tolist() == list(ties.values())


@pytest.mark.parametrize("name", [n for n in GOLDEN["golden"]["schemes_on_small_vector"] if n.startswith("esb")])
def test_esb_golden(name: str) -> None:
    vector = GOLDEN["golden"]["schemes_on_small_vector"]
    n_bits, k = (int(v) for v in name.removeprefix("esb").split(","))
    alpha = ESB_ALPHA[n_bits, k] * vector["rms"]
    assert alpha == pytest.approx(vector[name]["alpha"], rel=1e-8)
    assert esb_quantize(double(vector["x"]), alpha, n_bits, k).tolist() == pytest.approx(vector[name]["y"], rel=1e-8)


def test_ternary_golden() -> None:
    vector = GOLDEN["golden"]["schemes_on_small_vector"]
    x = double(vector["x"])
    threshold, alpha = ternary_params(x[None])
    golden = vector["ternary_twn0.7"]
    assert float(threshold) == pytest.approx(golden["threshold"], rel=1e-12)
    assert float(alpha) == pytest.approx(golden["scale"], rel=1e-12)
    assert ternary_quantize(x, threshold, alpha).tolist() == pytest.approx(golden["y"], rel=1e-12)


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.floats(-100, 100).filter(lambda v: abs(v) > 1e-3), min_size=1, max_size=40))
def test_exact_ternary_has_the_least_error_of_all(values: list[float]) -> None:
    x = double(values)
    y = ternary_quantize(x, *ternary_params(x[None], "exact"))
    assert float((y - x).square().sum()) == pytest.approx(oracles.best_ternary(x.numpy()), rel=1e-9, abs=1e-9)


def test_a_value_at_the_ternary_threshold_is_zero() -> None:
    assert ternary_quantize(torch.tensor([0.5, 0.50001, -0.5]), 0.5, 2.0).tolist() == [0.0, 2.0, 0.0]


TOLERANCE = {7: 0.002, 8: 0.005}


@pytest.fixture(scope="module")
def gaussian() -> Tensor:
    return torch.from_numpy(oracles.gaussian_quantile_grid())


def mean_square(x: Tensor, y: Tensor) -> float:
    return float((x - y).square().mean())


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("table", "low"), [("uniform_midtread_narrow", 1), ("uniform_midtread_full_zp0", 0)])
def test_uniform_error_on_a_gaussian(gaussian: Tensor, table: str, low: int, bits: int) -> None:
    row = GOLDEN[table]["N(0,1)"][str(bits)]
    half = 2 ** (bits - 1)
    y = affine_quantize(gaussian, row["step"], half - low, 2 * half - low)
    assert mean_square(gaussian, y) == pytest.approx(row["mse"], rel=TOLERANCE.get(bits, 0.001))


@pytest.mark.parametrize(("n_bits", "k"), [pair for pair in ESB_ALPHA if pair[0] <= 8])
def test_esb_error_on_a_gaussian(gaussian: Tensor, n_bits: int, k: int) -> None:
    row = GOLDEN["esb"]["N(0,1)"][f"{n_bits},{k}"]
    assert ESB_ALPHA[n_bits, k] == pytest.approx(row["alpha"], rel=1e-8)
    y = esb_quantize(gaussian, row["alpha"], n_bits, k)
    assert mean_square(gaussian, y) == pytest.approx(row["mse"], rel=TOLERANCE.get(n_bits, 0.001))


def test_ternary_error_on_a_gaussian(gaussian: Tensor) -> None:
    row = GOLDEN["ternary_twn"]["N(0,1)"]
    for method, known in (("twn", row["rule_0.7"]), ("exact", row)):
        threshold, alpha = ternary_params(gaussian[None], method)
        assert float(alpha) == pytest.approx(known["scale"], rel=1e-3)
        assert mean_square(gaussian, ternary_quantize(gaussian, threshold, alpha)) == pytest.approx(
            known["mse"], rel=1e-3
        )


QUANTIZE = {
    "affine": lambda x, **kw: affine_quantize(x, 0.11, 5, 16, **kw),
    "qfmt": lambda x, **kw: qfmt_quantize(x, 0.125, -8, 7, **kw),
    "esb": lambda x, **kw: esb_quantize(x, 0.3, 4, 1, **kw),
    "ternary": lambda x, **kw: ternary_quantize(x, 0.4, 0.9, **kw),
}
INSIDE = {
    "affine": lambda x: ((x / 0.11).round() + 5 >= 0) & ((x / 0.11).round() + 5 <= 15),
    "qfmt": lambda x: ((x / 0.125).round() >= -8) & ((x / 0.125).round() <= 7),
    "esb": lambda x: x.abs() <= 0.3 * 6,
    "ternary": lambda x: x.abs() <= 1.35,
}


@pytest.mark.parametrize("name", QUANTIZE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
def test_gradients_are_the_written_formulas(name: str, dtype: torch.dtype) -> None:
    x = torch.linspace(-4, 4, 501, dtype=torch.float64).to(dtype)
    upstream = torch.randn(x.shape, dtype=torch.float64).to(dtype)
    work = x.float() if dtype in HALVES else x
    expected = {"ste": upstream, "clipped": upstream * INSIDE[name](work)}
    for gradient, grad in expected.items():
        leaf = x.clone().requires_grad_()
        QUANTIZE[name](leaf, gradient=gradient).backward(upstream)
        assert torch.equal(leaf.grad, grad)
        assert leaf.grad.dtype == dtype
    assert 0 < INSIDE[name](work).sum() < x.numel()


@pytest.mark.parametrize("name", QUANTIZE)
@pytest.mark.parametrize("gradient", ["ste", "clipped"])
@pytest.mark.parametrize("clamp", [(0.0, None), (0.0, 6.0), (-0.5, 0.5), (None, 0.25)])
def test_absorbing_a_clamp_equals_clamp_then_quantize(name: str, gradient: str, clamp: tuple) -> None:
    x = torch.cat([torch.linspace(-8, 8, 1601), torch.tensor([0.0, 6.0, -0.5, 0.5, 0.25])])
    upstream = torch.randn_like(x)
    fused, separate = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = QUANTIZE[name](fused, gradient=gradient, clamp=clamp)
    y.backward(upstream)
    low, high = clamp
    if clamp == (0.0, None):
        activated = torch.relu(separate)
    elif low is None:
        activated = -torch.relu(-separate + high) + high
    else:
        activated = torch.nn.functional.hardtanh(separate, low, high)
    QUANTIZE[name](activated, gradient=gradient).backward(upstream)
    assert torch.equal(y, QUANTIZE[name](x.clamp(*clamp)))
    assert torch.equal(fused.grad, separate.grad)


@pytest.mark.parametrize("name", QUANTIZE)
def test_output_is_on_the_grid_bit_for_bit_where_the_additive_trick_is_not(name: str) -> None:
    x = (3 * torch.randn(20_000)).requires_grad_()
    y = QUANTIZE[name](x)
    assert y.unique().numel() <= 16
    if name == "affine":
        additive = x + (y - x).detach()
        assert additive.unique().numel() > 16


@pytest.mark.parametrize("name", QUANTIZE)
def test_no_grad_and_unneeded_grad_build_no_graph(name: str) -> None:
    x = torch.randn(8, requires_grad=True)
    with torch.no_grad():
        assert not QUANTIZE[name](x).requires_grad
    assert not QUANTIZE[name](x.detach()).requires_grad


def test_parameters_per_channel_by_shape() -> None:
    x = torch.randn(3, 4, 5)
    delta = torch.tensor([0.1, 0.2, 0.3])
    zero_point = torch.tensor([3.0, 8.0, 0.0])
    together = affine_quantize(x, delta.view(3, 1, 1), zero_point.view(3, 1, 1), 16)
    for i in range(3):
        assert torch.equal(together[i], affine_quantize(x[i], delta[i], zero_point[i], 16))


def test_gradient_clip_passes_inside_and_stops_outside() -> None:
    x = torch.tensor([-5.0, -1.0, 0.0, 1.0, 1.01], requires_grad=True)
    y = gradient_clip(x, torch.tensor(-1.0), torch.tensor(1.0))
    y.backward(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert torch.equal(y, x)
    assert x.grad.tolist() == [0.0, 2.0, 3.0, 4.0, 0.0]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: affine_quantize(torch.ones(2), 1.0, 0, 1), "n_levels must be a whole number of at least 2, got 1"),
        (lambda: affine_quantize(torch.ones(2, dtype=torch.int32), 1.0, 0, 4), "only floating point"),
        (lambda: affine_quantize(torch.ones(2), 1.0, 0, 4, gradient="stee"), "no gradient 'stee'; did you mean 'ste'"),
        (lambda: esb_quantize(torch.ones(2), 1.0, 4, 3), r"got \(4, 3\)"),
        (lambda: affine_params(torch.tensor(0.0), torch.tensor(1.0), 0), "from 1 to 24, got 0"),
        (lambda: affine_params(torch.tensor(0.0), torch.tensor(1.0), 1, "narrow"), "from 2 to 24 with symmetric"),
        (lambda: affine_params(torch.tensor(0.0), torch.tensor(1.0), 4, "half"), "symmetric must be one of"),
        (lambda: qfmt_int_bits(torch.tensor(0.0), torch.tensor(1.0), 8, True, "ceil"), "rule must be one of nosat"),
        (lambda: ternary_params(torch.ones(1, 3), "best"), "method must be one of twn, exact"),
    ],
)
def test_bad_arguments_say_what_is_allowed(call: object, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        call()


@pytest.mark.parametrize("shape", [(0,), (1,), (7,), (8,), (3, 5), (2, 3, 5, 7), (16, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
def test_masks_pack_to_one_bit_an_element_and_back(shape: tuple, dtype: torch.dtype) -> None:
    mask = (torch.rand(shape) > 0.4).to(dtype)
    bits = pack_mask(mask)
    assert bits.numel() == -(-mask.numel() // 8)
    assert torch.equal(unpack_mask(bits, mask.shape, dtype), mask)


def test_a_clipped_gradient_saves_one_bit_an_element() -> None:
    saved = []
    x = torch.randn(1000, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):
        affine_quantize(x, 0.1, 8, 16, gradient="clipped", clamp=(0.0, None))
    assert saved == [125]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("grad_layout", ["contiguous", "channels_last"])
def test_the_clipped_gradient_in_every_memory_format(layout: str, grad_layout: str) -> None:
    formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    x = torch.randn(2, 3, 4, 5) * 2
    if layout == "transposed":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    else:
        x = x.contiguous(memory_format=formats[layout])
    leaf = x.clone().requires_grad_()
    upstream = torch.randn_like(x).contiguous(memory_format=formats[grad_layout])
    affine_quantize(leaf, 0.1, 8, 16, gradient="clipped").backward(upstream)
    assert torch.equal(leaf.grad, upstream * inside_4_bits(x))


def inside_4_bits(x: Tensor) -> Tensor:
    code = (x / 0.1).round() + 8
    return ((code >= 0) & (code <= 15)).to(x.dtype)


def test_a_clamp_below_the_grid_stays_on_the_grid() -> None:
    x = torch.tensor([-9.0, 0.0, 4.0])
    assert affine_quantize(x, 1.0, 0, 16, clamp=(None, -3.0)).tolist() == [0.0, 0.0, 0.0]


def test_a_format_without_a_known_scale_works_with_a_given_one() -> None:
    x = torch.linspace(-2, 2, 1001, dtype=torch.float64)
    y = esb_quantize(x, 1.0, 12, 10)  # e = 1: uniform with step 2**-10, up to 2 - 2**-10
    assert torch.equal(y, (x * 1024).round().clamp(-2047, 2047) / 1024)
