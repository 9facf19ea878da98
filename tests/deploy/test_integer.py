"""The integer reference against whole numbers in numpy and Python, layer by layer; what it checks and refuses."""

from __future__ import annotations

import math
import operator
import platform
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchquant as tq
from tests.quantizers_functional.test_requantize import added, multiplied, requantized
from torchquant.deploy.integer.model import to_integer
from torchquant.errors import ConfigError, ExportError, NoAffineViewError
from torchquant.quantizers import QUANTIZERS, Quantizer
from torchquant.quantizers_functional.affine import AffineParams
from torchquant.quantizers_functional.requantize import ROUNDINGS

IntArray = Any


class Fixed(Quantizer):
    """A given grid. scale: one number, or one per channel of axis 0, like the zero point."""

    def __init__(self, scale: Any, zero_point: Any, ends: tuple[int, int] = (0, 255)) -> None:
        super().__init__()
        self.scale = torch.as_tensor(scale, dtype=torch.float32)
        self.zero_point = torch.as_tensor(zero_point, dtype=torch.int32)
        self.ends, self.n_bits, self.axis = ends, 8, 0 if self.scale.ndim else None

    def affine_params(self) -> AffineParams:
        return AffineParams(self.scale, self.zero_point, *self.ends)

    def along(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shape = [-1] + [1] * (x.ndim - 1) if self.scale.ndim else []
        return self.scale.view(shape), self.zero_point.view(shape) if self.zero_point.ndim else self.zero_point

    def encode(self, x: Tensor) -> Tensor:
        scale, zero_point = self.along(x)
        return (torch.round(x / scale) + zero_point).clamp(*self.ends).to(torch.int32)

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        scale, zero_point = self.along(codes)
        return ((codes - zero_point) * scale).to(dtype)

    def quantize(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x), x.dtype)

    @property
    def code_range(self) -> tuple[int, int]:
        return self.ends


Grid = tuple[float, int]


def rescaled(acc: IntArray, scales: list[Fraction], grid: Grid, rounding: str, divisor: int = 1) -> IntArray:
    """Sums (N, C, ...) onto a grid; scales: of all channels, or of each one."""
    out = np.empty_like(acc)
    for c in range(acc.shape[1]):
        scale = scales[c % len(scales)]
        multiplier = float(scale / (Fraction(grid[0]) * divisor))
        if rounding == "ort":
            multiplier = float(np.float32(float(scale)) / (np.float32(grid[0]) * np.float32(divisor)))
        out[:, c] = np.vectorize(lambda v, m=multiplier: requantized(int(v), m, rounding), otypes=[np.int64])(acc[:, c])
    return out + grid[1]


def regridded(ints: IntArray, scale: float, grid: Grid, rounding: str) -> IntArray:
    """Numbers of one grid on another; ONNX Runtime goes through float32."""
    if rounding != "ort":
        return rescaled(ints, [Fraction(scale)], grid, rounding)
    real = ints.astype(np.float32) * np.float32(scale)
    return np.rint(real / np.float32(grid[0])).astype(np.int64) + grid[1]


def convolved(q: IntArray, zx: int, w: IntArray, zw: IntArray, layer: Any) -> IntArray:
    """Codes by codes, the zero points taken out afterwards (docs/algorithms.md G2)."""
    mode = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}[layer.padding_mode]
    fill = {"constant_values": zx} if mode == "constant" else {}
    q = np.pad(q, [(0, 0), (0, 0), *((p, p) for p in layer.padding)], mode=mode, **fill)
    sizes = [
        (s - d * (k - 1) - 1) // t + 1
        for s, k, d, t in zip(q.shape[2:], layer.kernel_size, layer.dilation, layer.stride, strict=True)
    ]
    out = np.empty((len(q), len(w), *sizes), dtype=np.int64)
    per_group, k = len(w) // layer.groups, int(np.prod(w.shape[1:]))
    for at in np.ndindex(*sizes):
        spans = zip(at, layer.kernel_size, layer.dilation, layer.stride, strict=True)
        window = q[(slice(None), slice(None), *(slice(i * t, i * t + d * (n - 1) + 1, d) for i, n, d, t in spans))]
        for c in range(len(w)):
            first = c // per_group * w.shape[1]
            patch, row = window[:, first : first + w.shape[1]].reshape(len(q), -1), w[c].reshape(-1)
            out[(slice(None), c, *at)] = patch @ row - zw[c] * patch.sum(1) - zx * row.sum() + k * zx * zw[c]
    return out


