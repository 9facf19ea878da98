"""Sums over rows that are fast, do not overflow, and do not depend on the other rows of the same call.

A plain float32 sum is reassociated with the number of rows and threads, so a channel alone would get
other statistics than the same channel among others; summing in float64 costs twelve memory passes.
Summing blocks of 256 in the tensor's own type and the block sums in float64 has neither fault.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from torchquant import kernels
from torchquant.quantizers_functional._powers import floor_pow2

BLOCK = 256
AT_ONCE = 2**18  # elements of an intermediate tensor, a multiple of BLOCK
Result = TypeVar("Result")


def _as_it_is(x: Tensor) -> Tensor:
    return x


class Joining(NamedTuple):
    """How the means, sums and maxima of the parts of a batch become those of the whole; by default unchanged."""

    mean: Callable[[Tensor], Tensor] = _as_it_is
    sum: Callable[[Tensor], Tensor] = _as_it_is
    max: Callable[[Tensor], Tensor] = _as_it_is


WHOLE = Joining()
"""The way to join statistics if no other rank has a part of the rows."""


class _Shared(threading.local):
    known: dict[Any, tuple[Tensor, Any]] | None = None


_shared = _Shared()


@contextmanager
def shared_sums() -> Iterator[None]:
    """Share, within the context, the sums that several quantizers measure on one tensor: each is computed once.

    >>> x = torch.tensor([[3.0, 4.0]])
    >>> with shared_sums():
    ...     shared_unit_rows(x)[0] is shared_unit_rows(x)[0]
    True
    """
    outer, _shared.known = _shared.known, {}
    try:
        yield
    finally:
        _shared.known = outer


def _known() -> dict[Any, tuple[Tensor, Any]] | None:
    return None if torch.compiler.is_compiling() else _shared.known


def _once(compute: Callable[[Tensor], Result], rows: Tensor) -> Result:
    """Return `compute(rows)`, kept while sums are shared; callers must not write to it."""
    known = _known()
    if known is None:
        return compute(rows)
    key = (compute, rows.data_ptr(), rows.shape, rows.stride(), rows.dtype, rows.device, rows._version)
    if key not in known:
        known[key] = rows, compute(rows)  # rows are kept too, so that no other tensor can get their address
    return known[key][1]


def row_sums(rows: Tensor) -> Tensor:
    """Compute the sum of each row. rows: (C, n) float. (C,) float64.

    >>> row_sums(torch.ones(2, 1000))
    tensor([1000., 1000.], dtype=torch.float64)
    """
    whole = rows.shape[1] - rows.shape[1] % BLOCK
    tail = rows[:, whole:].to(torch.float64).sum(1)
    if whole == 0:
        return tail
    return rows[:, :whole].unflatten(1, (-1, BLOCK)).sum(-1).to(torch.float64).sum(1) + tail


def row_sums_of(compute: Callable[[Tensor], tuple[Tensor, ...]], rows: Tensor) -> tuple[Tensor, ...]:
    """Compute `row_sums` of each tensor that the elementwise `compute(rows)` returns, bit for bit.

    A long single row is processed in pieces on a CPU, so that intermediate results stay in the cache.
    """
    n = rows.shape[1]
    if len(rows) > 1 or n <= AT_ONCE or torch.compiler.is_compiling() or rows.device.type != "cpu":
        return tuple(row_sums(part) for part in compute(rows))
    whole = n - n % BLOCK
    blocks = [
        [part.unflatten(1, (-1, BLOCK)).sum(-1) for part in compute(piece)]
        for piece in rows[:, :whole].split(AT_ONCE, 1)
    ]
    tails = [part.to(torch.float64).sum(1) for part in compute(rows[:, whole:])]
    return tuple(torch.cat(sums, 1).to(torch.float64).sum(1) + tail for *sums, tail in zip(*blocks, tails, strict=True))


def unit_rows(rows: Tensor, parts: Joining = WHOLE) -> tuple[Tensor, Tensor]:
    """Return (rows / unit, unit): each row divided, exactly, by the power of two below its largest magnitude.

    rows: (C, n) float, n > 0. unit: (C,), a power of two, 1 for a row of zeros or subnormals, the same for all parts of
    a row. Squares and sums of the result neither overflow nor vanish. NaN and Inf stay in the row they are in.
    """
    rows = rows.to(torch.float32) if rows.dtype in (torch.float16, torch.bfloat16) else rows
    absmax = parts.max(torch.maximum(rows.amax(1), -rows.amin(1)))
    unit = floor_pow2(absmax)
    unit = torch.where((unit > 0) & unit.isfinite(), unit, torch.ones_like(unit))
    return rows / unit[:, None], unit


@cache
def _kernels_add_as_torch() -> bool:
    """Whether the kernels add up a row in the order in which this PyTorch does on this processor."""
    for n in (7, 255, BLOCK, 300 * BLOCK + 119):
        rows = torch.linspace(-3.0, 5.0, 2 * n).exp_().view(2, n)
        for name, compute in (("magnitude_sums", torch.abs), ("square_sums", torch.square)):
            kernel = kernels.find(name, rows)
            if kernel is None or not torch.equal(kernel(rows)[0], row_sums(compute(rows))):
                return False
    return True


def row_sums_by_kernel(name: str, rows: Tensor, *numbers: Any) -> Tensor | None:
    """Return the sums of that name over each row by a kernel, (n, C) float64; None where there is none.

    They equal `row_sums` of the units, times the unit, bit for bit. See `kernels/cpu_row_sums.py`.
    """
    kernel = kernels.find(name, rows)
    return kernel(rows, *numbers) if kernel is not None and _kernels_add_as_torch() else None


def row_mean_squares(rows: Tensor) -> Tensor:
    """Compute the mean square of each row, without overflow or underflow. rows: (C, n) float, n > 0. (C,) float64.

    >>> row_mean_squares(torch.tensor([[3.0, 4.0]]))
    tensor([12.5000], dtype=torch.float64)
    """
    return _once(_mean_squares, rows).clone()


def _mean_squares(rows: Tensor) -> Tensor:
    sums = row_sums_by_kernel("square_sums", rows)
    if sums is not None:
        return sums[0] / rows.shape[1]
    units, unit = shared_unit_rows(rows)
    squares = units.square_() if _known() is None else units.square()
    return row_sums(squares) / units.shape[1] * unit.to(torch.float64).square()


def row_mean_magnitudes(rows: Tensor, parts: Joining = WHOLE) -> Tensor:
    """Compute the mean magnitude E|x| of each row, without overflow or underflow. rows: (C, n), n > 0. (C,) float64.

    >>> row_mean_magnitudes(torch.tensor([[-3.0, 4.0]]))
    tensor([3.5000], dtype=torch.float64)
    """
    sums = row_sums_by_kernel("magnitude_sums", rows)
    if sums is None:
        units, unit = unit_rows(rows)
        return parts.mean(row_sums(units.abs_()) * unit / rows.shape[1])
    return parts.mean(sums[0] / rows.shape[1])


def shared_unit_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return `unit_rows(rows)`, read-only: other callers may hold the same tensors."""
    return _once(unit_rows, rows)


