"""Requantization in its four arithmetics: published numbers, Python integers, fractions, ONNX Runtime's kernels."""

from __future__ import annotations

import platform
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.oracles import GOLDEN
from torchquant.deploy.integer.tensor import IntegerTensor
from torchquant.deploy.integer.values import Codes
from torchquant.errors import ConfigError
from torchquant.quantizers_functional.requantize import (
    ROUNDINGS,
    fixed_point,
    multiplier_of,
    requantize,
    requantize_product,
    requantize_sum,
)

VECTORS = GOLDEN["requant_golden"]["vectors"]
DISAGREEMENT = GOLDEN["requant_golden"]["disagreement_with_exact_half_even"]
NAMES = {"double": "double_rounding", "single": "single_rounding_half_up", "exact": "exact_half_even"}


# The oracles: Python integers, fractions, and numpy's float32. Nothing below calls torchquant before the tests do.


def mantissa_and_exponent(multiplier: float) -> tuple[int, int]:
    """(M0, e) by counting powers of two; M0 rounds half up."""
    exact, e = Fraction(multiplier), 0
    while exact >= 1:
        exact, e = exact / 2, e + 1
    while exact < Fraction(1, 2):
        exact, e = exact * 2, e - 1
    m0 = (exact * 2**31 + Fraction(1, 2)).__floor__()
    return (m0 // 2, e + 1) if m0 == 2**31 else (m0, e)


def truncated(x: int, divisor: int) -> int:
    return x // divisor if x >= 0 else -(-x // divisor)


def high_multiply(a: int, b: int) -> int:
    ab = a * b
    return min(truncated(ab + (2**30 if ab >= 0 else 1 - 2**30), 2**31), 2**31 - 1)


def rounding_shift(x: int, n: int) -> int:
    mask = 2**n - 1
    return (x >> n) + ((x & mask) > (mask >> 1) + (x < 0))


def requantized(acc: int, multiplier: float, rounding: str) -> int:
    """docs/algorithms.md G3 for one number. `acc << e` saturates where it leaves 32 bits."""
    if rounding == "ort":
        return int(np.rint(np.float32(acc) * np.float32(multiplier)))
    if rounding == "exact":
        return round(Fraction(float(Fraction(acc) * Fraction(multiplier))))  # one rounding to float64 on the way
    m0, e = mantissa_and_exponent(multiplier)
    if rounding == "single":
        return (acc * m0 + 2 ** (30 - e)) >> (31 - e)
    raised = min(max(acc << max(e, 0), -(2**31)), 2**31 - 1)
    return rounding_shift(high_multiply(raised, m0), max(-e, 0))


def float32_of(x: Fraction) -> Fraction:
    """Rounded once to a float32, half to even; x within the normal range."""
    unit = Fraction(2) ** (abs(x.numerator).bit_length() - x.denominator.bit_length() - 25)
    while abs(x) >= unit * 2**24:
        unit *= 2
    return round(x / unit) * unit


Term = tuple[int, float, int]


def added(a: Term, b: Term, scale: float, zero_point: int, rounding: str) -> int:
    """The code of the sum of two numbers (code, scale, zero point), before the clamp."""
    if rounding == "exact":
        real = sum(Fraction(s) * (q - z) for q, s, z in (a, b))
        return round(real / Fraction(scale)) + zero_point
    if rounding == "ort":
        (qa, ra, za), (qb, rb, zb) = [(q, float32_of(Fraction(s) / Fraction(scale)), z) for q, s, z in (a, b)]
        offset = float32_of(zero_point - float32_of(ra * za + float32_of(rb * zb)))
        return round(float32_of(qa * ra + float32_of(qb * rb + offset)))
    common = 2 * max(a[1], b[1])
    raised = sum(requantized((q - z) << 20, s / common, rounding) for q, s, z in (a, b))
    return requantized(raised, common / (scale * 2**20), rounding) + zero_point


def multiplied(acc: int, multiplier: float, zero_point: int, rounding: str) -> int:
    if rounding == "ort":
        return int(np.rint(np.float32(acc) * np.float32(multiplier) + np.float32(zero_point)))
    return requantized(acc, multiplier, rounding) + zero_point


def real(x: float) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


INT32 = st.integers(-(2**31), 2**31 - 1)
NEAR = st.integers(-1000, 1000)
ANY_MULTIPLIER = st.floats(2.0**-30, 2.0**4)
TIES = st.builds(lambda m, e: m * 2.0**-e, st.integers(1, 31), st.integers(0, 25))
MULTIPLIER = st.one_of(ANY_MULTIPLIER, TIES)
SCALE = st.one_of(
    st.floats(2.0**-10, 2.0, width=32),
    st.builds(lambda m, e: m * 2.0**-e, st.integers(1, 7), st.integers(0, 6)),
)
CODE = st.integers(0, 255)


@pytest.mark.parametrize("vector", VECTORS, ids=[str(v["M"]) for v in VECTORS])
@pytest.mark.parametrize("rounding", NAMES)
def test_published_numbers(vector: dict[str, Any], rounding: str) -> None:
    assert [int(part) for part in fixed_point(real(vector["M"]))] == [vector["M0"], vector["shift"]]
    assert requantize(torch.tensor(vector["x"]), real(vector["M"]), rounding).tolist() == vector[NAMES[rounding]]
    assert [requantized(x, vector["M"], rounding) for x in vector["x"]] == vector[NAMES[rounding]]


@pytest.mark.parametrize("multiplier", DISAGREEMENT)
@pytest.mark.parametrize("rounding", ["double", "single"])
def test_published_disagreement_with_half_to_even(multiplier: str, rounding: str) -> None:
    acc, m = torch.arange(-40000, 40001), real(float(multiplier))
    apart = (requantize(acc, m, rounding) - requantize(acc, m, "exact")).abs()
    expected = DISAGREEMENT[multiplier]
    assert int((apart > 0).sum()) == expected[f"{rounding}_differs"]
    assert int(apart.max()) == expected[f"{rounding}_max_abs"]


@pytest.mark.parametrize("rounding", ROUNDINGS)
@settings(max_examples=150, deadline=None)
@given(accs=st.lists(st.one_of(INT32, NEAR), min_size=1, max_size=12), multipliers=st.lists(MULTIPLIER, min_size=1))
@example(accs=[-(2**31), 2**31 - 1, 1, -1], multipliers=[16.0, 2.0**-30, 0.5, 1.0 - 2.0**-40])
def test_any_number_by_any_multiplier(rounding: str, accs: list[int], multipliers: list[float]) -> None:
    multipliers = multipliers[:3]
    got = requantize(torch.tensor(accs)[:, None], torch.tensor(multipliers, dtype=torch.float64), rounding)
    assert got.tolist() == [[requantized(acc, m, rounding) for m in multipliers] for acc in accs]


@settings(max_examples=150, deadline=None)
@given(acc=INT32, multiplier=MULTIPLIER)
def test_exact_is_the_nearest_whole_number(acc: int, multiplier: float) -> None:
    """To the 2**-53 of float64; of true ties the even one."""
    product = Fraction(acc) * Fraction(multiplier)
    got = int(requantize(torch.tensor(acc), real(multiplier), "exact"))
    assert abs(got - product) <= Fraction(1, 2) + abs(product) / 2**53
    if abs(product - round(product)) == Fraction(1, 2):
        assert got == round(product)


@settings(max_examples=150, deadline=None)
@given(multiplier=st.one_of(st.floats(2.0**-100, 2.0**30), TIES))
@example(multiplier=1.0 - 2.0**-40)
@example(multiplier=2.0**-126)
def test_fixed_point_is_the_multiplier_to_31_bits(multiplier: float) -> None:
    m0, e = (int(part) for part in fixed_point(real(multiplier)))
    assert (m0, e) == mantissa_and_exponent(multiplier)
    assert 2**30 <= m0 < 2**31
    assert abs(Fraction(m0) * Fraction(2) ** (e - 31) / Fraction(multiplier) - 1) <= Fraction(1, 2**31)


@pytest.mark.parametrize("bad", [0.0, -0.25, float("inf"), float("nan")])
@pytest.mark.parametrize("rounding", ["single", "double"])
def test_what_is_no_multiplier_is_refused(bad: float, rounding: str) -> None:
    with pytest.raises(ConfigError, match="above 0 and finite"):
        requantize(torch.tensor(3), torch.tensor([0.5, bad], dtype=torch.float64), rounding)


def test_a_rounding_without_a_name_is_refused() -> None:
    one = torch.tensor(1)
    for function, *args in (
        (requantize, one, real(0.5)),
        (requantize_product, one, real(0.5), one),
        (requantize_sum, [(one, real(1.0), one)] * 2, real(1.0), one),
    ):
        with pytest.raises(ConfigError, match="ort, exact, single, double, got 'up'"):
            function(*args, "up")


@pytest.mark.parametrize("rounding", ROUNDINGS)
@settings(max_examples=200, deadline=None)
@given(
    codes=st.lists(st.tuples(CODE, CODE), min_size=1, max_size=8),
    scales=st.tuples(SCALE, SCALE, SCALE),
    zeros=st.tuples(CODE, CODE, CODE),
)
@example(codes=[(0, 0), (255, 255), (255, 0)], scales=(0.5, 0.5, 1.0), zeros=(3, 5, 7))
@example(codes=[(180, 211)], scales=(1.0, 0.03125, 0.1875), zeros=(20, 138, 0))  # 865.5, of ratios that float64 rounds
def test_sums_of_two_grids(
    rounding: str, codes: list[tuple[int, int]], scales: tuple[float, ...], zeros: tuple[int, ...]
) -> None:
    a, b = torch.tensor(codes).T
    terms = [(q, real(s), torch.tensor(z)) for q, s, z in zip((a, b), scales[:2], zeros[:2], strict=True)]
    got = requantize_sum(terms, real(scales[2]), torch.tensor(zeros[2]), rounding)
    pairs = [((x, scales[0], zeros[0]), (y, scales[1], zeros[1])) for x, y in codes]
    assert got.tolist() == [added(x, y, scales[2], zeros[2], rounding) for x, y in pairs]


@pytest.mark.parametrize("rounding", ROUNDINGS)
@settings(max_examples=100, deadline=None)
@given(accs=st.lists(st.integers(-(2**16), 2**16), min_size=1, max_size=12), multiplier=MULTIPLIER, zero_point=CODE)
@example(accs=[1, 3, -1, -3], multiplier=0.5, zero_point=1)
def test_products_of_two_grids(rounding: str, accs: list[int], multiplier: float, zero_point: int) -> None:
    got = requantize_product(torch.tensor(accs), real(multiplier), torch.tensor(zero_point), rounding)
    assert got.tolist() == [multiplied(acc, multiplier, zero_point, rounding) for acc in accs]


@settings(max_examples=100, deadline=None)
@given(scale=SCALE, divisor=st.integers(1, 5000), output_scale=SCALE)
def test_multipliers_of_averages(scale: float, divisor: int, output_scale: float) -> None:
    for rounding in ("exact", "single", "double"):
        got = float(multiplier_of(real(scale), divisor, real(output_scale), rounding))
        assert got == float(Fraction(scale) / (Fraction(output_scale) * divisor))
    in_float = np.float32(scale) / (np.float32(output_scale) * np.float32(divisor))
    assert float(multiplier_of(real(scale), divisor, real(output_scale), "ort")) == float(in_float)


# ONNX Runtime, one kernel at a time

INT8, UINT8, FLOAT, INT32_TYPE = 3, 2, 1, 6
X86 = pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="other kernels elsewhere")