def scattered(q: IntArray, zx: int, w: IntArray, zw: IntArray, layer: Any) -> IntArray:
    """A transposed convolution, input by input; w: (out, in / groups, ...)."""
    geometry = [layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.output_padding]
    sizes = [(s - 1) * t - 2 * p + d * (k - 1) + o + 1 for s, k, t, p, d, o in zip(q.shape[2:], *geometry, strict=True)]
    out = np.zeros((len(q), len(w), *sizes), dtype=np.int64)
    for at in np.ndindex(*q.shape[2:], *layer.kernel_size):
        n = len(sizes)
        to = [i * t + j * d - p for i, j, _, t, p, d, _ in zip(at[:n], at[n:], *geometry, strict=True)]
        if all(0 <= i < s for i, s in zip(to, sizes, strict=True)):
            for c in range(len(w)):
                first = c // (len(w) // layer.groups) * w.shape[1]
                x = q[(slice(None), slice(first, first + w.shape[1]), *at[:n])] - zx
                out[(slice(None), c, *to)] += x @ (w[(c, slice(None), *at[n:])] - zw[c])
    return out


LAYERS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "K=1": (lambda: nn.Conv2d(1, 14, 1), (1, 3, 3)),
    "depthwise, K=9": (lambda: nn.Conv2d(14, 14, 3, padding=1, groups=14, stride=2), (14, 5, 5)),
    "K=576": (lambda: nn.Conv2d(64, 14, 3, padding=1), (64, 3, 3)),
    "K=4608": (lambda: nn.Conv2d(512, 14, 3), (512, 4, 3)),
    "linear": (lambda: nn.Linear(576, 14), (576,)),
    "linear of sequences": (lambda: nn.Linear(9, 14, bias=False), (5, 9)),
    "conv1d": (lambda: nn.Conv1d(4, 14, 3, padding=2, dilation=2, padding_mode="circular"), (4, 7)),
    "conv2d": (lambda: nn.Conv2d(4, 14, (3, 2), (2, 1), (2, 1), groups=2, padding_mode="reflect"), (4, 6, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 14, 2, padding=1, padding_mode="replicate"), (2, 3, 2, 3)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(6, 14, 3, 2, 1, 1, groups=2), (6, 4)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(4, 14, 3, 2, dilation=2), (4, 3, 2)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(4, 14, 2, groups=2, bias=False), (4, 2, 2, 2)),
}
ACTIVATIONS = {"linear": nn.ReLU, "conv2d": nn.ReLU6, "K=576": nn.ReLU, "transposed 2d": nn.ReLU6}


def layer_sums(layer: Any, q: IntArray, zx: int, w: IntArray, zw: IntArray) -> IntArray:
    if isinstance(layer, nn.Linear):
        return np.moveaxis((q - zx) @ (w - zw[:, None]).T, -1, 1)
    return (scattered if "Transpose" in type(layer).__name__ else convolved)(q, zx, w, zw, layer)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("per_channel", [True, False])
