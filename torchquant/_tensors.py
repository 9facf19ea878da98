"""Bring tensors into the shape, the type and the layout of others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def like(value: Tensor | float, x: Tensor) -> Tensor:
    """Convert `value` to a tensor of x's type on x's device."""
    return value.to(x.device, x.dtype) if isinstance(value, Tensor) else constant(value, x.dtype, x.device)


def constant(values: float | Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Make a tensor of plain numbers on a device, without waiting for what the device is computing."""
    return torch.as_tensor(values, dtype=dtype, device="cpu").to(device, non_blocking=True)


def divided(x: Tensor, number: float) -> Tensor:
    """Divide by a plain number with the same rounding on all devices: on a GPU, `/` multiplies by its reciprocal."""
    return x / number if x.is_cpu else x / x.new_full((), number)


def rows(x: Tensor, axis: int | None) -> Tensor:
    """View x as (C, n): one row per slice of `axis`, or a single row."""
    return x.reshape(1, -1) if axis is None else x.movedim(axis, 0).unsqueeze(-1).flatten(1)


def channel_view(vector: Tensor, ndim: int, axis: int = 1) -> Tensor:
    """View (C,) as a tensor of `ndim` dimensions with C at `axis` and 1 elsewhere."""
    shape = [1] * ndim
    shape[axis] = -1
    return vector.view(shape)


def per_channel_view(value: T, ndim: int, axis: int | None) -> T:
    """View a number per tensor, (), or per slice of `axis`, (C,), so that it broadcasts against `ndim` dimensions.

    A value that is not a tensor is returned unchanged.
    """
    if axis is None or not isinstance(value, Tensor) or value.ndim == 0:
        return value
    return channel_view(value, ndim, axis)  # type: ignore[return-value]


def in_layout_of(value: Tensor, x: Tensor) -> Tensor:
    """Return `value` in the memory layout of x."""
    return value if value.stride() == x.stride() else torch.empty_like(x, dtype=value.dtype).copy_(value)


def ordinary_zeros(shape: tuple[int, ...] | torch.Size, like: Tensor) -> Tensor:
    """Make zeros in the type of `like` that can be written and saved for backward, even in inference mode."""
    with torch.inference_mode(False):
        return torch.zeros(shape, dtype=like.dtype, device=like.device)
