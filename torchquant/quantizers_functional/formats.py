"""Formats as values: which real numbers exist, and which code stands for each. docs/algorithms.md A.

`Format` is the contract; this file has the formats that belong to no one family: uniform grids, lists of levels, and
the base of formats that are fixed numbers times a scale. The others are in the file of their family: `ScaledFloat` in
minifloat.py, `Signs` in binary.py, and so on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from math import lcm
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from torchquant import kernels
from torchquant._tensors import like, per_channel_view
from torchquant.errors import NoAffineViewError, NoCodesError
from torchquant.kernels._bounds import Bound as Bound
from torchquant.kernels._bounds import code_bounds
from torchquant.quantizers_functional._gradient import (
    Clamp,
    Gradient,
    apply_projection,
    cast_back,
    compute_dtype,
    make_gradient,
)
from torchquant.quantizers_functional._levels import level_values, nearest_level
from torchquant.quantizers_functional._recording import current_recorder
from torchquant.quantizers_functional.kernels import KERNELS

Number = Tensor | float
KernelCall = tuple[str, tuple[Number, ...], tuple[float, ...]]
"""The name of a kernel, the numbers of the format that it takes, and constants."""
IntegerTerms = list[tuple[Tensor, Tensor]]
"""(scale, table) of each term: scale () or (C,) float64; table (L,) or (C, L) int64, one entry per code."""
FLOAT_BYTES = 4
LARGEST_DENOMINATOR = 2**20
SMALLEST_ERROR = 2.0**-48
NO_TERMS = "its levels are not whole numbers times a few scales"


class AffineParams(NamedTuple):
    """The numbers of a uniform grid: real = (code - zero_point) * delta, qmin <= code <= qmax."""

    delta: Tensor
    zero_point: Tensor | int
    qmin: int
    qmax: int


@dataclass(frozen=True, eq=False)
class Format(ABC):
    """A set of real numbers, each with an integer code: a frozen value of pure maths, without a gradient.

    Its own numbers (scales, offsets, thresholds) are () for a whole tensor or, with `axis`, (C,): one for each slice of
    that axis. With no axis they may have any shape that broadcasts. A new format defines `code_range`, `codes` and
    `values`, and also `nearest` for a faster way than through codes, or for another rule of clipping. Codes rise with
    the values.
    """

    axis: int | None = field(default=None, kw_only=True)

    @property
    @abstractmethod
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code."""

    @abstractmethod
    def codes(self, x: Tensor) -> Tensor:
        """Return the integer codes of the nearest values, in any type; NaN may stay NaN. x: (*) float32 or float64."""

    @abstractmethod
    def values(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the values of codes, in `dtype` (float32 or float64)."""

    def nearest(self, x: Tensor, want_inside: bool) -> tuple[Tensor, Tensor | None]:
        """Return the nearest value, and 1 where x was not clipped (None unless asked for), in x's type.

        By default, values between the lowest and the highest level are not clipped.
        """
        value = self.values(self.codes(x), x.dtype)
        if not want_inside:
            return value, None
        low, high = self.ends(x)
        return value, torch.minimum(torch.maximum(x, low), high).eq_(x)

    def project(self, x: Tensor, want_inside: bool = False, clamp: Clamp | None = None) -> tuple[Tensor, Tensor | None]:
        """Return `nearest` of x, or of `x.clamp(*clamp)`. x: (*) float32 or float64, without autograd history."""
        return self.nearest(x if clamp is None else x.clamp(*clamp), want_inside)

    def quantize(
        self, x: Tensor, gradient: str | Gradient = "ste", clamp: Clamp | None = None, training: bool = True
    ) -> Tensor:
        """Quantize x, or `x.clamp(*clamp)`, in x's type, with a gradient for x; see `apply_projection`."""
        kernel = KERNELS.find(type(self), x.device.type)
        fused = self.fused if kernel is None else None

        def ends() -> tuple[Tensor, Tensor]:
            return self.ends(x.to(compute_dtype(x)))

        def step() -> Tensor:
            return self.step(x.to(compute_dtype(x)))

        project = self.project if kernel is None else partial(kernel, self)
        gradient = make_gradient(gradient)
        recorder = current_recorder()
        if recorder is not None:
            gradient = recorder.gradient_of(gradient, self, x, clamp)
        value = apply_projection(x, project, gradient, clamp, training, ends, step, fused)
        if recorder is not None and not (gradient.softens and training):
            recorder.note_quantized(value, self, x, clamp)
        return value

    def fused(
        self, x: Tensor, want_inside: bool, clamp: Clamp | None, is_strict: bool
    ) -> tuple[Tensor, Tensor | None] | None:
        """Return what `project` does by one of the package's kernels, None where there is none for x.

        The mask is packed, one bit an element in the memory order of x; with `is_strict` it is also 0 at and beyond
        the ends of the clamp. It may be None where it is 1 everywhere.
        """
        asked = self.kernel_call()
        function = None if asked is None else kernels.find(asked[0], x)
        if asked is None or function is None:
            return None
        _, numbers, constants = asked
        found = function(x, tuple(self.shaped(n, x) for n in numbers), clamp, is_strict, want_inside, *constants)
        return cast("tuple[Tensor, Tensor | None] | None", found)

    def kernel(self) -> KernelCall | None:
        """Return the kernel for `nearest`; None: there is none.

        A subclass with a `nearest` or `project` of its own does not inherit it.
        """
        return None

    def kernel_call(self) -> KernelCall | None:
        """Return `kernel()` if it is for the projection of this very class; None too in compiled code."""
        return None if torch.compiler.is_compiling() or not _has_own_kernel(type(self)) else self.kernel()

    def encode(self, x: Tensor) -> Tensor:
        """Map real values to codes, int32. x: (*) of any float type, without NaN."""
        return self.codes(x.to(compute_dtype(x))).to(torch.int32)

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Map codes within `code_range` to real values of any float type, on the device of the format's numbers."""
        numbers = self.numbers()
        codes = codes.to(numbers[0].device) if numbers else codes
        working = torch.float64 if dtype == torch.float64 else torch.float32
        return cast_back(self.values(codes, working), dtype)

    def to_bytes(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the codes of levels, counted from the smallest, for at most 256 codes; uint8, in their layout.

        Also returns 0, or NaN if a level is NaN, which has no code; () in a float type.
        """
        return (self.encode(levels) - self.code_range[0]).to(torch.uint8), levels.amax() * 0.0

    def from_bytes(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the levels, of any float type, of codes that are counted from the smallest; the layout is theirs."""
        return self.decode(codes.to(torch.int32) + self.code_range[0], dtype)

    def with_numbers(self, numbers: Sequence[Tensor]) -> Format:
        """Return the format with other tensors in place of `numbers()`, in that order."""
        names = (name for name, value in vars(self).items() if isinstance(value, Tensor))
        others: dict[str, Any] = dict(zip(names, numbers, strict=True))
        return replace(self, **others)

    def ends(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the lowest and the highest level, in x's type and in shapes that broadcast against x."""
        places = [torch.full([1] * x.ndim, code, device=x.device) for code in self.code_range]
        low, high = (self.values(code, x.dtype) for code in places)
        return torch.minimum(low, high), torch.maximum(low, high)

    def step(self, x: Tensor) -> Tensor:
        """Return the distance of adjacent levels, in x's type; for uniform formats only."""
        raise NoAffineViewError(f"{self} has no one step between its levels")

    def neighbours(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the levels next to x, below and above, in x's type; equal where x is on a level or beyond the last.

        One of the two is the projection of x. x: (*) float32 or float64, without NaN.
        """
        codes = self.codes(x).to(torch.int32)  # a scheme may return bools or bytes
        value = self.values(codes, x.dtype)
        towards_x = x.gt(value).to(torch.int32) - x.lt(value).to(torch.int32)
        other = self.values((codes + towards_x).clamp(*self.code_range), x.dtype)
        return torch.minimum(value, other), torch.maximum(value, other)

    def preimage(self, values: Tensor) -> Tensor:
        """Return numbers whose projections are these levels, in their type: the levels, if each is in its own cell."""
        return values

    def of_channels(self, index: Tensor) -> Format:
        """Return the format of these channels, in this order. index: (k,) int64."""
        return replace(self, **{name: value[index] for name, value in vars(self).items() if _has_channels(value)})

    def numbers(self) -> list[Tensor]:
        """Return every tensor in the format."""
        return [value for value in vars(self).values() if isinstance(value, Tensor)]

    def decoding_numbers(self) -> list[Tensor]:
        """Return the numbers on which its values depend; a threshold, for example, is only needed to encode."""
        return self.numbers()

    def side_bytes(self) -> int:
        """Return the bytes that decoding needs beside the codes: 4 for each of the `decoding_numbers`."""
        return FLOAT_BYTES * sum(number.numel() for number in self.decoding_numbers())

    @property
    def n_channels(self) -> int | None:
        """Return how many channels have numbers of their own; None per tensor."""
        return None if self.axis is None else next((len(n) for n in self.numbers() if n.ndim), None)

    def code_values(self) -> Tensor:
        """Return the value of every code, in the order of the codes: (L,), or (C, L) per channel; float32."""
        low, high = self.code_range
        numbers, n_channels = self.numbers(), self.n_channels
        codes = torch.arange(low, high + 1, device=numbers[0].device if numbers else None)
        along = replace(self, axis=None if n_channels is None else 0)
        return along.decode(codes if n_channels is None else codes.expand(n_channels, -1))

    def levels(self) -> Tensor:
        """Return the values, sorted: (L,), or (C, L) per channel; float32."""
        return self.code_values().sort(-1).values

    def thresholds(self) -> Tensor:
        """Return the thresholds between adjacent `levels()`: the midpoints. (L - 1,), (C, L - 1) per channel."""
        levels = self.levels()
        return (levels[..., 1:] + levels[..., :-1]) / 2

    def affine_params(self) -> AffineParams:
        """Return (delta, zero_point, qmin, qmax) of a uniform format, () or (C,) tensors and integers."""
        raise NoAffineViewError("it is not a uniform grid: it has levels() and codes, but no step and zero point")

    def integer_terms(self) -> IntegerTerms:
        """Return the levels as sums of integers times scales. Raises NoAffineViewError if there is no such form."""
        raise NoAffineViewError(NO_TERMS)

    def shaped(self, number: Number, x: Tensor) -> Tensor:
        """Return a number of the format in x's type, in a shape that broadcasts against x."""
        return like(per_channel_view(number, x.ndim, self.axis), x)


def _clamp(codes: Tensor, code_min: Bound, code_max: Bound) -> Tensor:
    """Clamp to a new tensor, in two binary passes for tensor bounds: `torch.clamp` with two is not vectorised."""
    if isinstance(code_min, int) and isinstance(code_max, int):
        return codes.clamp(code_min, code_max)
    return codes.clamp_min(like(code_min, codes)).clamp_max_(like(code_max, codes))


def uniform_codes(x: Tensor, delta: Tensor | float, code_min: Bound, code_max: Bound) -> Tensor:
    """Compute `clamp(round_half_even(x / delta), code_min, code_max)` in x's type: codes counted from real 0.

    x: (*). delta: () or broadcastable, > 0. code_min, code_max: integers, () or broadcastable.
    """
    return _clamp(torch.div(x, like(delta, x)).round_(), code_min, code_max)


@dataclass(frozen=True, eq=False)
class UniformGrid(Format):
    """`(code - zero_point) * scale / divisor + offset`, qmin <= code <= qmax, rounded half to even.

    `offset` is for grids that need not contain real 0; `divisor` for a scale that is a known multiple of the step.

    >>> grid = UniformGrid(torch.tensor(0.5), 1, 0, 3)
    >>> grid.levels(), grid.encode(torch.tensor([-9.0, 0.2, 0.6]))
    (tensor([-0.5000,  0.0000,  0.5000,  1.0000]), tensor([0, 1, 2], dtype=torch.int32))
    """

    scale: Number
    zero_point: Bound
    qmin: Bound
    qmax: Bound
    offset: Number | None = None
    divisor: int = 1

    @property
    def code_range(self) -> tuple[int, int]:
        return int(self.qmin), int(self.qmax)

    @property
    def largest(self) -> float:
        """Return the largest magnitude of its levels, in scales."""
        return max(abs(code - int(self.zero_point)) for code in self.code_range) / self.divisor

    def with_scale(self, scale: Number) -> UniformGrid:
        """Return the grid with another scale."""
        return UniformGrid(scale, self.zero_point, self.qmin, self.qmax, self.offset, self.divisor, axis=self.axis)

    def step(self, x: Tensor) -> Tensor:
        scale = self.shaped(self.scale, x)
        return scale if self.divisor == 1 else scale / self.divisor

    def _zero_point(self, ndim: int) -> Bound:
        return per_channel_view(self.zero_point, ndim, self.axis)

    def _bounds(self, x: Tensor, step: Tensor, clamp: Clamp | None = None) -> tuple[Bound, Bound]:
        """Return the code range counted from real 0, narrowed to that of `x.clamp(*clamp)`; see `code_bounds`."""
        return code_bounds(x, step, self.qmin, self.qmax, self._zero_point(x.ndim), clamp)

    def project(self, x: Tensor, want_inside: bool = False, clamp: Clamp | None = None) -> tuple[Tensor, Tensor | None]:
        """Project as `Format.project` does; x is clipped where its rounded code is; a clamp moves the code bounds."""
        if self.offset is not None:
            return super().project(x, want_inside, clamp)
        step = self.step(x)
        rounded = torch.div(x, step).round_()
        value = _clamp(rounded, *self._bounds(x, step, clamp))
        inside = rounded.eq_(value) if want_inside else None
        return value.mul_(step), inside

    def fused(
        self, x: Tensor, want_inside: bool, clamp: Clamp | None, is_strict: bool
    ) -> tuple[Tensor, Tensor | None] | None:
        """Return what `Format.fused` does; not for a subclass with a projection of its own, nor for an offset."""
        kernel = kernels.find("uniform", x)
        if kernel is None and (want_inside or is_strict):
            kernel = kernels.find_compiled("uniform", x)
        if kernel is None or self.offset is not None or type(self).project is not UniformGrid.project:
            return None
        found = kernel(x, self.step(x), *self._codes_in(x), clamp, is_strict and clamp is not None, want_inside)
        return cast("tuple[Tensor, Tensor | None] | None", found)

    def _codes_in(self, x: Tensor) -> tuple[Bound, Bound, Bound]:
        """Return lowest code, highest code and zero point, in x's type, in shapes that broadcast against x."""
        low, high, zero_point = self.qmin, self.qmax, self._zero_point(x.ndim)
        return (
            low if isinstance(low, int) else like(low, x),
            high if isinstance(high, int) else like(high, x),
            zero_point if isinstance(zero_point, int) else like(zero_point, x),
        )

    def kernel(self) -> KernelCall | None:
        if self.offset is not None or self.divisor != 1:
            return None
        return "uniform", (self.scale, self.qmin - self.zero_point, self.qmax - self.zero_point), ()

    def nearest(self, x: Tensor, want_inside: bool) -> tuple[Tensor, Tensor | None]:
        return self.project(x, want_inside) if self.offset is None else super().nearest(x, want_inside)

    def codes(self, x: Tensor) -> Tensor:
        centred = x if self.offset is None else x - self.shaped(self.offset, x)
        step = self.step(x)
        return uniform_codes(centred, step, *self._bounds(x, step)) + self._zero_point(x.ndim)

    def values(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        steps = (codes - self._zero_point(codes.ndim)).to(dtype)
        values = steps * self.step(steps)
        return values if self.offset is None else values + self.shaped(self.offset, steps)

    def to_bytes(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        if self.offset is not None:
            return super().to_bytes(levels)
        real = levels.to(compute_dtype(levels))
        step, (low, _, zero_point) = self.step(real), self._codes_in(real)
        kernel = kernels.find("to_codes", real)
        found = None if kernel is None else kernel(real, step, low, zero_point)
        if found is not None:
            return cast("tuple[Tensor, Tensor]", found)
        # The quotients are whole numbers, up to rounding.
        return torch.div(real, step).add_(0.5 - (low - zero_point)).to(torch.uint8), levels.amax() * 0.0

    def from_bytes(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        if self.offset is not None:
            return super().from_bytes(codes, dtype)
        working = torch.float64 if dtype == torch.float64 else torch.float32
        number = torch.empty([1] * codes.ndim, dtype=working, device=codes.device)
        step, (low, _, zero_point) = self.step(number), self._codes_in(number)
        kernel = kernels.find("from_codes", codes, working)
        values = None if kernel is None else kernel(codes, step, low, working, zero_point)
        return cast_back(codes.to(working).add_(low - zero_point).mul_(step) if values is None else values, dtype)

    def ends(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.offset is not None:
            return super().ends(x)
        step = self.step(x)
        low, high = self._bounds(x, step)
        return like(low, step) * step, like(high, step) * step

    def _own_step(self) -> Tensor:
        """Return the step in the type in which it is kept, () or (C,)."""
        step = torch.as_tensor(self.scale).detach()
        return step if self.divisor == 1 else step / self.divisor

    def thresholds(self) -> Tensor:
        step = self._own_step()[..., None]
        codes = torch.arange(int(self.qmin), int(self.qmax), device=step.device) + 0.5
        edges = (codes - torch.as_tensor(self.zero_point, device=step.device)[..., None]) * step
        return edges if self.offset is None else edges + torch.as_tensor(self.offset).detach()[..., None]

    def affine_params(self) -> AffineParams:
        """Return the affine view. Raises NoAffineViewError for an offset that is no whole number of steps."""
        step, zero_point = self._own_step(), self.zero_point
        if self.offset is not None:
            offset = torch.as_tensor(self.offset).detach().to(torch.float64)
            zero_point = (-offset / step).round()
            if not torch.allclose(-zero_point * step, offset, rtol=1e-5, atol=0.0):
                raise NoAffineViewError("its offset is between two levels; call snap() and train a little on")
        return AffineParams(step, zero_point, *self.code_range)

    def side_bytes(self) -> int:
        """Return 4 bytes per step; a zero point takes as many bytes as a code, if any zero point is not 0."""
        try:
            step, zero_point, qmin, qmax = self.affine_params()
        except NoAffineViewError:
            return super().side_bytes()
        code_bytes = -(-(qmax - qmin).bit_length() // 8) if bool(torch.as_tensor(zero_point).any()) else 0
        return step.numel() * (FLOAT_BYTES + code_bytes)

    def integer_terms(self) -> IntegerTerms:
        codes = torch.arange(int(self.qmin), int(self.qmax) + 1)
        try:
            params = self.affine_params()
        except NoAffineViewError:
            return [(_wide(self._own_step()), codes), _ones(self.offset, len(codes))]
        zero_point = torch.as_tensor(params.zero_point).detach().to(torch.int64).cpu()
        return [(_wide(params.delta), codes - zero_point[..., None])]


@dataclass(frozen=True, eq=False)
class ScaledFormat(Format):
    """Fixed numbers times a scale, plus an optional shift: `unit_value(code) * scale + shift`."""

    scale: Number
    shift: Number | None = field(default=None, kw_only=True)

    @property
    def largest(self) -> float:
        """Return the largest of the fixed numbers."""
        return 1.0

    @abstractmethod
    def unit_values(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the fixed numbers of codes."""

    def values(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        unit = self.unit_values(codes, dtype)
        values = unit * self.shaped(self.scale, unit)
        return values if self.shift is None else values + self.shaped(self.shift, values)

    def decoding_numbers(self) -> list[Tensor]:
        return [torch.as_tensor(number) for number in (self.scale, self.shift) if number is not None]

    def integer_terms(self) -> IntegerTerms:
        """Return the fixed numbers times a common denominator, which goes into the scale; a shift is one more term."""
        low, high = self.code_range
        return scaled_terms(self.unit_values(torch.arange(low, high + 1), torch.float64), self.scale, self.shift)


@dataclass(frozen=True, eq=False)
class Levels(Format):
    """A sorted list of levels without a rule, (L,) or (C, L); a code is an index into it.

    >>> levels = Levels(torch.tensor([-1.0, 0.0, 3.0]))
    >>> levels.project(torch.tensor([-9.0, 1.4, 1.6]))[0]
    tensor([-1.,  0.,  3.])
    """

    table: Tensor

    @property
    def code_range(self) -> tuple[int, int]:
        return 0, self.table.shape[-1] - 1

    @property
    def n_channels(self) -> int | None:
        return len(self.table) if self.table.ndim == 2 else None

    def codes(self, x: Tensor) -> Tensor:
        return nearest_level(x, self.table.to(x.dtype), self.axis)

    def values(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        return level_values(codes.to(torch.int64), self.table.to(dtype), self.axis)

    def kernel(self) -> KernelCall | None:
        return "levels", (self.table,), ()

    def nearest(self, x: Tensor, want_inside: bool) -> tuple[Tensor, Tensor | None]:
        value, inside = super().nearest(x, want_inside)
        return value.add_(x.clamp(0.0, 0.0)), inside

    def ends(self, x: Tensor) -> tuple[Tensor, Tensor]:
        low, high = (self.shaped(self.table[..., i], x) for i in (0, -1))
        return low, high

    def integer_terms(self) -> IntegerTerms:
        raise NoAffineViewError("its levels are any numbers, not whole ones times a scale")


class OwnLevels(Format):
    """The base of formats whose groups, blocks or tokens have levels of their own."""

    def ends_of_elements(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the lowest and the highest level of each element, where codes alone say which level it is."""
        low, high = (self.values(torch.full(x.shape, code, device=x.device), x.dtype) for code in self.code_range)
        return torch.minimum(low, high), torch.maximum(low, high)

    def code_values(self) -> Tensor:
        raise NoCodesError("it has no one list of levels; each of its parts has its own")


@cache
def _has_own_kernel(format: type) -> bool:
    """Whether the kernel is for the projection of this very class."""
    return "kernel" in next(vars(c) for c in format.__mro__ if {"kernel", "nearest", "project"} & vars(c).keys())


def _has_channels(value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


def _wide(number: Number) -> Tensor:
    return torch.as_tensor(number).detach().to(torch.float64).cpu()


def _ones(number: Number | None, n_codes: int) -> tuple[Tensor, Tensor]:
    """Return the term of a number that is in every level."""
    return _wide(0.0 if number is None else number), torch.ones(n_codes, dtype=torch.int64)


def scaled_terms(table: Tensor, scale: Number, shift: Number | None = None) -> IntegerTerms:
    """Return the integer terms of `scale * table + shift`. table: (L,) float64. Raises NoAffineViewError if none."""
    denominator = common_denominator(table)
    if denominator is None:
        raise NoAffineViewError(NO_TERMS)
    whole = torch.round(table * denominator).to(torch.int64)
    terms = [(_wide(scale) / denominator, whole), _ones(shift, len(whole))]
    used = [(number, ints) for number, ints in terms if bool(number.any())]
    return used or [(torch.ones((), dtype=torch.float64), torch.zeros_like(whole))]


def common_denominator(table: Tensor) -> int | None:
    """Return the least D for which `table * D` is integer, up to rounding; None if above `LARGEST_DENOMINATOR`.

    >>> common_denominator(torch.tensor([0.5, 0.75, 2.0], dtype=torch.float64))
    4
    """
    from fractions import Fraction  # seldom needed, and it would slow down the import of torchquant

    result = 1
    for value in table.unique().tolist():
        fraction = Fraction(value).limit_denominator(LARGEST_DENOMINATOR)
        if abs(float(fraction) - value) > SMALLEST_ERROR * abs(value):
            return None
        result = lcm(result, fraction.denominator)
    return result if result <= LARGEST_DENOMINATOR else None