def test_a_layer_is_its_integer_sums(name: str, per_channel: bool) -> None:
    """The multipliers of the 14 channels go from 2**-12 to 2; every other one is a power of two, for ties."""
    make, shape = LAYERS[name]
    rng = np.random.default_rng(len(name))
    layer = make()
    channels_first = tq.QWrapper(layer, None, None)._channels_first_weight()
    k = channels_first[0].numel()
    (sx, zx), (sy, zy) = (0.25, 77), (0.125, 101)
    wanted = 2.0 ** (np.arange(14) - 12) * np.where(np.arange(14) % 2, 1.0, rng.uniform(0.6, 1.0, 14))
    sw = (wanted * sy / sx).astype(np.float32) if per_channel else np.full(14, 2.0**-6, dtype=np.float32)
    zw = rng.integers(-20, 21, 14) * 2 + 1 if per_channel else np.full(14, -9)
    most = (
        np.clip(12.0 / (sw * sx / sy * math.sqrt(k)), 1, 80).astype(int).reshape(-1, *[1] * (channels_first.ndim - 1))
    )
    w = rng.integers(-most, most + 1, channels_first.shape) + zw.reshape(most.shape)
    quantizer = Fixed(sw, zw, (-128, 127)) if per_channel else Fixed(sw[0], zw[0], (-128, 127))
    layer.weight.data = tq.QWrapper(layer, None, None).row.channels_first(layer, quantizer.decode(torch.tensor(w)))
    on_grid = np.zeros(14, dtype=np.int64)
    if layer.bias is not None:
        layer.bias.data = torch.tensor(rng.normal(size=14) * sw * sx * 9, dtype=torch.float32)
        steps = [
            Fraction(float(b)) / (Fraction(float(s)) * Fraction(sx))
            for b, s in zip(layer.bias.tolist(), sw, strict=True)
        ]
        on_grid = np.array([round(step) for step in steps])
    act = ACTIVATIONS[name]() if name in ACTIVATIONS else None
    wrapper = tq.QWrapper([layer, act] if act else layer, quantizer, Fixed(sy, zy), input_quantizer=Fixed(sx, zx))
    reach = np.array([1, 6, 40, 255]).reshape(-1, *[1] * len(shape))
    q = np.clip(zx + rng.integers(-reach, reach + 1, (4, *shape)), 0, 255)
    acc = layer_sums(layer, q, zx, w, zw)
    acc = acc + on_grid.reshape(-1, *[1] * (acc.ndim - 2))
    x = torch.tensor((q - zx) * sx, dtype=torch.float32)
    low, high = zy if act else 0, zy + round(6 / sy) if isinstance(act, nn.ReLU6) else 255
    for rounding in ROUNDINGS:
        integer = to_integer(wrapper, x[:1], rounding)
        found = integer.codes(x)
        expected = rescaled(acc, [Fraction(float(s)) * Fraction(sx) for s in sw], (sy, zy), rounding).clip(low, high)
        if isinstance(layer, nn.Linear):
            expected = np.moveaxis(expected, 1, -1)
        assert np.array_equal(found["QWrapper.input"][0], q)
        assert np.array_equal(found["QWrapper.output"][0], expected)
        assert torch.equal(integer(x), torch.tensor((expected - zy) * sy, dtype=torch.float32))
        inside = (expected > low) & (expected < high)
        assert inside.mean() > 0.05
        assert len(np.unique(expected)) > 15
        assert not integer.float_operators
        assert integer.accumulators["QWrapper"] >= np.abs(acc).max()


class Meeting(nn.Module):
    """`op` of inputs that are each put on a grid."""

    def __init__(self, op: Any, grids: list[Grid], out: Grid) -> None:
        super().__init__()
        self.sites = nn.ModuleList(tq.QOp(nn.Identity(), Fixed(*grid)) for grid in grids)
        self.met = tq.QOp(op, Fixed(*out))

    def forward(self, *xs: Tensor) -> Tensor:
        return self.met(*(site(x) for site, x in zip(self.sites, xs, strict=True)))


def windows(x: IntArray, side: int) -> list[IntArray]:
    return [x[..., i::side, j::side] for i in range(side) for j in range(side)]


def pooled(ints: IntArray, grid: Grid, out: Grid, rounding: str, side: int = 2) -> IntArray:
    if rounding != "ort":
        return rescaled(sum(windows(ints, side)), [Fraction(grid[0])], out, rounding, side * side)
    total = np.float32(0.0)
    for part in windows(ints, side):
        total = total + part.astype(np.float32) * np.float32(grid[0])
    return np.rint(total / np.float32(side * side) / np.float32(out[0]) + np.float32(out[1])).astype(np.int64)


def by_element(function: Callable[[int, int], int], a: IntArray, b: IntArray) -> IntArray:
    return np.vectorize(lambda x, y: function(int(x), int(y)), otypes=[np.int64])(a, b)


def difference(a: IntArray, b: IntArray, ga: Grid, gb: Grid, out: Grid, rounding: str) -> IntArray:
    if rounding == "ort":
        real = a.astype(np.float32) * np.float32(ga[0]) - b.astype(np.float32) * np.float32(gb[0])
        return np.rint(real / np.float32(out[0])).astype(np.int64) + out[1]
    return by_element(lambda x, y: added((x, ga[0], 0), (-y, gb[0], 0), *out, rounding), a, b)


def scaled_by(a: IntArray, b: IntArray, ga: Grid, gb: Grid, out: Grid, rounding: str) -> IntArray:
    multiplier = float(Fraction(ga[0]) * Fraction(gb[0]) / Fraction(out[0]))
    if rounding == "ort":
        multiplier = float(np.float32(ga[0] * gb[0]) / np.float32(out[0]))
    return by_element(lambda x, y: multiplied(x * y, multiplier, out[1], rounding), a, b)


