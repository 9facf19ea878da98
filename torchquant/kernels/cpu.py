"""The kernels on a CPU: functions of tensors around those of the C++ library, one for each operation.

Tensors are contiguous or channels-last, and are taken in the order of memory: `outer` times `channels` times `inner`.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchquant.kernels._bounds import Clamp
from torchquant.kernels._build import built

FLOATS = (torch.float32, torch.float64)
HALVES = (torch.float16, torch.bfloat16)
LEAST_FOR_THREADS = 1 << 16
POINTER, COUNT, REAL, FLAG = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_int
NUMBER, WALK = (POINTER, COUNT, REAL), 3 * (COUNT,)
"""The types of what `kept` and `parts` return."""
NONE = math.nan
OPEN = (NONE, NONE)
ALL_ONES = 2
Number = Tensor | float


class _Threads:
    """How the library runs on the threads of torch: `GOMP_parallel` of the OpenMP library that torch has loaded."""

    def __init__(self) -> None:
        function = getattr(ctypes.CDLL(None), "GOMP_parallel", None) if os.name == "posix" else None
        self.parallel = None if function is None else ctypes.cast(function, POINTER).value
        if self.parallel is not None:
            os.register_at_fork(after_in_child=self.stop)  # OpenMP threads do not survive a fork

    def stop(self) -> None:
        self.parallel = None

    def __call__(self, x: Tensor) -> tuple[int | None, int]:
        if self.parallel is None or x.numel() < LEAST_FOR_THREADS:
            return None, 1
        return self.parallel, torch.get_num_threads()


threads_for = _Threads()
OPERATIONS: dict[str, tuple[Callable[..., Any], tuple[torch.dtype, ...], list[Any]]] = {}


def operation(dtypes: tuple[torch.dtype, ...], *argtypes: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator for `name(function, x, ...)`, which calls the C function `name_dtype` of these arguments.

    Two more are for the threads, at the end.
    """

    def enter(wrapper: Callable[..., Any]) -> Callable[..., Any]:
        OPERATIONS[wrapper.__name__] = wrapper, dtypes, [*argtypes, POINTER, ctypes.c_int]
        return wrapper

    return enter


def kernels(library: ctypes.CDLL | None = None) -> dict[tuple[str, torch.dtype], Callable[..., Any]]:
    """Return the function for each operation and type of the library, by default the one of this process."""
    # These enter their operations.
    from torchquant.kernels import cpu_affine, cpu_learned, cpu_mixtures, cpu_observers, cpu_projections, cpu_row_sums  # noqa: F401

    library = library or built().library
    found: dict[tuple[str, torch.dtype], Callable[..., Any]] = {}
    if library is None:
        return found
    for name, (wrapper, dtypes, argtypes) in OPERATIONS.items():
        for dtype in dtypes:
            function = getattr(library, f"{name}_{str(dtype).removeprefix('torch.')}")
            function.argtypes, function.restype = argtypes, ctypes.c_int
            found[name, dtype] = partial(wrapper, function)
    return found


def call(function: Any, x: Tensor, *arguments: Any) -> int:
    """Call a C function with its arguments and the threads for x; return what it returns. Raises MemoryError."""
    found = int(function(*arguments, *threads_for(x)))
    if found == 1:
        raise MemoryError(f"there is no memory for a kernel on a tensor of shape {tuple(x.shape)}")
    return found


def parts(x: Tensor, *numbers: Number) -> tuple[int, int, int] | None:
    """Return (outer, channels, inner) of x in memory for numbers that broadcast against it; None for other shapes.

    Numbers are () or vary along one axis of x.
    """
    varying = [n for n in numbers if isinstance(n, Tensor) and n.ndim]
    if not varying:
        return 1, 1, x.numel()
    sizes: dict[int, int] = {}
    for n in varying:
        if n.ndim > x.ndim:
            return None
        sizes.update({x.ndim - n.ndim + i: size for i, size in enumerate(n.shape) if size != 1})
    if not sizes:
        return 1, 1, x.numel()
    (axis, size), *others = sizes.items()
    return None if others or size != x.shape[axis] else along(x, axis)