def scale_pair(generator: np.random.Generator) -> tuple[np.float32, ...]:
    """Three scales: small multiples of powers of two, of which many sums are ties, or any numbers."""
    if generator.random() < 0.7:
        return tuple(np.float32(generator.integers(1, 4) * 2.0 ** -generator.integers(1, 5)) for _ in range(3))
    return tuple(np.float32(v) for v in np.exp(generator.normal(size=3)))


class Kernel:
    """A model of one node, everything an input of it. `types`: of the inputs."""

    def __init__(self, op: str, types: list[int], domain: str = "com.microsoft", **attributes: Any) -> None:
        onnx = pytest.importorskip("onnx")
        runtime = pytest.importorskip("onnxruntime")
        names = [f"i{k}" for k in range(len(types))]
        node = onnx.helper.make_node(op, names, ["y"], domain=domain, **attributes)
        inputs = [onnx.helper.make_tensor_value_info(n, t, None) for n, t in zip(names, types, strict=True)]
        graph = onnx.helper.make_graph([node], "one", inputs, [onnx.helper.make_tensor_value_info("y", UINT8, None)])
        opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("com.microsoft", 1)]
        model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9)
        self.session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

    def __call__(self, *inputs: Any) -> Tensor:
        feeds = {f"i{k}": np.asarray(value) for k, value in enumerate(inputs)}
        return torch.from_numpy(self.session.run(None, feeds)[0]).to(torch.int64)