def means(ints: IntArray, grid: Grid, out: Grid, rounding: str) -> IntArray:
    return rescaled(ints.sum((2, 3), keepdims=True), [Fraction(grid[0])], out, rounding, 16)


PAIRS: dict[str, tuple[Any, Any]] = {
    "add": (operator.add, lambda a, b, ga, gb, out, r: by_element(
        lambda x, y: added((x + ga[1], *ga), (y + gb[1], *gb), *out, r), a, b)),
    "sub": (torch.sub, difference),
    "mul": (operator.mul, scaled_by),
    "matmul": (torch.matmul, lambda a, b, ga, gb, out, r: rescaled(
        a @ b, [Fraction(ga[0]) * Fraction(gb[0])], out, r)),
    "cat": (lambda a, b: torch.cat([a, b], 1), lambda a, b, ga, gb, out, r: np.concatenate(
        [regridded(a, ga[0], out, r), regridded(b, gb[0], out, r)], 1)),
}  # fmt: skip
SINGLES: dict[str, tuple[Any, Any]] = {
    "adaptive average": (nn.AdaptiveAvgPool2d(1), means),
    "mean": (lambda x: x.mean((2, 3), keepdim=True), means),
    "average pool": (nn.AvgPool2d(2), pooled),
    "padded average pool": (nn.AvgPool2d(2, padding=1), lambda x, g, out, r: pooled(
        np.pad(x, [(0, 0), (0, 0), (1, 1), (1, 1)]), g, out, r)),
    "adaptive average to 2": (nn.AdaptiveAvgPool2d(2), pooled),
    "max pool": (nn.MaxPool2d(2), lambda x, g, out, r: regridded(np.max(windows(x, 2), 0), g[0], out, r)),
    "relu": (F.relu, lambda x, g, out, r: regridded(x.clip(0), g[0], out, r)),
    "relu6": (F.relu6, lambda x, g, out, r: regridded(x, g[0], out, r).clip(out[1], out[1] + round(6 / out[0]))),
    "moves": (lambda x: torch.cat(x.permute(0, 2, 1, 3).reshape(3, 4, 2, 8).chunk(2, 1)[::-1], 1).flatten(1),
        lambda x, g, out, r: regridded(np.roll(
            x.transpose(0, 2, 1, 3).reshape(3, 4, 2, 8), 2, 1).reshape(3, -1), g[0], out, r)),
    "padded": (lambda x: F.pad(x, (1, 0, 2, 1)), lambda x, g, out, r: regridded(
        np.pad(x, [(0, 0), (0, 0), (2, 1), (1, 0)]), g[0], out, r)),
}  # fmt: skip
GRIDS: list[tuple[Grid, Grid, Grid]] = [
    ((0.25, 120), (0.5, 31), (0.5, 77)),
    ((0.125, 9), (0.125, 9), (0.75, 128)),
    ((float(np.float32(0.0371)), 110), (float(np.float32(0.11)), 150), (float(np.float32(0.0213)), 123)),
]


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("name", [*PAIRS, *SINGLES])
def test_an_operator_on_codes(name: str, rounding: str) -> None:
    rng = np.random.default_rng(len(name))
    seen: set[int] = set()
    for first, second, out in GRIDS:
        grids = [first, second] if name in PAIRS else [first]
        op, oracle = (PAIRS | SINGLES)[name]
        if name in ("mul", "matmul"):
            out = (float(np.float32(out[0] * (3.0 if name == "mul" else 8.0))), out[1])
        codes = [rng.integers(0, 256, (3, 4, 4, 4)) for _ in grids]
        ints = [q - z for q, (_, z) in zip(codes, grids, strict=True)]
        xs = [torch.tensor(i * s, dtype=torch.float32) for i, (s, _) in zip(ints, grids, strict=True)]
        integer = to_integer(Meeting(op, grids, out), tuple(xs), rounding)
        found = integer.codes(*xs)
        assert all(np.array_equal(found[f"sites.{i}.output"][0], q) for i, q in enumerate(codes))
        expected = oracle(*ints, *grids, out, rounding).clip(0, 255)
        assert np.array_equal(found["met.output"][0], expected)
        assert not integer.float_operators
        seen.update(expected.flatten().tolist())
    assert len(seen) > 20


