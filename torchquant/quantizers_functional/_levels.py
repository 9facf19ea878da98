"""Nearest of a list of levels, whatever the levels are. docs/algorithms.md A10."""

from __future__ import annotations

import torch
from torch import Tensor


def in_layout_of(value: Tensor, x: Tensor) -> Tensor:
    """`value`, stored in memory as x is."""
    return value if value.stride() == x.stride() else torch.empty_like(x, dtype=value.dtype).copy_(value)


def nearest_level(x: Tensor, levels: Tensor, axis: int | None = None) -> Tensor:
    """Index of the level nearest to x, the middle of two goes down; int64, shape and layout of x. NaN gives L - 1.

    levels: (L,) sorted, or (C, L) for the slices of `axis`.

    >>> nearest_level(torch.tensor([-9.0, 0.4, 0.6]), torch.tensor([-1.0, 0.0, 1.0]))
    tensor([0, 1, 2])
    """
    middles = (levels[..., 1:] + levels[..., :-1]) / 2
    if axis is None or levels.ndim == 1:
        return in_layout_of(torch.bucketize(x.contiguous(), middles.contiguous()), x)
    moved = x.movedim(axis, 0)
    index = torch.searchsorted(middles.contiguous(), moved.flatten(1).contiguous())
    return in_layout_of(index.reshape(moved.shape).movedim(0, axis), x)


def level_values(index: Tensor, levels: Tensor, axis: int | None = None) -> Tensor:
    """The levels at `index`; shape and layout of index. levels: (L,), or (C, L) for the slices of `axis`."""
    if axis is None or levels.ndim == 1:
        return in_layout_of(levels[index], index)
    moved = index.movedim(axis, 0)
    values = levels.gather(1, moved.flatten(1)).reshape(moved.shape)
    return in_layout_of(values.movedim(0, axis), index)
