"""Block formats: runs of neighbours share a scale that is a number of few bits itself. docs/algorithms.md A12."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from torchquant.errors import ConfigError
from torchquant.quantizers_functional._levels import in_layout_of
from torchquant.quantizers_functional._powers import ceil_log2, floor_pow2, pow2
from torchquant.quantizers_functional.formats import Format, IntegerTerms, OwnLevels, UniformGrid, scaled_terms
from torchquant.quantizers_functional.minifloat import (
    FORMATS,
    FloatFormat,
    ScaledFloat,
    minifloat_bits,
    minifloat_decode,
    minifloat_encode,
    nearest_floats_,
)

MODES = ("floor", "rceil", "ceil", "even")
SCALE_BIAS = 127


@dataclass(frozen=True)
class BlockElement:
    """What the elements of an MX block are: a mini-float, or with `form` None the 8-bit fixed point of MXINT8."""

    form: FloatFormat | None

    @property
    def n_bits(self) -> int:
        return self.form.n_bits if self.form else 8

    @property
    def mantissa_bits(self) -> int:
        return self.form.mantissa_bits if self.form else 6

    @property
    def largest(self) -> float:
        """Largest element."""
        return self.form.largest if self.form else 127 / 64

    @property
    def max_exponent(self) -> int:
        """Exponent of the largest power of two among the elements."""
        return int(torch.tensor(self.largest).log2().floor())

    def nearest_(self, x: Tensor) -> Tensor:
        """Nearest element, in place; ties to even, saturating; NaN stays NaN."""
        if self.form:
            return nearest_floats_(x, self.form)
        return x.mul_(64).round_().clamp_(-127, 127).div_(64)

    def bits(self, values: Tensor) -> Tensor:
        """Stored bits of elements, the sign on top. int32."""
        form = self.form
        codes = minifloat_encode(values, form) if form else (values * 64).to(torch.int32)
        return minifloat_bits(codes, form) if form else codes & 0xFF

    def values(self, bits: Tensor, dtype: torch.dtype) -> Tensor:
        """Elements of stored bits."""
        if self.form:
            top = 2 ** (self.n_bits - 1)
            magnitude = bits % top
            return minifloat_decode(torch.where(bits >= top, -magnitude, magnitude), self.form, dtype)
        return torch.where(bits >= 128, bits - 256, bits).to(dtype) / 64


ELEMENTS = {
    **{name: BlockElement(FORMATS[name]) for name in ("fp4_e2m1", "fp6_e2m3", "fp6_e3m2", "fp8_e4m3", "fp8_e5m2")},
    "int8": BlockElement(None),
}


def by_blocks(x: Tensor, size: int, axis: int | None, work: Callable[[Tensor], Tensor]) -> Tensor:
    """`work` of x as (*, blocks, size), put back in the shape and layout of x; zeros fill the last block up.

    `axis` None: the rows of x, everything after axis 0, are cut into blocks (weights); else that axis is.
    """
    axis = axis if axis is None else min(axis, x.ndim - 1)
    moved = x.flatten(1) if axis is None and x.ndim > 1 else x.movedim(-1 if axis is None else axis, -1)
    short = -moved.shape[-1] % size
    padded = torch.nn.functional.pad(moved, (0, short)) if short else moved
    done = work(padded.unflatten(-1, (-1, size))).flatten(-2)[..., : moved.shape[-1]]
    back = done.reshape(x.shape) if axis is None else done.movedim(-1, axis)
    return in_layout_of(back, x)


def mx_exponents(absmax: Tensor, element: BlockElement, mode: str = "floor") -> Tensor:
    """Shared exponent p of blocks with that largest magnitude, -127..127; -127 for zeros. int64.

    "floor": `floor(log2 absmax) - emax` (OCP MX v1.0; the top of the binade saturates). "rceil": `ceil(log2(absmax /
    largest))`, never saturates. "ceil": `ceil(log2 absmax) - emax`. "even": absmax is rounded to the fraction bits of
    the element first, half up, then floor. All by the bits of the number, so no logarithm rounds.

    >>> mx_exponents(torch.tensor([6.0, 6.9, 7.0]), ELEMENTS["fp4_e2m1"], "even")
    tensor([0, 0, 1])
    """
    if mode not in MODES:
        raise ConfigError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    real = absmax.to(torch.float64)
    binade = floor_pow2(real)
    safe = torch.where((binade > 0) & binade.isfinite(), binade, torch.ones_like(binade))
    fraction = real / safe
    exponent = ceil_log2(safe) - element.max_exponent
    if mode == "rceil":
        exponent = exponent + (fraction > element.largest / 2.0**element.max_exponent)
    elif mode == "ceil":
        exponent = exponent + (fraction > 1.0)
    elif mode == "even":
        exponent = exponent + (fraction >= 2.0 - 2.0 ** (-element.mantissa_bits - 1))
    return torch.where(real > 0, exponent, torch.full_like(exponent, -SCALE_BIAS)).clamp(-SCALE_BIAS, SCALE_BIAS)


def finite_absmax(blocks: Tensor) -> Tensor:
    """Largest finite magnitude of each block, kept as the last dimension."""
    magnitude = blocks.abs()
    return torch.where(magnitude.isfinite(), magnitude, torch.zeros_like(magnitude)).amax(-1, keepdim=True)


def _mx_scale(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    return pow2(exponent + 1, dtype) / 2  # 2**-127 is subnormal in float32


def mx_codes(blocks: Tensor, element: BlockElement, mode: str) -> Tensor:
    """Codes `(p + 127) << bits | element bits`, int32. blocks: (*, blocks, size) without NaN."""
    exponent = mx_exponents(finite_absmax(blocks), element, mode)
    bits = element.bits(element.nearest_(blocks / _mx_scale(exponent, blocks.dtype)))
    return (exponent + SCALE_BIAS).to(torch.int32) * 2**element.n_bits + bits


def mx_values(codes: Tensor, element: BlockElement, dtype: torch.dtype) -> Tensor:
    """Values of codes, one by one; the scale is in each."""
    whole = codes.to(torch.int64)
    exponent = torch.div(whole, 2**element.n_bits, rounding_mode="floor") - SCALE_BIAS
    return _saturated(element.values(whole % 2**element.n_bits, dtype) * _mx_scale(exponent, dtype))


def mx_project(blocks: Tensor, element: BlockElement, mode: str) -> Tensor:
    """Values on the grid of each block; NaN stays where it is, Inf saturates."""
    scale = _mx_scale(mx_exponents(finite_absmax(blocks), element, mode), blocks.dtype)
    return _saturated(element.nearest_(blocks / scale).mul_(scale))


def _saturated(x: Tensor) -> Tensor:
    """The largest number of the type where the largest element times the scale is beyond it."""
    largest = torch.finfo(x.dtype).max
    return x.clamp(-largest, largest)


FP4, E4M3 = FORMATS["fp4_e2m1"], FORMATS["fp8_e4m3"]


def nvfp4_scales(blocks: Tensor, tensor_scale: Tensor) -> Tensor:
    """E4M3 scale of each block, in units of `tensor_scale`: `E4M3(clamp(absmax / (6 tensor_scale), 2**-6, 448))`."""
    wanted = finite_absmax(blocks) / (FP4.largest * tensor_scale)
    return nearest_floats_(wanted.clamp(2.0**-6, E4M3.largest), E4M3)


def nvfp4_project(blocks: Tensor, tensor_scale: Tensor) -> Tensor:
    """Values on the grid of each block; NaN stays where it is, Inf saturates."""
    scale = nvfp4_scales(blocks, tensor_scale) * tensor_scale
    return nearest_floats_(blocks / scale, FP4).mul_(scale)


def nvfp4_codes(blocks: Tensor, tensor_scale: Tensor) -> Tensor:
    """Codes `scale bits << 4 | element bits`, int32. blocks: (*, blocks, size) without NaN."""
    scales = nvfp4_scales(blocks, tensor_scale)
    elements = minifloat_encode(nearest_floats_(blocks / (scales * tensor_scale), FP4), FP4)
    return minifloat_encode(scales, E4M3) * 16 + minifloat_bits(elements, FP4)


def nvfp4_values(codes: Tensor, tensor_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Values of codes, one by one; the block's scale is in each."""
    whole = codes.to(torch.int64)
    scales = minifloat_decode(torch.div(whole, 16, rounding_mode="floor"), E4M3, dtype)
    return BlockElement(FP4).values(whole % 16, dtype) * (scales * tensor_scale.to(dtype))