SCHEME_AXES = [(name, axis) for name in QUANTIZERS for axis in (None, 0) if QUANTIZERS[name].examples(axis)]
WITHOUT_INTEGERS = {"codebook", "mx", "nf4"}


@pytest.mark.parametrize(("name", "axis"), SCHEME_AXES)
def test_levels_are_whole_numbers_times_scales(name: str, axis: int | None) -> None:
    x = torch.randn(4, 50) * torch.tensor([1.0, 10.0, 0.01, 3.0]).view(4, 1)
    for quantizer in QUANTIZERS[name].examples(axis):
        quantizer.pre_observe(x.abs() if quantizer.signed is False else x)
        if name in WITHOUT_INTEGERS:
            with pytest.raises(NoAffineViewError):
                quantizer.integer_terms()
            continue
        codes = torch.arange(quantizer.code_range[0], quantizer.code_range[1] + 1)
        levels = quantizer.decode(codes if axis is None else codes.expand(4, -1), torch.float64)
        terms = quantizer.integer_terms()
        assert all((scale.dtype, table.dtype) == (torch.float64, torch.int64) for scale, table in terms)
        total = torch.zeros_like(levels)
        for scale, table in terms:
            total += (scale if scale.ndim == 0 else scale[:, None]) * table
        torch.testing.assert_close(total, levels, rtol=1e-6, atol=1e-6 * float(levels.abs().max()) * 1e-3)


def signed(ints: IntArray, ratio: Fraction, rounding: str) -> IntArray:
    size, sign = float(abs(ratio)), -1 if ratio < 0 else 1
    return np.vectorize(lambda v: requantized(sign * int(v), size, rounding) if size else 0, otypes=[np.int64])(ints)


def mixed(parts: list[tuple[IntArray, Fraction]], grid: Grid, rounding: str) -> IntArray:
    """One channel whose sums have scales of their own; in fixed point each keeps 8 bits of fraction."""
    ratios = [scale / Fraction(grid[0]) for _, scale in parts]
    if rounding in ("ort", "exact"):
        total = sum(ints.astype(object) * ratio for (ints, _), ratio in zip(parts, ratios, strict=True))
        return np.vectorize(round, otypes=[np.int64])(total) + grid[1]
    raised = [signed(ints, ratio * 2**8, rounding) for (ints, _), ratio in zip(parts, ratios, strict=True)]
    return signed(sum(raised), Fraction(1, 2**8), rounding) + grid[1]


SPECS = ["esb:4,k=1/channel", "esb:3,k=0", "pot:3/channel", "apot:4/channel", "apot:3", "twn/channel", "xnor/channel"]
SPECS += ["binary", "residual:3/channel", "residual:2", "ul2q:4/channel", "ul2q:8", "zoomq:3", "ttq/channel", "ttq"]


@pytest.mark.parametrize("spec", SPECS)
def test_weights_of_other_schemes_take_part_as_whole_numbers(spec: str) -> None:
    rng = np.random.default_rng(len(spec))
    (sx, zx), zy = (float(np.float32(0.031)), 99), 120
    layer = nn.Conv2d(6, 5, 3, stride=2)
    layer.weight.data += 0.02
    wrapper = tq.QWrapper(layer, tq.make_quantizer(spec), Fixed(1.0, zy), input_quantizer=Fixed(sx, zx))
    tq.observe_weights(wrapper)
    q = rng.integers(0, 256, (4, 6, 7, 7))
    x = torch.tensor((q - zx) * sx, dtype=torch.float32)
    sy = float(np.float32(layer(x).abs().max().item() / 110))
    wrapper.acts_quantizer = Fixed(sy, zy)
    weight = wrapper.weight_quantizer
    codes = (weight.encode(layer.weight.detach()) - weight.code_range[0]).long()
    terms = [(s.expand(5), t[codes] if t.ndim == 1 else torch.stack([t[c][codes[c]] for c in range(5)]))
             for s, t in weight.integer_terms()]  # fmt: skip
    real = weight.decode(weight.encode(layer.weight.detach()))
    single = terms[0][0].float().view(5, 1, 1, 1) * terms[0][1].float()
    if len(terms) == 1 and int(terms[0][1].abs().max()) <= 127 and torch.equal(single, real):
        terms = [(terms[0][0].float().double(), terms[0][1])]  # a grid with a float32 scale
    sums = [convolved(q, zx, ints.numpy(), [0] * 5, layer) for _, ints in terms]
    scales = [[Fraction(sx) * Fraction(v) for v in s.tolist()] for s, _ in terms]
    bias = [round(Fraction(b) / step) for b, step in zip(layer.bias.tolist(), scales[0], strict=True)]
    for rounding in ROUNDINGS:
        integer = to_integer(wrapper, x[:1], rounding)
        found = integer.codes(x)["QWrapper.output"][0].numpy()
        if len(terms) == 1:
            expected = rescaled(sums[0] + np.reshape(bias, (-1, 1, 1)), scales[0], (sy, zy), rounding)
        else:
            parts = [[(acc[:, c], s[c]) for acc, s in zip(sums, scales, strict=True)] for c in range(5)]
            for c in range(5):
                parts[c].append((np.full_like(sums[0][:, c], bias[c]), scales[0][c]))
            expected = np.stack([mixed(part, (sy, zy), rounding) for part in parts], 1)
        assert np.array_equal(found, expected.clip(0, 255))
        assert len(np.unique(found)) > 50
        assert not integer.float_operators