def along(x: Tensor, axis: int) -> tuple[int, int, int]:
    """Return (outer, channels, inner) of x in memory, its channels those of an axis from 0."""
    shape = x.shape
    if not x.is_contiguous():  # channels-last
        shape = torch.Size((shape[0], *shape[2:], shape[1]))
        axis = (axis - 2) % 3 + 1 if axis else 0
    return math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])


def rows_of_numbers(x: Tensor, *numbers: Tensor | None) -> tuple[tuple[int, int, int], list[Tensor | None]] | None:
    """Return `parts` of x, and a row of each number, one for each channel; None for other shapes."""
    shape = parts(x, *(n for n in numbers if n is not None))
    if shape is None:
        return None
    return shape, [None if n is None else _row(n, shape[1]) for n in numbers]


def _row(number: Tensor, n: int) -> Tensor:
    is_row = number.numel() == n and number.is_contiguous()
    return number if is_row else number.reshape(-1).expand(n).contiguous()


def kept(*numbers: Number) -> tuple[list[Tensor], list[Any]]:
    """Return the tensors among numbers, to be kept alive, and pointer, count and value of each number for a call."""
    held: list[Tensor] = []
    given: list[Any] = []
    for n in numbers:
        if isinstance(n, Tensor):
            n = n.contiguous()
            held.append(n)
            given += (n.data_ptr(), n.numel(), 0.0)
        else:
            given += (None, 1, n)
    return held, given


@operation(FLOATS, *3 * [POINTER], *WALK, *4 * NUMBER, REAL, REAL, FLAG, FLAG)
def uniform(
    function: Any,
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
    `is_strict`; None if nothing is asked, or if it is 1 everywhere.
    """
    shape = parts(x, step, low, high, zero_point)
    if shape is None:
        return None
    held, numbers = kept(step, low, high, zero_point)
    least, most = OPEN if clamp is None else (NONE if end is None else end for end in clamp)
    value, bits, bits_pointer = torch.empty_like(x), None, None
    if wants_inside or is_strict:
        bits = torch.empty((x.numel() + 7) // 8, dtype=torch.uint8)
        bits_pointer = bits.data_ptr()
    pointers = x.data_ptr(), value.data_ptr(), bits_pointer
    found = call(function, x, *pointers, *shape, *numbers, least, most, is_strict, wants_inside)
    return value, None if found == ALL_ONES else bits


@operation(FLOATS, *3 * [POINTER], *WALK, *3 * NUMBER)
def to_codes(
    function: Any, value: Tensor, step: Number, low: Number, zero_point: Number = 0
) -> tuple[Tensor, Tensor] | None:
    """Return the codes of values on the grid, counted from `low`, as uint8, and 0, or NaN if a value is NaN."""
    shape = parts(value, step, low, zero_point)
    if shape is None:
        return None
    codes, zero_or_nan = torch.empty_like(value, dtype=torch.uint8), torch.empty((), dtype=value.dtype)
    held, numbers = kept(step, low, zero_point)
    call(function, value, value.data_ptr(), codes.data_ptr(), zero_or_nan.data_ptr(), *shape, *numbers)
    return codes, zero_or_nan


@operation(FLOATS, POINTER, POINTER, *WALK, *3 * NUMBER)
def from_codes(
    function: Any, codes: Tensor, step: Number, low: Number, dtype: torch.dtype, zero_point: Number = 0
) -> Tensor | None:
    """Return `(codes + low - zero_point) * step` in `dtype`. codes: (*) uint8."""
    shape = parts(codes, step, low, zero_point)
    if shape is None:
        return None
    value = torch.empty_like(codes, dtype=dtype)
    held, numbers = kept(step, low, zero_point)
    call(function, codes, codes.data_ptr(), value.data_ptr(), *shape, *numbers)
    return value


@operation(FLOATS + HALVES, POINTER, POINTER, POINTER, COUNT)
def masked(function: Any, grad: Tensor, bits: Tensor) -> Tensor:
    """Return grad times 1 or 0, from `bits` that were packed in the memory order of grad."""
    out = torch.empty_like(grad)
    call(function, grad, grad.data_ptr(), bits.data_ptr(), out.data_ptr(), grad.numel())
    return out
