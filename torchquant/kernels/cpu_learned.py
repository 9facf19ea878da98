"""The kernels on a CPU of grids whose step, offset or upper end is learned: `learned.cpp`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchquant.kernels.cpu import COUNT, FLOATS, POINTER, REAL, call, operation, rows_of_numbers


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@operation(FLOATS, *2 * [POINTER], *3 * [COUNT], *2 * [POINTER], REAL, REAL)
def learned_step(
    function: Any, x: Tensor, step: Tensor, low: int, high: int, offset: Tensor | None = None
) -> Tensor | None:
    """Return `step * round(clamp((x - offset) / step, low, high)) + offset`; None for numbers of other shapes.

    step, offset: in x's type, broadcastable along one axis at most.
    """
    found = rows_of_numbers(x, step, offset)
    if found is None:
        return None
    shape, (steps, offsets) = found
    value = torch.empty_like(x)
    call(function, x, x.data_ptr(), value.data_ptr(), *shape, _pointer(steps), _pointer(offsets), low, high)
    return value


@operation(FLOATS, *5 * [POINTER], *3 * [COUNT], *3 * [POINTER], REAL, REAL)
def learned_step_backward(
    function: Any,
    x: Tensor,
    grad: Tensor,
    step: Tensor,
    low: int,
    high: int,
    offset: Tensor | None,
    delta: Tensor | None,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None] | None:
    """Return the gradients of x, step and offset of `learned_step`, those that are `wanted`.

    delta: () in x's type; None for a gradient that passes as it is. None for numbers of other shapes.
    """
    found = rows_of_numbers(x, step, offset)
    if found is None:
        return None
    shape, (steps, offsets) = found
    for_x = torch.empty_like(x) if wanted[0] else None
    of_step, of_offset = (
        _room(n, shape) if wants else None for n, wants in zip((step, offset), wanted[1:], strict=True)
    )
    results = _pointer(for_x), _pointer(of_step), _pointer(of_offset)
    offsets = _none(x, shape) if offsets is None else offsets
    numbers = _pointer(steps), _pointer(offsets), _pointer(delta)
    call(function, x, x.data_ptr(), grad.data_ptr(), *results, *shape, *numbers, low, high)
    return for_x, _summed(of_step, step), _summed(of_offset, offset)


@operation(FLOATS, *4 * [POINTER], *3 * [COUNT], *2 * [POINTER], REAL, REAL)
def rounded_step_backward(
    function: Any, x: Tensor, grad: Tensor, step: Tensor, low: int, high: int, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None] | None:
    """Return the gradients of x and step of `step * clamp(round(x / step), low, high)`, those that are `wanted`.

    The rounded code decides what is clipped. None for numbers of other shapes.
    """
    return _of_step(function, x, grad, step, wanted, low, high)


@operation(FLOATS, *4 * [POINTER], *3 * [COUNT], *2 * [POINTER], REAL)
def calibrated_clip_backward(
    function: Any, x: Tensor, grad: Tensor, end: Tensor, n_steps: int, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None] | None:
    """Return the gradients of x and `end` of x on the grid `end / n_steps * {0 .. n_steps}`, those that are `wanted`.

    That of `end` is 1 where x >= end, and the rounding error in units of `end` below. None for numbers of other shapes.
    """
    return _of_step(function, x, grad, end, wanted, n_steps)


def _of_step(
    function: Any, x: Tensor, grad: Tensor, step: Tensor, wanted: tuple[bool, bool], *codes: int
) -> tuple[Tensor | None, Tensor | None] | None:
    found = rows_of_numbers(x, step)
    if found is None:
        return None
    shape, (steps,) = found
    for_x = torch.empty_like(x) if wanted[0] else None
    sums = _room(step, shape) if wanted[1] else None
    pointers = x.data_ptr(), grad.data_ptr(), _pointer(for_x), _pointer(sums)
    offsets = _none(x, shape)
    call(function, x, *pointers, *shape, _pointer(steps), _pointer(offsets), *codes)
    return for_x, _summed(sums, step)


def _none(x: Tensor, shape: tuple[int, int, int]) -> Tensor | None:
    """Return offsets that change nothing; a single one may be left out."""
    return None if shape[1] == 1 else x.new_zeros(shape[1])


def _room(number: Tensor | None, shape: tuple[int, int, int]) -> Tensor | None:
    """Make room for the sums over channels, in the shape of the number if it has one for each."""
    if number is None or number.numel() == shape[1]:
        return None if number is None else torch.empty_like(number, memory_format=torch.contiguous_format)
    return number.new_empty(shape[1])


def _summed(sums: Tensor | None, number: Tensor | None) -> Tensor | None:
    """Return the sums over channels as the gradient of a number."""
    is_own = sums is None or number is None or sums.shape == number.shape
    return sums if is_own else sums.sum().view(number.shape)  # type: ignore[union-attr]


@operation(FLOATS, *4 * [POINTER], *3 * [COUNT], *2 * [POINTER], REAL)
def clip(function: Any, x: Tensor, step: Tensor, end: Tensor, n_steps: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return x on the grid `step * {0 .. n_steps}`, and two packed masks: 1 where 0 <= x < end, and where x >= end.

    step, end: in x's type, broadcastable along one axis at most; None for other shapes.
    """
    found = rows_of_numbers(x, step, end)
    if found is None:
        return None
    shape, (steps, ends) = found
    value = torch.empty_like(x)
    inside, above = (x.new_empty((x.numel() + 7) // 8, dtype=torch.uint8) for _ in range(2))
    pointers = (t.data_ptr() for t in (x, value, inside, above))
    call(function, x, *pointers, *shape, _pointer(steps), _pointer(ends), n_steps)
    return value, inside, above


@operation(FLOATS, *5 * [POINTER], *3 * [COUNT])
def clip_backward(
    function: Any, grad: Tensor, inside: Tensor, above: Tensor, end: Tensor, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None] | None:
    """Return the gradients of x and `end`, those that are `wanted`, from the masks of `clip`; None for other shapes."""
    found = rows_of_numbers(grad, end)
    if found is None:
        return None
    shape, _ = found
    for_x = torch.empty_like(grad) if wanted[0] else None
    sums = _room(end, shape) if wanted[1] else None
    pointers = grad.data_ptr(), inside.data_ptr(), above.data_ptr(), _pointer(for_x), _pointer(sums)
    call(function, grad, *pointers, *shape)
    return for_x, _summed(sums, end)