def wrapped(layer: Any, grid: Fixed, bias: float = 0.0, mixed: bool = False) -> tq.QWrapper:
    """`layer` with weights of 127, or of 127 and -128, in steps of 0.5. Biases count in steps of 0.125."""
    signs = torch.randn_like(layer.weight) > 0 if mixed else torch.ones_like(layer.weight, dtype=torch.bool)
    layer.weight.data = torch.where(signs, 63.5, -64.0)
    if layer.bias is not None:
        layer.bias.data.fill_(bias)
    return tq.QWrapper(layer, Fixed(0.5, 0, (-128, 127)), Fixed(900.0, 128), input_quantizer=grid)


REACHES = {
    "linear": (lambda: nn.Linear(50, 4), (50,)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4), (4, 3, 3)),
    "transposed": (lambda: nn.ConvTranspose1d(4, 6, 3, 2, groups=2, bias=False), (4, 3)),
}


@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize(("low", "zero_point"), [(0, 7), (-128, 100)])
@pytest.mark.parametrize("name", REACHES)
def test_accumulators_are_bounds_that_can_be_met(name: str, low: int, zero_point: int, mixed: bool) -> None:
    make, shape = REACHES[name]
    layer, ends = make(), [low - zero_point, low + 255 - zero_point]
    limit = max(map(abs, ends))
    bias = 0 if layer.bias is None else 24 if limit == ends[1] else -24
    wrapper = wrapped(layer, Fixed(0.25, zero_point, (low, low + 255)), bias / 8, mixed)
    w = layer.weight.detach().double() * 2
    x = torch.zeros(1, *shape, dtype=torch.float64, requires_grad=True)
    sums, reached = wrapper.row.run(layer, x, w, None), 0
    for each in sums.flatten():  # the inputs that make this sum as large and as small as it can be
        (slope,) = torch.autograd.grad(each, x, retain_graph=True)
        found = [int((slope * torch.where(slope > 0, a, b)).sum()) + bias for a, b in (ends, ends[::-1])]
        reached = max(reached, *map(abs, found))
    for keep_signed in (True, False):
        bound = to_integer(wrapper, x.detach().float(), keep_signed=keep_signed).accumulators["QWrapper"]
        products = 50 if name == "linear" else 9 if name == "depthwise" else 4
        assert reached <= bound <= products * limit * 128 + 24
        assert mixed or bound == reached


def test_sums_beyond_32_bits_are_refused_by_name_and_biases_get_room() -> None:
    """docs/algorithms.md G2: 66311 products of 255 and 127 are the most."""

    def site() -> Fixed:
        return Fixed(0.25, 0)

    fits, deep = wrapped(nn.Linear(66311, 1, bias=False), site()), wrapped(nn.Linear(66312, 1, bias=False), site())
    assert to_integer(fits, torch.zeros(1, 66311)).accumulators == {"QWrapper": 66311 * 255 * 127}
    with pytest.raises(ExportError, match=r"1\.0: its sums of products can reach 2.15e\+09"):
        to_integer(nn.Sequential(nn.Identity(), nn.Sequential(deep)), torch.zeros(1, 66312))
    for bias in (3e8, 2.0**28 - 100.0):  # room is made for these
        assert to_integer(wrapped(nn.Linear(4, 2), site(), bias), torch.zeros(1, 4)).accumulators["QWrapper"] < 2**31
    product = Meeting(torch.matmul, [(1.0, 0), (1.0, 0)], (1.0, 0))
    with pytest.raises(ExportError, match="its sums of products can reach"):
        to_integer(product, (torch.zeros(1, 40000), torch.zeros(40000, 1)))