def bytes_of(generator: np.random.Generator, *shape: int) -> Any:
    return generator.integers(0, 256, shape, dtype=np.uint8)


def long(x: Any) -> Tensor:
    return torch.as_tensor(np.asarray(x).astype(np.int64))


def ties_of(steps: Tensor) -> int:
    return int(((steps.frac().abs() == 0.5) & (steps.abs() < 128)).sum())


@X86
def test_addition_and_product_are_onnx_runtimes() -> None:
    generator = np.random.default_rng(0)
    types = [UINT8, FLOAT, UINT8] * 2 + [FLOAT, UINT8]
    add, mul = Kernel("QLinearAdd", types), Kernel("QLinearMul", types)
    ties = 0
    for _ in range(300):
        a, b = bytes_of(generator, 500), bytes_of(generator, 500)
        (sa, sb, sy), (za, zb, zy) = scale_pair(generator), bytes_of(generator, 3)
        terms = [(long(q), real(float(s)), long(z)) for q, s, z in ((a, sa, za), (b, sb, zb))]
        expected = requantize_sum(terms, real(float(sy)), long(zy), "ort").clamp(0, 255)
        assert torch.equal(add(a, sa, za, b, sb, zb, sy, zy), expected)
        acc, scale = (terms[0][0] - long(za)) * (terms[1][0] - long(zb)), real(float(sa)) * real(float(sb))
        multiplier = multiplier_of(scale, 1, real(float(sy)), "ort")
        expected = requantize_product(acc, multiplier, long(zy), "ort").clamp(0, 255)
        assert torch.equal(mul(a, sa, za, b, sb, zb, sy, zy), expected)
        ties += ties_of(acc * multiplier)
    assert ties > 300


