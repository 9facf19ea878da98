"""Find the nearest level in any list of levels. docs/algorithms.md A10."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from torchquant._tensors import in_layout_of as in_layout_of
from torchquant._tensors import like
from torchquant.quantizers_functional._gradient import cast_back, compute_dtype

SMALL = 2**14  # elements below which a binary search of each is as fast as anything else
LARGEST_EXACT = 2**24  # whole numbers up to here are exact in float32
OUTWARD = 2.0**-20
"""Smallest distance beyond a threshold, as a share of it, of a value that must count as beyond it."""


def nearest_level(x: Tensor, levels: Tensor, axis: int | None = None) -> Tensor:
    """Return the index of the level nearest to x, midpoints down; int64, shape and layout of x. NaN gives L - 1.

    levels: (L,) sorted, or (C, L) for the slices of `axis`.

    >>> nearest_level(torch.tensor([-9.0, 0.4, 0.6]), torch.tensor([-1.0, 0.0, 1.0]))
    tensor([0, 1, 2])
    """
    numbers = torch.arange(levels.shape[-1], device=levels.device)
    if axis is None or levels.ndim == 1:
        index = nearest_of(x.reshape(1, -1), levels.reshape(1, -1), numbers[None])
        return in_layout_of(index.view(x.shape), x)
    moved = x.movedim(axis, 0)
    index = nearest_of(moved.unsqueeze(-1).flatten(1), levels, numbers.expand(len(levels), -1))
    return in_layout_of(index.reshape(moved.shape).movedim(0, axis), x)


def nearest_of(rows: Tensor, levels: Tensor, table: Tensor) -> Tensor:
    """Look up, for each element, the entry of `table` for the nearest level of its row; the last entry for NaN.

    rows: (C, n). levels, table: (C, L), levels sorted. Returns (C, n) of the table's type.

    On a CPU `torch.searchsorted` waits for a mispredicted branch at every step. Here all elements descend a tree of
    the midpoints together, without branches, in a fraction of its time.

    >>> nearest_of(torch.tensor([[-9.0, 0.6]]), torch.tensor([[-1.0, 1.0]]), torch.tensor([[7, 8]]))
    tensor([[7, 8]])
    """
    middles = (levels[:, 1:] + levels[:, :-1]) / 2
    m = middles.shape[1]
    depth = m.bit_length()
    slow_device = torch.compiler.is_compiling() or rows.device.type != "cpu"
    if slow_device or rows.numel() < SMALL or len(rows) << depth > LARGEST_EXACT or not 0 < depth <= 8:
        return table.gather(1, torch.searchsorted(middles.contiguous(), rows.contiguous()))
    tree = F.pad(middles, (0, 2**depth - 1 - m), value=torch.inf).flip(1)
    first = torch.arange(len(rows), dtype=rows.dtype)[:, None]
    # node: the number of a node among those of its depth, row after row; the upper half of the middles comes first.
    rows = rows.contiguous()
    middle = tree[:, 2 ** (depth - 1) - 1, None].expand_as(rows).contiguous()
    node = torch.add(middle.ge_(rows), first, alpha=2)
    index = torch.empty_like(node, dtype=torch.int32)
    for left in reversed(range(depth - 1)):
        nodes = tree[:, 2**left - 1 :: 2 ** (left + 1)].reshape(-1)
        torch.index_select(nodes, 0, index.copy_(node).view(-1), out=middle.view(-1))
        torch.add(middle.ge_(rows), node, alpha=2, out=node)
    leaves = torch.arange(2**depth).clamp_max_(m).flip(0)
    return table[:, leaves].reshape(-1).index_select(0, index.copy_(node).view(-1)).view(rows.shape)


def level_values(index: Tensor, levels: Tensor, axis: int | None = None) -> Tensor:
    """Return the levels at `index`; shape and layout of index. levels: (L,), or (C, L) for the slices of `axis`."""
    if axis is None or levels.ndim == 1:
        return in_layout_of(levels.index_select(0, index.reshape(-1)).view(index.shape), index)
    moved = index.movedim(axis, 0)
    values = levels.gather(1, moved.unsqueeze(-1).flatten(1)).reshape(moved.shape)
    return in_layout_of(values.movedim(0, axis), index)


def beyond_threshold(values: Tensor, threshold: Tensor | float) -> Tensor:
    """Move nonzero values that lie within the threshold to just beyond it; the type is kept.

    A fitted or trained scale may lie below its threshold, where it would quantize to 0.

    >>> beyond_threshold(torch.tensor([-0.5, 0.0, 2.0]), 1.0)
    tensor([-1.0000,  0.0000,  2.0000])
    """
    wide = values.to(compute_dtype(values))
    edge = like(threshold, wide) * (1.0 + max(OUTWARD, torch.finfo(values.dtype).eps))
    is_within = (wide != 0) & (wide.abs() < edge)
    return cast_back(torch.where(is_within, wide.sign() * edge, wide), values.dtype)