FLOATS = {
    "softmax": lambda: nn.Softmax(-1), "gelu": nn.GELU, "layer_norm": lambda: nn.LayerNorm(6), "silu": nn.SiLU
}  # fmt: skip


@pytest.mark.parametrize("name", FLOATS)
def test_operators_on_real_numbers_are_listed(name: str) -> None:
    def linear(sites: int) -> tq.QWrapper:
        quantizers = [tq.make_quantizer("affine:8") for _ in range(sites)]
        weight = tq.make_quantizer("affine:8,symmetric=narrow/channel")
        return tq.QWrapper(
            nn.Linear(6, 6), weight, quantizers[0], input_quantizer=quantizers[-1] if sites > 1 else None
        )

    between = tq.QOp(FLOATS[name](), tq.make_quantizer("affine:8"))
    model = nn.Sequential(linear(2), nn.ReLU(), between, nn.Dropout(), linear(1)).eval()
    x = torch.randn(16, 6)
    with tq.qmodule_state(model, tq.QModuleState.CALIBRATION), torch.no_grad():
        model(x)
    integer = to_integer(model, x, "exact")
    assert [(op.name, op.after) for op in integer.float_operators] == [(name, "2")]
    real = integer.form[2].op(integer.form[1](integer.form[0](x)))
    grid = model[2].acts_quantizer
    assert torch.equal(integer.codes(x)["2.output"][0], grid.encode(real).long())