def row_moments(rows: Tensor, parts: Joining = WHOLE) -> tuple[Tensor, Tensor]:
    """Compute mean and population standard deviation of each row. rows: (C, n) float, n > 0. Two (C,) float64.

    The largest magnitudes of `parts` differ, so the joined numbers are in the units of x. A constant row has deviation
    exactly 0, without rounding error.

    >>> row_moments(torch.tensor([[1.0, 3.0]]))
    (tensor([2.], dtype=torch.float64), tensor([1.], dtype=torch.float64))
    """
    sums = row_sums_by_kernel("plain_sums", rows)
    if sums is None:
        mean, square = _mean_and_square(rows, parts)
    else:
        mean = parts.mean(sums[0] / rows.shape[1])
        squares = cast(Tensor, row_sums_by_kernel("centred_square_sums", rows, mean))
        square = squares[0] / rows.shape[1]
    deviation = parts.mean(square).sqrt()
    return mean, torch.where(deviation > 1e-7 * mean.abs(), deviation, torch.zeros_like(deviation))


def _mean_and_square(rows: Tensor, parts: Joining) -> tuple[Tensor, Tensor]:
    """Compute the mean of each row over all parts, and the mean square of the distances to it in this part."""
    units, unit = shared_unit_rows(rows)
    unit = unit.to(torch.float64)
    mean = parts.mean(row_sums(units) / units.shape[1] * unit)
    shift = (mean / unit)[:, None]

    def centred_squares(units: Tensor) -> tuple[Tensor]:
        return (units.to(torch.float64, copy=True).sub_(shift).square_(),)

    (squares,) = row_sums_of(centred_squares, units)
    return mean, squares / units.shape[1] * unit.square()