@X86
def test_convolution_is_onnx_runtimes() -> None:
    generator = np.random.default_rng(1)
    conv = Kernel("QLinearConv", [UINT8, FLOAT, UINT8] * 2 + [FLOAT, UINT8, INT32_TYPE], "", pads=[1, 1, 1, 1])
    ties = 0
    for _ in range(200):
        (sx, sw, sy), (zx, zw, zy) = scale_pair(generator), bytes_of(generator, 3)
        x, w = (
            bytes_of(generator, 2, 3, 6, 6) // 16 + zx // 16 * 15,
            bytes_of(generator, 4, 3, 3, 3) // 16 + zw // 16 * 15,
        )
        bias = generator.integers(-99, 99, 4)
        got = conv(x, sx, zx, w, sw, zw, sy, zy, bias.astype(np.int32))
        acc = F.conv2d((long(x) - int(zx)).double(), (long(w) - int(zw)).double(), long(bias).double(), padding=1)
        multiplier = multiplier_of(real(float(sx)) * real(float(sw)), 1, real(float(sy)), "ort")
        assert torch.equal(got, (requantize(acc.long(), multiplier, "ort") + int(zy)).clamp(0, 255))
        ties += ties_of(acc * multiplier)
    assert ties > 100


@X86
def test_average_pools_are_onnx_runtimes() -> None:
    generator = np.random.default_rng(2)
    types = [UINT8, FLOAT, UINT8, FLOAT, UINT8]
    whole = Kernel("QLinearGlobalAveragePool", types, channels_last=0)
    windows = {w: Kernel("QLinearAveragePool", types, kernel_shape=[2, w], strides=[2, w]) for w in (2, 3)}
    ties = 0
    for side, width in ((2, 2), (4, 2), (6, 3), (7, 2)) * 75:
        x = bytes_of(generator, 2, 5, side, 2 * width)
        (sx, _, sy), (zx, zy) = scale_pair(generator), bytes_of(generator, 2)
        ints, scale, out_scale = long(x) - int(zx), real(float(sx)), real(float(sy))
        multiplier = multiplier_of(scale, side * 2 * width, out_scale, "ort")
        sums = ints.sum((2, 3), keepdim=True)
        expected = (requantize(sums, multiplier, "ort") + int(zy)).clamp(0, 255)
        assert torch.equal(whole(x, sx, zx, sy, zy), expected)
        ties += ties_of(sums * multiplier)
        codes = IntegerTensor(Codes(ints, scale, long(zx), 255, "x"), ints.shape)
        average = F.avg_pool2d(codes, (2, width), (2, width)).value
        expected = average.on_grid(out_scale, long(zy), "ort").clamp(0, 255)
        assert torch.equal(windows[width](x, sx, zx, sy, zy), expected)
        ties += ties_of(average.ints * (scale / (2 * width * out_scale)))
    assert ties > 100
