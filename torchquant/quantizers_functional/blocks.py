"""Block formats: adjacent elements share a scale that is itself a number of few bits. docs/algorithms.md A12."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

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
    """The element type of an MX block: a mini-float, or with `form` None the 8-bit fixed point of MXINT8."""

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
        """Round to the nearest element, in place; ties to even, saturating; NaN stays NaN."""
        if self.form:
            return nearest_floats_(x, self.form)
        return x.mul_(64).round_().clamp_(-127, 127).div_(64)

    def bits(self, values: Tensor) -> Tensor:
        """Return the stored bits of elements, the sign on top. int32."""
        form = self.form
        codes = minifloat_encode(values, form) if form else (values * 64).to(torch.int32)
        return minifloat_bits(codes, form) if form else codes & 0xFF

    def values(self, bits: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the elements of stored bits."""
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
    """Apply `work` to x as (*, blocks, size), zero-padded, and put the result back in the shape and layout of x.

    `axis` None: the rows of x, everything after axis 0, are cut into blocks (weights); else that axis is cut.
    """
    axis = axis if axis is None else min(axis, x.ndim - 1)
    moved = x.flatten(1) if axis is None and x.ndim > 1 else x.movedim(-1 if axis is None else axis, -1)
    short = -moved.shape[-1] % size
    padded = torch.nn.functional.pad(moved, (0, short)) if short else moved
    done = work(padded.unflatten(-1, (-1, size))).flatten(-2)[..., : moved.shape[-1]]
    back = done.reshape(x.shape) if axis is None else done.movedim(-1, axis)
    return in_layout_of(back, x)


def mx_exponents(absmax: Tensor, element: BlockElement, mode: str = "floor") -> Tensor:
    """Compute the shared exponent p of blocks with that largest magnitude, -127..127; -127 for zeros. int64.

    "floor": `floor(log2 absmax) - emax` (OCP MX v1.0; the top of the binade saturates). "rceil": `ceil(log2(absmax /
    largest))`, never saturates. "ceil": `ceil(log2 absmax) - emax`. "even": absmax is rounded to the fraction bits of
    the element first, half up, then floor. All are computed from the bits of the number, so no logarithm rounds.

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
    """Return the largest finite magnitude of each block; the last dimension is kept."""
    magnitude = blocks.abs()
    return torch.where(magnitude.isfinite(), magnitude, torch.zeros_like(magnitude)).amax(-1, keepdim=True)


def _mx_scale(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    return pow2(exponent + 1, dtype) / 2  # 2**-127 is subnormal in float32


def mx_codes(blocks: Tensor, element: BlockElement, exponent: Tensor) -> Tensor:
    """Return codes `(p + 127) << bits | element bits`, int32. blocks: (*, blocks, size), no NaN; exponent p of each."""
    bits = element.bits(element.nearest_(blocks / _mx_scale(exponent, blocks.dtype)))
    return (exponent + SCALE_BIAS).to(torch.int32) * 2**element.n_bits + bits


def mx_values(codes: Tensor, element: BlockElement, dtype: torch.dtype) -> Tensor:
    """Return the value of each code, which contains the scale."""
    whole = codes.to(torch.int64)
    exponent = torch.div(whole, 2**element.n_bits, rounding_mode="floor") - SCALE_BIAS
    return _saturated(element.values(whole % 2**element.n_bits, dtype) * _mx_scale(exponent, dtype))


def mx_project(blocks: Tensor, element: BlockElement, exponent: Tensor) -> Tensor:
    """Round to the grid of each block; NaN stays where it is, Inf saturates."""
    scale = _mx_scale(exponent, blocks.dtype)
    return _saturated(element.nearest_(blocks / scale).mul_(scale))


def _saturated(x: Tensor) -> Tensor:
    """Saturate at the largest number of the type, where the largest element times the scale exceeds it."""
    largest = torch.finfo(x.dtype).max
    return x.clamp(-largest, largest)


FP4, E4M3 = FORMATS["fp4_e2m1"], FORMATS["fp8_e4m3"]


def nvfp4_scales(blocks: Tensor, tensor_scale: Tensor) -> Tensor:
    """Return the E4M3 block scales in units of `tensor_scale`: `E4M3(clamp(absmax / (6 tensor_scale), 2**-6, 448))`."""
    wanted = finite_absmax(blocks) / (FP4.largest * tensor_scale)
    return nearest_floats_(wanted.clamp(2.0**-6, E4M3.largest), E4M3)


def nvfp4_project(blocks: Tensor, scales: Tensor, tensor_scale: Tensor) -> Tensor:
    """Round to the grid of each block; NaN stays where it is, Inf saturates. scales: from `nvfp4_scales`."""
    scale = scales * tensor_scale
    return nearest_floats_(blocks / scale, FP4).mul_(scale)


def nvfp4_codes(blocks: Tensor, scales: Tensor, tensor_scale: Tensor) -> Tensor:
    """Return codes `scale bits << 4 | element bits`, int32. blocks: (*, blocks, size), no NaN; see `nvfp4_scales`."""
    elements = minifloat_encode(nearest_floats_(blocks / (scales * tensor_scale), FP4), FP4)
    return minifloat_encode(scales, E4M3) * 16 + minifloat_bits(elements, FP4)


def nvfp4_values(codes: Tensor, tensor_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the value of each code, which contains the block's scale."""
    whole = codes.to(torch.int64)
    scales = minifloat_decode(torch.div(whole, 16, rounding_mode="floor"), E4M3, dtype)
    return BlockElement(FP4).values(whole % 16, dtype) * (scales * tensor_scale.to(dtype))