class BlockFormat(OwnLevels):
    """Blocks along an axis whose scales come from themselves; `axis` None cuts each row, everything after axis 0."""

    block: int
    block_axis: int | None

    @abstractmethod
    def block_codes(self, blocks: Tensor) -> Tensor:
        """Codes of blocks, (*, blocks, size)."""

    @abstractmethod
    def element_grid(self, blocks: Tensor) -> Format:
        """The format that the elements of blocks have, (*, blocks, size)."""

    def neighbours(self, x: Tensor) -> tuple[Tensor, Tensor]:
        below, above = (
            by_blocks(x, self.block, self.block_axis, lambda b, i=i: self.element_grid(b).neighbours(b)[i])  # type: ignore[misc]
            for i in (0, 1)
        )
        return below, above

    @abstractmethod
    def block_values(self, blocks: Tensor) -> Tensor:
        """The nearest values of blocks, (*, blocks, size)."""

    def codes(self, x: Tensor) -> Tensor:
        return by_blocks(x, self.block, self.block_axis, self.block_codes)

    def nearest(self, x: Tensor, want_inside: bool) -> tuple[Tensor, Tensor | None]:
        """A scale that covers the block clips nothing."""
        return by_blocks(x, self.block, self.block_axis, self.block_values), None


@dataclass(frozen=True, eq=False)
class MXBlocks(BlockFormat):
    """Blocks that share a power of two. Codes: see `mx_codes`."""

    element: BlockElement
    mode: str
    block: int
    block_axis: int | None

    @property
    def code_range(self) -> tuple[int, int]:
        return 0, int(2 ** (self.element.n_bits + 8)) - 1

    def block_codes(self, blocks: Tensor) -> Tensor:
        return mx_codes(blocks, self.element, self.mode)

    def element_grid(self, blocks: Tensor) -> Format:
        scale = _mx_scale(mx_exponents(finite_absmax(blocks), self.element, self.mode), blocks.dtype)
        form = self.element.form
        return UniformGrid(scale / 64, 0, -127, 127) if form is None else ScaledFloat(scale, form)

    def block_values(self, blocks: Tensor) -> Tensor:
        return mx_project(blocks, self.element, self.mode)

    def values(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        return mx_values(codes, self.element, dtype)


@dataclass(frozen=True, eq=False)
class NVFP4Blocks(BlockFormat):
    """Blocks of FP4 with an E4M3 scale each, and one scale for the tensor. Codes: see `nvfp4_codes`."""

    tensor_scale: Tensor
    block: int
    block_axis: int | None

    code_range = (0, 127 * 16 + 15)

    def block_codes(self, blocks: Tensor) -> Tensor:
        return nvfp4_codes(blocks, self.tensor_scale.to(blocks.dtype))

    def element_grid(self, blocks: Tensor) -> Format:
        tensor_scale = self.tensor_scale.to(blocks.dtype)
        return ScaledFloat(nvfp4_scales(blocks, tensor_scale) * tensor_scale, FP4)

    def block_values(self, blocks: Tensor) -> Tensor:
        return nvfp4_project(blocks, self.tensor_scale.to(blocks.dtype))

    def values(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        return nvfp4_values(codes, self.tensor_scale, dtype)

    def integer_terms(self) -> IntegerTerms:
        """The products of element and block scale, times the scale of the tensor."""
        return scaled_terms(
            nvfp4_values(torch.arange(self.code_range[1] + 1), torch.ones(()), torch.float64), self.tensor_scale
        )