def mean_deviation(rows: Tensor, parts: Joining = WHOLE) -> tuple[Tensor, Tensor]:
    """Compute the mean of each row, and the mean distance to it, E|x - mean|. rows: (C, n), n > 0. Two (C,) float64.

    >>> mean_deviation(torch.tensor([[1.0, 2.0, 6.0]]))
    (tensor([3.], dtype=torch.float64), tensor([2.], dtype=torch.float64))
    """
    units, unit = shared_unit_rows(rows)
    unit = unit.to(torch.float64)
    mean = parts.mean(row_sums(units) / units.shape[1] * unit)
    shift = (mean / unit)[:, None]

    def distances(units: Tensor) -> tuple[Tensor]:
        return (units.to(torch.float64, copy=True).sub_(shift).abs_(),)

    (total,) = row_sums_of(distances, units)
    distance = parts.mean(total / units.shape[1] * unit)
    return mean, torch.where(distance > 1e-7 * mean.abs(), distance, torch.zeros_like(distance))


def wide_means(rows: Tensor, parts: Joining = WHOLE) -> tuple[Tensor, Tensor]:
    """Compute the mean of each row, and its share of elements other than 0, in float64. rows: (C, n). Two (C,).

    >>> wide_means(torch.tensor([[0.0, 3.0]]))
    (tensor([1.5000], dtype=torch.float64), tensor([0.5000], dtype=torch.float64))
    """
    sums = row_sums_by_kernel("wide_sums", rows)
    if sums is None:

        def numbers(rows: Tensor) -> tuple[Tensor, ...]:
            return rows.to(torch.float64), (rows != 0).to(torch.float64)

        sums = torch.stack(row_sums_of(numbers, rows))
    mean, share = parts.mean(sums / rows.shape[1])
    return mean, share


def distances(rows: Tensor, centre: Tensor, parts: Joining = WHOLE) -> Tensor:
    """Compute the mean square and the mean magnitude of x - centre, and the share of x > 0, in float64. (3, C).

    rows: (C, n). centre: (C,) float64.

    >>> distances(torch.tensor([[-1.0, 3.0]]), torch.tensor([1.0], dtype=torch.float64)).T
    tensor([[4.0000, 2.0000, 0.5000]], dtype=torch.float64)
    """
    sums = row_sums_by_kernel("distance_sums", rows, centre)
    if sums is None:

        def numbers(rows: Tensor) -> tuple[Tensor, ...]:
            centred = rows.to(torch.float64) - centre[:, None]
            return centred.square(), centred.abs_(), (rows > 0).to(torch.float64)

        sums = torch.stack(row_sums_of(numbers, rows))
    return parts.mean(sums / rows.shape[1])


def cut_off(rows: Tensor, low: Tensor, high: Tensor, parts: Joining = WHOLE) -> Tensor:
    """Compute the mean square of what clamps to some ranges take away from each row, in float64. (k, C).

    rows: (C, n). low, high: (k, C) float64.

    >>> cut_off(torch.tensor([[-1.0, 3.0]]), *torch.tensor([[[-1.0]], [[1.0]]], dtype=torch.float64))
    tensor([[2.]], dtype=torch.float64)
    """
    sums = row_sums_by_kernel("cut_sums", rows, low, high)
    if sums is None:

        def squares(rows: Tensor) -> tuple[Tensor, ...]:
            wide, ends = rows.to(torch.float64), zip(low, high, strict=True)
            return tuple((wide - wide.clamp(a[:, None], b[:, None])).square_() for a, b in ends)

        sums = torch.stack(row_sums_of(squares, rows))
    return parts.mean(sums / rows.shape[1])


def usable_scale(scale: Tensor, largest_level: float) -> Tensor:
    """Bound the scale so that no level overflows float32 and no quotient is lost; 0, NaN and Inf stay unchanged."""
    bounded = scale.clamp(2.0**-126, torch.finfo(torch.float32).max / 2 / largest_level)
    return torch.where(scale.isfinite(), torch.where(scale > 0, bounded, torch.zeros_like(scale)), scale)
