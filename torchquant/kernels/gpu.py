"""The kernels on a GPU, written in Triton: the same operations as in `cpu.py`, one pass over memory each.

Tensors are contiguous or channels-last, and are taken in the order of memory: `outer` times `channels` times `inner`.
No function here waits for the device. docs/decisions/0049 says how they equal the PyTorch code bit for bit.
"""

# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator, no-untyped-def"
# ruff: noqa: N803
from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchquant._tensors import like
from torchquant.kernels._bounds import Bound, Clamp, code_bounds
from torchquant.kernels.cpu import FLOATS, HALVES, Number, parts

FLAGS = 8
"""How many elements share a byte of a mask: the length of a row of a block."""
ABSENT, PLAIN, SINGLE, EACH = -2, -1, 0, 1
"""How a kernel reads a number: not at all, as an argument, from memory, from memory for each channel."""
MOST_IN_32_BITS = 2**31 - 2**16
"""The largest number of elements whose places a kernel counts in 32 bits, which is faster."""
BLOCKS = ((64, 2), (128, 4), (512, 8))
"""Rows of a block and warps that compute it; the fastest for a size of tensors is found at its first call."""


def _tuned(kernel: Any) -> Any:
    blocks = BLOCKS if isinstance(kernel, triton.JITFunction) else BLOCKS[-1:]  # Triton's interpreter is not timed
    configs = [triton.Config({"ROWS": rows}, num_warps=warps) for rows, warps in blocks]
    return triton.autotune(configs, key=["size"])(kernel)


@triton.jit
def _rows(ROWS: tl.constexpr, WIDE: tl.constexpr):
    """Return the rows of a block of 8 elements each."""
    first = tl.program_id(0)
    if WIDE:
        first = first.to(tl.int64)
    return first * ROWS + tl.arange(0, ROWS)


@triton.jit
def _number(n, x, channel, KIND: tl.constexpr):
    """Read a number of the grid for each element of x, or one for all."""
    value = n
    if KIND == -1:
        value = tl.full(x.shape, n, x.dtype)
    if KIND == 0:
        value = tl.load(n)
    if KIND == 1:
        value = tl.load(n + channel)
    return value


@triton.jit
def _divide(x, y):
    """Divide as IEEE 754 says; Triton's own division of float32 is off by up to two units in the last place."""
    return tl.div_rn(x, y) if x.dtype == tl.float32 else x / y


@triton.jit
def _round(x):
    """Round half to even, with the sign of x on a 0: beyond 2**23 (2**52) a float is whole, below the sum rounds."""
    if x.dtype == tl.float32:
        whole = 8388608.0
        is_negative = x.to(tl.int32, bitcast=True) < 0
    else:
        whole = 4503599627370496.0
        is_negative = x.to(tl.int64, bitcast=True) < 0
    size = tl.abs(x)
    rounded = tl.where(size < whole, (size + whole) - whole, size)
    return tl.where(is_negative, -rounded, rounded)


@triton.jit
def _clamp(x, low, high):
    """Clamp to low, then to high; NaN in any of the three stays, and -0.0 where an end is 0."""
    lifted = tl.where(x >= low, x, tl.where(x == x, low, x))
    return tl.where(lifted <= high, lifted, tl.where(lifted == lifted, high, lifted))