@dataclass(frozen=True, eq=False)
class BlockFormat(OwnLevels):
    """Blocks along an axis, each with a scale; `block_axis` None cuts each row, everything after axis 0.

    `scales`: the known scales of the blocks of one tensor, (*, blocks), in the form of `own_scales`; None if blocks
    compute them from their own elements.
    """

    block: int
    block_axis: int | None
    scales: Tensor | None = field(default=None, kw_only=True)

    @abstractmethod
    def own_scales(self, blocks: Tensor) -> Tensor:
        """Compute the scales of blocks, (*, blocks, size), from their elements: (*, blocks, 1)."""

    @abstractmethod
    def block_codes(self, blocks: Tensor, scales: Tensor) -> Tensor:
        """Return the codes of blocks, (*, blocks, size)."""

    @abstractmethod
    def block_values(self, blocks: Tensor, scales: Tensor) -> Tensor:
        """Return the nearest values of blocks, (*, blocks, size)."""

    @abstractmethod
    def element_grid(self, scales: Tensor, dtype: torch.dtype) -> Format:
        """Return the format of the elements of blocks with these scales."""

    def scales_of(self, x: Tensor) -> Tensor:
        """Return the scales of the blocks of x, (*, blocks)."""
        found: list[Tensor] = []

        def note(blocks: Tensor) -> Tensor:
            found.append(self.own_scales(blocks).squeeze(-1))
            return blocks

        by_blocks(x, self.block, self.block_axis, note)
        return found[0]

    def _by_blocks(self, x: Tensor, work: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        def with_scales(blocks: Tensor) -> Tensor:
            if self.scales is None:
                return work(blocks, self.own_scales(blocks))
            if self.scales.shape != blocks.shape[:-1]:
                raise ConfigError(
                    f"the scales of {tuple(self.scales.shape)} blocks are pinned, and a tensor of shape "
                    f"{tuple(x.shape)} has {tuple(blocks.shape[:-1])}; call unpin() first"
                )
            return work(blocks, self.scales[..., None].to(blocks.device))

        return by_blocks(x, self.block, self.block_axis, with_scales)

    def columns(self, x: Tensor, columns: Tensor, shape: Sequence[int]) -> Tensor:
        """Quantize x, (rows, k), on the grids of these columns, (k,) int64, of a weight of that shape.

        The scales are known. Blocks along axis 0 span several rows, so columns cannot be quantized alone.
        """
        assert self.scales is not None
        by_row = self.scales.flatten(1)

        def number(blocks: Tensor) -> Tensor:
            return torch.arange(by_row.shape[1]).view(*blocks.shape[:-1], 1).expand_as(blocks)

        block = by_blocks(torch.zeros(1, *shape[1:], dtype=torch.int64), self.block, self.block_axis, number)
        scales = by_row[:, block.flatten().to(columns.device)[columns]]
        return self.element_grid(scales.to(x.device), x.dtype).project(x)[0]

    def neighbours(self, x: Tensor) -> tuple[Tensor, Tensor]:
        def beside(i: int) -> Tensor:
            return self._by_blocks(x, lambda blocks, s: self.element_grid(s, blocks.dtype).neighbours(blocks)[i])

        return beside(0), beside(1)

    def codes(self, x: Tensor) -> Tensor:
        return self._by_blocks(x, self.block_codes)

    def nearest(self, x: Tensor, want_inside: bool) -> tuple[Tensor, Tensor | None]:
        """Return the nearest value; nothing counts as clipped, so the gradient passes, also with kept scales."""
        return self._by_blocks(x, self.block_values), None


@dataclass(frozen=True, eq=False)
class MXBlocks(BlockFormat):
    """Blocks whose elements share a power of two. Codes: see `mx_codes`."""

    element: BlockElement
    mode: str

    @property
    def code_range(self) -> tuple[int, int]:
        return 0, int(2 ** (self.element.n_bits + 8)) - 1

    def own_scales(self, blocks: Tensor) -> Tensor:
        """Compute the exponents."""
        return mx_exponents(finite_absmax(blocks), self.element, self.mode)

    def block_codes(self, blocks: Tensor, scales: Tensor) -> Tensor:
        return mx_codes(blocks, self.element, scales)

    def block_values(self, blocks: Tensor, scales: Tensor) -> Tensor:
        return mx_project(blocks, self.element, scales)

    def element_grid(self, scales: Tensor, dtype: torch.dtype) -> Format:
        scale, form = _mx_scale(scales, dtype), self.element.form
        return UniformGrid(scale / 64, 0, -127, 127) if form is None else ScaledFloat(scale, form)

    def values(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        return mx_values(codes, self.element, dtype)


@dataclass(frozen=True, eq=False)
class NVFP4Blocks(BlockFormat):
    """Blocks of FP4 with an E4M3 scale each, and one scale for the tensor. Codes: see `nvfp4_codes`."""

    tensor_scale: Tensor

    code_range = (0, 127 * 16 + 15)

    def own_scales(self, blocks: Tensor) -> Tensor:
        """Compute the scales in units of `tensor_scale`."""
        return nvfp4_scales(blocks, self.tensor_scale.to(blocks.dtype))

    def block_codes(self, blocks: Tensor, scales: Tensor) -> Tensor:
        return nvfp4_codes(blocks, scales.to(blocks.dtype), self.tensor_scale.to(blocks.dtype))

    def block_values(self, blocks: Tensor, scales: Tensor) -> Tensor:
        return nvfp4_project(blocks, scales.to(blocks.dtype), self.tensor_scale.to(blocks.dtype))

    def element_grid(self, scales: Tensor, dtype: torch.dtype) -> Format:
        return ScaledFloat(scales.to(dtype) * self.tensor_scale.to(dtype), FP4)

    def values(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        return nvfp4_values(codes, self.tensor_scale, dtype)

    def integer_terms(self) -> IntegerTerms:
        """Return the products of element and block scale, times the scale of the tensor."""
        return scaled_terms(
            nvfp4_values(torch.arange(self.code_range[1] + 1), torch.ones(()), torch.float64), self.tensor_scale
        )
