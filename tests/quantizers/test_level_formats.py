"""Residual, codebook and block formats: golden numbers, known optima, other implementations."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor

import torchquant as tq
from tests import oracles
from tests.oracles import GOLDEN
from torchquant.errors import ConfigError
from torchquant.quantizers import CodebookQuantizer, MXQuantizer, NVFP4Quantizer, ResidualQuantizer
from torchquant.quantizers_functional import codebook_quantize, lloyd_max, residual_alphas, residual_levels
from torchquant.quantizers_functional.blocks import ELEMENTS, MODES, mx_exponents, mx_values

NUMPY_TYPES = {
    "fp4_e2m1": ml_dtypes.float4_e2m1fn,
    "fp6_e2m3": ml_dtypes.float6_e2m3fn,
    "fp6_e3m2": ml_dtypes.float6_e3m2fn,
    "fp8_e4m3": ml_dtypes.float8_e4m3fn,
    "fp8_e5m2": ml_dtypes.float8_e5m2,
}


@pytest.fixture(scope="module")
def gaussian() -> Tensor:
    return torch.from_numpy(oracles.gaussian_quantile_grid(2**16)).to(torch.float64)


def mse(x: Tensor, y: Tensor) -> float:
    return float((x - y).square().mean())


def test_residual_on_the_small_vector() -> None:
    golden = GOLDEN["golden"]["schemes_on_small_vector"]
    x = torch.tensor(golden["x"], dtype=torch.float64)
    quantizer = ResidualQuantizer(3, "greedy").double()
    quantizer.pre_observe(x)
    assert quantizer.alphas.tolist() == pytest.approx(golden["resq_greedy3"]["alphas"])
    assert quantizer(x).tolist() == pytest.approx(golden["resq_greedy3"]["y"])


@pytest.mark.parametrize("n_bits", range(1, 6))
def test_residual_scales_on_a_gaussian(gaussian: Tensor, n_bits: int) -> None:
    table = GOLDEN["residual_multibit"]["N(0,1)"]
    greedy = residual_alphas(gaussian[None], n_bits, "greedy")[0]
    assert greedy.tolist() == pytest.approx(table["greedy"][str(n_bits)]["alphas"], rel=2e-3)
    joint = residual_alphas(gaussian[None], n_bits, "alternating", iterations=200)[0]
    golden = table["joint_optimum"][str(n_bits)]
    error = mse(gaussian, codebook_quantize(gaussian, residual_levels(joint)))
    assert error == pytest.approx(golden["mse"], rel=0.01)
    if n_bits < 4:  # from four on there are several minima that differ by less than that
        assert sorted(joint.abs().tolist(), reverse=True) == pytest.approx(golden["alphas"], rel=0.03)


def test_residual_methods_only_gain(gaussian: Tensor) -> None:
    for x in (gaussian, gaussian.exp(), gaussian.relu()):
        errors = []
        for method, steps in (("greedy", 0), ("refined", 0), ("alternating", 1), ("alternating", 5)):
            alphas = residual_alphas(x[None], 3, method, steps)[0]
            errors.append(mse(x, codebook_quantize(x, residual_levels(alphas))))
        assert errors == sorted(errors, reverse=True)


def test_refined_scales_are_the_least_squares_ones() -> None:
    x = torch.randn(400, dtype=torch.float64)
    alphas, signs, left = [], [], x.numpy().copy()
    for _ in range(3):
        signs.append(np.where(left >= 0, 1.0, -1.0))
        alphas = np.linalg.lstsq(np.stack(signs, 1), x.numpy(), rcond=None)[0]
        left = x.numpy() - np.stack(signs, 1) @ alphas
    assert residual_alphas(x[None], 3, "refined")[0].tolist() == pytest.approx(alphas.tolist())


def test_defect_16_greedy_scales_are_those_that_were_subtracted() -> None:
    x = torch.randn(200, dtype=torch.float64)
    left = x.clone()
    for alpha in residual_alphas(x[None], 4, "greedy")[0]:
        assert float(alpha) == pytest.approx(float(left.abs().mean()))
        left = left - alpha * torch.where(left >= 0, 1.0, -1.0)


def test_eval_of_a_residual_quantizer_takes_the_nearest_sum() -> None:
    x = torch.randn(500)
    for method in ("greedy", "refined", "alternating"):
        quantizer = ResidualQuantizer(4, method)
        quantizer.pre_observe(x)
        nearest = (x[:, None] - quantizer.levels()).abs().amin(1)
        assert torch.allclose((quantizer.eval()(x) - x).abs(), nearest, atol=1e-6)


@pytest.mark.parametrize("distribution", ["N(0,1)", "Laplace(b=1)"])
@pytest.mark.parametrize("n_bits", range(1, 6))
def test_codebook_is_the_lloyd_max_optimum(gaussian: Tensor, n_bits: int, distribution: str) -> None:
    golden = GOLDEN["lloyd_max"][distribution][str(n_bits)]
    x = gaussian
    if distribution != "N(0,1)":
        x = torch.distributions.Laplace(0.0, 1.0).icdf((torch.arange(2**16, dtype=torch.float64) + 0.5) / 2**16)
    levels = lloyd_max(x[None], 2**n_bits, iterations=600)[0]
    assert mse(x, codebook_quantize(x, levels)) == pytest.approx(golden["mse"], rel=0.015)  # the tails
    if golden["positive_levels"]:
        assert levels[levels > 0].tolist() == pytest.approx(golden["positive_levels"], rel=0.03)


def test_codebook_is_no_worse_than_that_of_scipy() -> None:
    x = torch.randn(3000, dtype=torch.float64).exp()
    ours = mse(x, codebook_quantize(x, lloyd_max(x[None], 8)[0]))
    for seed in range(5):
        levels, _ = kmeans2(x.numpy()[:, None], 8, iter=100, minit="++", rng=seed)
        theirs = mse(x, codebook_quantize(x, torch.from_numpy(np.sort(levels[:, 0]))))
        assert ours < 1.1 * theirs


@pytest.mark.parametrize(
    "values", [[1.0, 2.0, 3.0], [0.0] * 50 + [1.0, 5.0, 9.0], [-1e-3, 4.0, 4.0, 4.0, 7.5, 1e4], [3.0] * 9]
)
def test_nothing_is_lost_with_as_many_levels_as_values(values: list[float]) -> None:
    x = torch.tensor(values)
    quantizer = CodebookQuantizer(3)
    quantizer.pre_observe(x)
    assert torch.allclose(quantizer(x), x, rtol=1e-6)


def test_a_codebook_can_hold_zero() -> None:
    x = torch.randn(4, 300) + 0.3
    quantizer = CodebookQuantizer(3, zero=True, axis=0)
    quantizer.pre_observe(x)
    assert bool((quantizer.levels() == 0).any(1).all())
    assert torch.equal(quantizer(torch.zeros(4, 2)), torch.zeros(4, 2))


def test_a_learned_codebook_gets_the_sum_over_each_code() -> None:
    x = torch.randn(3, 200, requires_grad=True)
    quantizer = CodebookQuantizer(2, learn=True, axis=0)
    quantizer.pre_observe(x)
    upstream = torch.randn(3, 200)
    quantizer(x).backward(upstream)
    codes = quantizer.encode(x.detach()).long()
    expected = torch.zeros(3, 4).scatter_add(1, codes, upstream)
    assert torch.allclose(quantizer.codebook.grad, expected, atol=1e-5)
    assert torch.equal(x.grad, upstream)
    before = quantizer.codebook.detach().clone()
    quantizer.pre_observe(5 * x)
    assert torch.equal(quantizer.codebook, before)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["fp4_e2m1", "fp8_e4m3"])
def test_mx_shared_exponent_golden(name: str, mode: str) -> None:
    for absmax, modes in GOLDEN["golden"]["mx_shared_exponent"][name].items():
        for dtype in (torch.float32, torch.float64):
            found = mx_exponents(torch.tensor(float(absmax), dtype=dtype), ELEMENTS[name], mode)
            assert int(found) == modes[mode], absmax
    assert int(mx_exponents(torch.tensor(0.0), ELEMENTS[name], mode)) == -127


@pytest.mark.parametrize("mode", ["floor", "rceil", "even"])
@pytest.mark.parametrize("name", ELEMENTS)
def test_mx_error_on_a_gaussian(name: str, mode: str) -> None:
    x = torch.randn(2**15, 32, generator=torch.Generator().manual_seed(1))
    y = MXQuantizer(ELEMENTS[name].n_bits, name, mode)(x)
    documented = {
        "fp4_e2m1": {"floor": 0.0132186, "rceil": 0.0133133, "even": 0.0125088},
        "fp6_e2m3": {"floor": 0.000805227, "rceil": 0.000802024, "even": 0.000796563},
        "fp6_e3m2": {"floor": 0.00291097, "rceil": 0.00279064, "even": 0.00279075},
        "fp8_e4m3": {"floor": 0.000862013, "rceil": 0.000704482, "even": 0.000762451},
        "fp8_e5m2": {"floor": 0.00291088, "rceil": 0.00279053, "even": 0.00279065},
        "int8": {"floor": 6.81477e-05},
    }[name]
    if mode in documented:
        assert mse(x, y) == pytest.approx(documented[mode], rel=0.01)


@pytest.mark.parametrize("name", NUMPY_TYPES)
def test_mx_elements_are_those_of_another_implementation(name: str) -> None:
    """Each block, scaled by its exponent and cast by ml_dtypes, after the clamp that OCP asks for."""
    x = torch.randn(500, 32) * torch.logspace(-6, 6, 500)[:, None]
    element = ELEMENTS[name]
    scale = 2.0 ** mx_exponents(x.abs().amax(1, keepdim=True), element).to(torch.float64)
    scaled = (x / scale).clamp(-element.largest, element.largest).to(torch.float32).numpy()
    expected = scaled.astype(NUMPY_TYPES[name]).astype(np.float32) * scale.numpy()
    assert np.array_equal(MXQuantizer(element.n_bits, name)(x).numpy(), expected)


@pytest.mark.parametrize("name", ELEMENTS)
def test_every_mx_code_stands_for_its_value(name: str) -> None:
    element = ELEMENTS[name]
    bits = torch.arange(2**element.n_bits, dtype=torch.int32)
    values = mx_values((127 << element.n_bits) + bits, element, torch.float32)
    if name in NUMPY_TYPES:
        with np.errstate(invalid="ignore"):
            expected = bits.numpy().astype(np.uint8).view(NUMPY_TYPES[name]).astype(np.float32)
    else:
        expected = bits.numpy().astype(np.uint8).view(np.int8) / 64.0
    usable = np.isfinite(expected) & (np.abs(expected) <= element.largest)
    assert np.array_equal(values.numpy()[usable], expected[usable])
    assert usable.sum() >= 2**element.n_bits - 8


def test_a_short_last_block_has_its_own_scale_and_no_padding_in_it() -> None:
    x = torch.randn(3, 70)
    x[:, 64:] *= 1e-3
    y = MXQuantizer(8, "fp8_e4m3")(x)
    assert mse(x[:, 64:], y[:, 64:]) < 4e-3 * float(x[:, 64:].square().mean())
    assert torch.equal(y[:, 64:], MXQuantizer(8, "fp8_e4m3")(x[:, 64:]))


def test_activations_are_cut_along_their_channels() -> None:
    quantizer = tq.make_quantizer("mxfp4", site="output")
    x = torch.randn(2, 40, 3, 3)
    y = quantizer(x)
    alone = MXQuantizer(4, "fp4_e2m1")(x.permute(0, 2, 3, 1).reshape(-1, 40))
    assert torch.equal(y.permute(0, 2, 3, 1).reshape(-1, 40), alone)
    assert quantizer(torch.randn(5, 40)).shape == (5, 40)


@pytest.mark.parametrize(
    ("two_level", "key"), [(False, "nvfp4_single_level_sigma1"), (True, "nvfp4_two_level_tensor_amax_5")]
)
def test_nvfp4_error_on_a_gaussian(two_level: bool, key: str) -> None:
    x = torch.randn(2**16, 16, generator=torch.Generator().manual_seed(2)).clamp(-5.0, 5.0)
    x[0, 0] = 5.0
    quantizer = NVFP4Quantizer(two_level)
    quantizer.pre_observe(x)
    golden = GOLDEN["block_formats_N01"][key]
    assert mse(x, quantizer(x)) == pytest.approx(golden["mse"] if isinstance(golden, dict) else golden, rel=0.01)


def test_nvfp4_against_ml_dtypes() -> None:
    x = torch.randn(300, 16) * 3
    quantizer = NVFP4Quantizer()
    quantizer.pre_observe(x)
    scale = np.float32(x.abs().max()) / np.float32(6 * 448)
    wanted = np.clip(np.abs(x.numpy()).max(1, keepdims=True) / (np.float32(6) * scale), 2.0**-6, 448)
    blocks = wanted.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    elements = np.clip(x.numpy() / (blocks * scale), -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert np.allclose(quantizer(x).numpy(), elements * (blocks * scale), rtol=1e-6)


def test_blocks_train_straight_through() -> None:
    layer = tq.QWrapper(torch.nn.Linear(64, 8), tq.make_quantizer("mxfp4"), None)
    tq.set_qmodule_state(layer, tq.QModuleState.QUANT_AWARE_TRAIN)
    layer(torch.randn(4, 64)).sum().backward()
    assert bool((layer.layer.weight.grad != 0).all())


def test_bytes_beside_the_codes() -> None:
    w = torch.randn(8, 64)
    expected = {
        "mxfp4": 8 * 2,
        "nvfp4": 8 * 4 + 4,
        "residual:3/channel": 8 * 3 * 4,
        "codebook:2/channel": 8 * 4 * 4,
        "affine:4,symmetric=narrow/group=32": 16 * 4,
        "affine:4/channel": 8 * 5,
        "clipq:3/channel": 8 * 4,
        "twn/channel": 8 * 4,
        "ttq/channel": 8 * 8,
    }
    for text, n_bytes in expected.items():
        quantizer = tq.make_quantizer(text)
        quantizer.pre_observe(w)
        assert quantizer.side_bytes(w) == n_bytes, text


def test_four_bits_on_a_gaussian_rank_as_they_should(gaussian: Tensor) -> None:
    """docs/algorithms.md H: from the best to the worst."""
    order = ["codebook:4,iterations=400", "residual:4,iterations=60", "ul2q:4", "lsq:4", "apot:4", "esb:4,k=1", "pot:4"]
    errors = []
    for text in order:
        quantizer = tq.make_quantizer(text).double()
        quantizer.pre_observe(gaussian)
        errors.append(mse(gaussian, quantizer(gaussian).detach()))
    assert errors == sorted(errors)
    decibels = (-10 * torch.tensor(errors).log10()).tolist()
    assert decibels == pytest.approx([20.22, 19.43, 19.38, 19.26, 19.17, 18.97, 14.23], abs=0.03)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("residual:9", "n_bits must be a whole number from 1 to 8"),
        ("residual:3,method=best", "method must be one of alternating, refined, greedy"),
        ("codebook:9", "n_bits must be a whole number from 1 to 8"),
        ("codebook:3,iterations=0", "iterations must be a whole number from 1"),
        ("mx:4,element=fp3", "element must be one of fp4_e2m1"),
        ("mx:8,element=fp4_e2m1", "fp4_e2m1 has 4 bits, not 8"),
        ("mxfp4,mode=up", "mode must be one of floor, rceil, ceil, even"),
        ("mxfp4,block=0", "block must be a whole number > 0"),
        ("mxfp4/channel", "mxfp4 works per tensor only"),
        ("mxfp4@clipped", "mxfp4 takes the gradients ste"),
    ],
)
def test_bad_settings_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tq.make_quantizer(text)


def test_a_block_format_has_no_one_list_of_levels() -> None:
    with pytest.raises(ConfigError, match="each block has its own"):
        tq.make_quantizer("mxfp4").levels()


def test_mx_saturates_at_the_end_of_float32() -> None:
    for mode in ("floor", "rceil", "ceil", "even"):
        quantizer = tq.make_quantizer(f"mxfp4,mode={mode}")
        x = torch.tensor([[3.2964854e38, -3.4e38]])
        assert bool(quantizer(x).isfinite().all())
        assert torch.equal(quantizer.decode(quantizer.encode(x)), quantizer(x))