@_tuned
@triton.jit(do_not_specialize=["size"])
def _uniform(
    x, value, bits, step, low, high, below, above, n, inner, channels, size,
    STEP: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, BELOW: tl.constexpr, ABOVE: tl.constexpr,
    INSIDE: tl.constexpr, PACKS: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows, flag = _rows(ROWS, WIDE), tl.arange(0, 8)[None, :]
    place = rows[:, None] * 8 + flag
    exists, channel = place < n, (place // inner) % channels
    real = tl.load(x + place, mask=exists, other=0.0)
    unit = _number(step, real, channel, STEP)
    rounded = _round(_divide(real, unit))
    code = _clamp(rounded, _number(low, real, channel, LOW), _number(high, real, channel, HIGH))
    tl.store(value + place, code * unit, mask=exists)
    if PACKS:
        inside = exists
        if INSIDE:
            inside = inside & (rounded == code)
        if BELOW != -2:
            inside = inside & ((real <= _number(below, real, channel, BELOW)) == 0)
        if ABOVE != -2:
            inside = inside & ((real >= _number(above, real, channel, ABOVE)) == 0)
        tl.store(bits + rows, tl.sum(inside.to(tl.int32) << flag, axis=1).to(tl.uint8), mask=rows * 8 < n)


@_tuned
@triton.jit(do_not_specialize=["size"])
def _masked(grad, bits, out, n, size, WIDE: tl.constexpr, ROWS: tl.constexpr):
    rows, flag = _rows(ROWS, WIDE), tl.arange(0, 8)[None, :]
    place = rows[:, None] * 8 + flag
    exists = place < n
    given = tl.load(grad + place, mask=exists, other=0.0)
    mask = (tl.load(bits + rows, mask=rows * 8 < n, other=0).to(tl.int32)[:, None] >> flag) & 1
    wide = given if given.dtype == tl.float64 else given.to(tl.float32)
    zero = (wide * 0.0).to(given.dtype)  # -0.0 or NaN for some
    tl.store(out + place, tl.where(mask == 1, given, zero), mask=exists)


@_tuned
@triton.jit(do_not_specialize=["size"])
def _to_codes(
    value, codes, step, low, n, inner, channels, size,
    STEP: tl.constexpr, LOW: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    place = _rows(ROWS, WIDE)[:, None] * 8 + tl.arange(0, 8)[None, :]
    exists, channel = place < n, (place // inner) % channels
    level = tl.load(value + place, mask=exists, other=0.0)
    lifted = _divide(level, _number(step, level, channel, STEP)) + (0.5 - _number(low, level, channel, LOW))
    tl.store(codes + place, tl.where(lifted == lifted, lifted, 0.0).to(tl.int32).to(tl.uint8), mask=exists)


@_tuned
@triton.jit(do_not_specialize=["size"])
def _from_codes(
    codes, value, step, low, n, inner, channels, size,
    STEP: tl.constexpr, LOW: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    place = _rows(ROWS, WIDE)[:, None] * 8 + tl.arange(0, 8)[None, :]
    exists, channel = place < n, (place // inner) % channels
    code = tl.load(codes + place, mask=exists, other=0).to(value.dtype.element_ty)
    tl.store(value + place, (code + _number(low, code, channel, LOW)) * _number(step, code, channel, STEP), mask=exists)


@_tuned
@triton.jit(do_not_specialize=["size"])
def _learned_step(
    x, value, step, offset, low, high, n, inner, channels, size,
    STEP: tl.constexpr, OFFSET: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    place = _rows(ROWS, WIDE)[:, None] * 8 + tl.arange(0, 8)[None, :]
    exists, channel = place < n, (place // inner) % channels
    real = tl.load(x + place, mask=exists, other=0.0)
    unit = _number(step, real, channel, STEP)
    if OFFSET != -2:
        real = real - _number(offset, real, channel, OFFSET)
    code = _clamp(_divide(real, unit), _number(low, real, channel, LOW), _number(high, real, channel, HIGH))
    level = _round(code) * unit
    if OFFSET != -2:
        level = level + _number(offset, real, channel, OFFSET)
    tl.store(value + place, level, mask=exists)


def _launch(kernel: Any, x: Tensor, *arguments: Any, **constants: Any) -> None:
    """Run a kernel over the elements of x, on its device and current stream, without fused multiply-adds."""
    n = x.numel()
    with torch.cuda.device_of(x):
        kernel[lambda chosen: (triton.cdiv(n, FLAGS * chosen["ROWS"]),)](
            *arguments, n.bit_length(), WIDE=n > MOST_IN_32_BITS, enable_fp_fusion=False, **constants
        )


def _readable(number: Number | None, dtype: torch.dtype, device: torch.device) -> tuple[Number, int]:
    """Return what a kernel gets for a number, and how it reads it: an argument of a kernel has 32 bits."""
    if number is None:
        return 0.0, ABSENT
    if isinstance(number, Tensor):
        return number.contiguous(), EACH if number.numel() > 1 else SINGLE
    if dtype == torch.float32 or number == torch.tensor(number, dtype=torch.float32).item():
        return float(number), PLAIN
    return torch.full((), number, dtype=dtype, device=device), SINGLE


def _read(dtype: torch.dtype, device: torch.device, **numbers: Number | None) -> tuple[list[Number], dict[str, int]]:
    """Return the arguments of a kernel for these numbers, and the constants that say how it reads them."""
    found = {name.upper(): _readable(number, dtype, device) for name, number in numbers.items()}
    return [number for number, _ in found.values()], {name: kind for name, (_, kind) in found.items()}


def _centred(
    x: Tensor, step: Number, low: Number, high: Number, zero_point: Number, clamp: Clamp | None
) -> list[Number]:
    """Return the bounds of codes counted from real 0, in x's type."""
    bounds = code_bounds(x, cast(Tensor, step), cast(Bound, low), cast(Bound, high), cast(Bound, zero_point), clamp)
    return [like(bound, x) if isinstance(bound, Tensor) else bound for bound in bounds]


def uniform(
    x: Tensor,
    step: Number,
    low: Number,
    high: Number,
    zero_point: Number = 0,
    clamp: Clamp | None = None,
    is_strict: bool = False,
    wants_inside: bool = False,
) -> tuple[Tensor, Tensor | None] | None:
    """Return `clamp(round(x / step), *code_bounds) * step` and a mask, packed; None for numbers of other shapes.

    step, low, high, zero_point: in x's type, broadcastable along one axis at most; see `code_bounds`. The mask is 1
    where the rounded code was not clamped, if `wants_inside`, and strictly between the ends of the clamp, if
    `is_strict`; None if nothing is asked.
    """
    low, high = _centred(x, step, low, high, zero_point, clamp)
    shape = parts(x, step, low, high)
    if shape is None:
        return None
    below, above = clamp if clamp is not None and is_strict else (None, None)
    numbers, kinds = _read(x.dtype, x.device, step=step, low=low, high=high, below=below, above=above)
    value, packs = torch.empty_like(x), wants_inside or is_strict
    bits = x.new_empty((x.numel() + 7) // 8, dtype=torch.uint8) if packs else None
    places = x, value, value if bits is None else bits
    _launch(_uniform, x, *places, *numbers, x.numel(), shape[2], shape[1], INSIDE=wants_inside, PACKS=packs, **kinds)
    return value, bits


def to_codes(value: Tensor, step: Number, low: Number, zero_point: Number = 0) -> tuple[Tensor, Tensor] | None:
    """Return the codes of values on the grid, counted from `low`, as uint8, and 0, or NaN if a value is NaN."""
    low = low - zero_point
    shape = parts(value, step, low)
    if shape is None:
        return None
    numbers, kinds = _read(value.dtype, value.device, step=step, low=low)
    codes = torch.empty_like(value, dtype=torch.uint8)
    _launch(_to_codes, value, value, codes, *numbers, value.numel(), shape[2], shape[1], **kinds)
    return codes, value.amax() * 0.0


def from_codes(codes: Tensor, step: Number, low: Number, dtype: torch.dtype, zero_point: Number = 0) -> Tensor | None:
    """Return `(codes + low - zero_point) * step` in `dtype`. codes: (*) uint8."""
    low = low - zero_point
    shape = parts(codes, step, low)
    if shape is None:
        return None
    numbers, kinds = _read(dtype, codes.device, step=step, low=low)
    value = torch.empty_like(codes, dtype=dtype)
    _launch(_from_codes, codes, codes, value, *numbers, codes.numel(), shape[2], shape[1], **kinds)
    return value


def masked(grad: Tensor, bits: Tensor) -> Tensor:
    """Return grad times 1 or 0, from `bits` that were packed in the memory order of grad."""
    out = torch.empty_like(grad)
    _launch(_masked, grad, grad, bits, out, grad.numel())
    return out


def learned_step(x: Tensor, step: Tensor, low: int, high: int, offset: Tensor | None = None) -> Tensor | None:
    """Return `step * round(clamp((x - offset) / step, low, high)) + offset`; None for numbers of other shapes.

    step, offset: in x's type, broadcastable along one axis at most.
    """
    shape = parts(x, step, *(() if offset is None else (offset,)))
    if shape is None:
        return None
    numbers, kinds = _read(x.dtype, x.device, step=step, offset=offset, low=low, high=high)
    value = torch.empty_like(x)
    _launch(_learned_step, x, x, value, *numbers, x.numel(), shape[2], shape[1], **kinds)
    return value


def kernels() -> dict[tuple[str, torch.dtype], Callable[..., Any]]:
    """Return the function for each operation and type."""
    of_floats = uniform, to_codes, from_codes, learned_step
    found: dict[tuple[str, torch.dtype], Callable[..., Any]] = {(f.__name__, t): f for f in of_floats for t in FLOATS}
    return found | {("masked", dtype): masked for dtype in FLOATS + HALVES}


@cache
def why_not() -> str | None:
    """Say why the kernels are not used on the GPU of this process: Triton fails there, or computes other numbers."""
    x = torch.linspace(-1.0, 1.0, 10_001, device="cuda")
    try:
        found = uniform(x, 0.1, -8, 7, wants_inside=True)
        product = masked(x, cast(tuple[Tensor, Tensor], found)[1])
    except Exception as error:  # of its compiler, of the driver, of the linker: PyTorch's operators need none of them
        return f"Triton fails on {torch.cuda.get_device_name()}: {error}"
    rounded = torch.div(x, torch.full_like(x, 0.1)).round_()
    code = rounded.clamp(-8, 7)
    expected = code * torch.full_like(x, 0.1), x * (rounded == code)
    is_same = all(map(torch.equal, (cast(tuple[Tensor, Tensor], found)[0], product), expected))
    return None if is_same else f"Triton computes other numbers than PyTorch on {torch.cuda.get_device_name()}"