class Twice(nn.Module):
    """One layer called twice, a residual addition, pools, a depthwise convolution, a concatenation."""

    def __init__(self, acts: str = "affine:8", shared: bool = True) -> None:
        super().__init__()

        def site() -> Quantizer:
            return tq.make_quantizer(acts, "output")

        def conv(*layers: nn.Module, **more: Any) -> tq.QWrapper:
            return tq.QWrapper(list(layers), tq.make_quantizer("affine:8,symmetric=narrow/channel"), site(), **more)

        self.stem = conv(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), input_quantizer=site())
        self.shared = conv(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.again = self.shared if shared else conv(nn.Conv2d(8, 8, 3, padding=1))
        self.add = tq.QOp(operator.add, site(), nn.ReLU())
        self.depthwise = conv(nn.Conv2d(8, 8, 3, groups=8), nn.ReLU6())
        self.pool, self.most = tq.QOp(nn.AvgPool2d(2), site()), nn.MaxPool2d(2)
        self.cat = tq.QOp(lambda a, b: torch.cat([a, b], 1), site())
        self.mean = tq.QOp(nn.AdaptiveAvgPool2d(1), site())
        self.head = tq.QWrapper(nn.Linear(16, 7), tq.make_quantizer("affine:8,symmetric=narrow/channel"), site())

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.depthwise(self.add(self.again(self.shared(x)), x))
        return self.head(self.mean(self.cat(self.pool(x), self.most(x))).flatten(1))


def calibrated(acts: str = "affine:8", shared: bool = True) -> tuple[nn.Module, Tensor]:
    model, x = Twice(acts, shared).eval(), torch.randn(48, 3, 10, 10)
    with tq.qmodule_state(model, tq.QModuleState.CALIBRATION), torch.no_grad():
        model(x)
    return model, x


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="other kernels elsewhere")
@pytest.mark.parametrize("shared", [True, False])
def test_a_whole_network_is_onnx_runtimes(shared: bool, tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    model, x = calibrated(shared=shared)
    path = tq.deploy.export_onnx(model, tmp_path / "net.onnx", x[:2], verify=False)
    expected = tq.deploy.run_onnx(path, x, optimize=True)
    assert expected.unique().numel() > 50
    integer = to_integer(model, x[:2], "ort")
    assert not integer.float_operators
    assert torch.equal(integer(x), expected)


@pytest.mark.parametrize("rounding", ["exact", "single", "double"])
def test_where_codes_start_changes_nothing(rounding: str) -> None:
    model, x = calibrated("affine:8,symmetric=full")
    signed_codes = to_integer(model, x[:2], rounding, keep_signed=True)
    unsigned = to_integer(model, x[:2], rounding)
    assert torch.equal(signed_codes(x), unsigned(x))
    first, second = signed_codes.codes(x), unsigned.codes(x)
    assert {site: len(calls) for site, calls in second.items()} == {site: 1 + ("shared" in site) for site in first}
    assert not torch.equal(*second["shared.output"])
    for site in first:
        apart = torch.cat([b - a for a, b in zip(first[site], second[site], strict=True)]).unique()
        assert apart.tolist() in ([0], [128])
    assert len(first) == 9


def test_what_cannot_be_run_is_refused() -> None:
    model, x = calibrated()
    with pytest.raises(ConfigError, match="rounding must be one of ort, exact, single, double, got 'up'"):
        to_integer(model, x, "up")
    with pytest.raises(ExportError, match="the model fails on the example inputs"):
        to_integer(model, x[:, :2])
    with pytest.raises(ExportError, match="stem: the input quantizer .* has seen no data"):
        to_integer(Twice(), x)
    with pytest.raises(ExportError, match="has no QModule"):
        to_integer(nn.Linear(3, 3), torch.zeros(1, 3))


@pytest.mark.parametrize(
    "spec", ["affine:8,symmetric=narrow/channel", "twn/channel", "pot:3/channel", "ul2q:4/channel"]
)
@pytest.mark.parametrize("how", ["pruned", "gamma 0"])
def test_a_channel_of_zeros_gives_its_bias(spec: str, how: str) -> None:
    layer, bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    if how == "pruned":
        layer.weight.data[1] = 0.0
    else:
        bn.weight.data[1] = 0.0
    bn.bias.data[1] = 0.7
    wrapper = tq.QWrapper(
        [layer, bn], tq.make_quantizer(spec), Fixed(0.03, 100), input_quantizer=Fixed(0.02, 90)
    ).eval()
    tq.observe_weights(wrapper)
    x = torch.randn(2, 3, 5, 5)
    with tq.qmodule_state(wrapper, tq.QModuleState.QUANT_EVAL), torch.no_grad():
        expected = wrapper(x)
    got = to_integer(wrapper, x, "exact")(x)
    assert float((got - expected)[:, 1].abs().max()) <= 0.031
    assert float((got - expected).abs().max()) <= 0.2


@pytest.mark.parametrize("axis", [0, None])
def test_a_bias_far_beyond_the_weights_makes_room(axis: int | None) -> None:
    """The scale of its channel is raised until the bias has 32 bits; the codes stay those of the simulation."""
    layer = nn.Linear(6, 3)
    layer.weight.data[1] = 0.0
    layer.weight.data.mul_(1e-9)
    weight = tq.AffineQuantizer(8, tq.BatchMinMax(axis=axis), symmetric="narrow")
    acts = [tq.AffineQuantizer(8, tq.BatchMinMax()) for _ in range(2)]
    model, x = tq.QWrapper(layer, weight, acts[0], input_quantizer=acts[1]).eval(), torch.randn(32, 6)
    with torch.no_grad(), tq.qmodule_state(model, tq.QModuleState.CALIBRATION):
        model(x)
    integer = to_integer(model, x, "exact")
    with torch.no_grad(), tq.qmodule_state(model, tq.QModuleState.QUANT_EVAL):
        assert torch.equal(integer(x), model(x))
    assert max(integer.accumulators.values()) < 2**31


def test_a_weight_with_scales_per_input_channel_runs_in_float() -> None:
    """Its sums have no one step; it is listed, not refused."""
    weight = tq.AffineQuantizer(8, tq.BatchMinMax(axis=1), symmetric="narrow")
    acts = [tq.AffineQuantizer(8, tq.BatchMinMax()) for _ in range(2)]
    model, x = tq.QWrapper(nn.Conv2d(2, 4, 3), weight, acts[0], input_quantizer=acts[1]).eval(), torch.randn(8, 2, 6, 6)
    with torch.no_grad(), tq.qmodule_state(model, tq.QModuleState.CALIBRATION):
        model(x)
    integer = to_integer(model, x, "exact")
    assert [operator.name for operator in integer.float_operators] == ["conv2d"]
    with torch.no_grad(), tq.qmodule_state(model, tq.QModuleState.QUANT_EVAL):
        assert torch.equal(integer(x), model(x))
