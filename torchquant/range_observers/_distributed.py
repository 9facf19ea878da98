"""Make the ranks of torch.distributed agree on the numbers of their joined batch.

Each rank has a share of a batch, of any size, even empty. Sums and extremes are those of the joined batch; the mean of
a rank is weighted by the size of its share. Without a process group every function returns its input.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from torchquant.quantizers_functional._row_statistics import WHOLE, Joining

_IS_BUILT = dist.is_available()
_counts: list[int] = []
"""Elements per row of the share that this rank is observing; the last entry counts."""


def world_size() -> int:
    """Return the number of ranks, 1 without an initialised process group."""
    return dist.get_world_size() if _IS_BUILT and dist.is_initialized() else 1


@contextmanager
def observing(count: int) -> Iterator[None]:
    """Weight this rank's part of every mean, within the context, by `count` elements per row; 0 adds nothing at all."""
    _counts.append(count)
    try:
        yield
    finally:
        _counts.pop()


def _count() -> int:
    if not _counts:
        raise RuntimeError("a mean over ranks needs to know each one's share: call it within observing(count)")
    return _counts[-1]


def _is_empty() -> bool:
    return bool(_counts) and _counts[-1] == 0


def reduce_max(x: Tensor) -> Tensor:
    """Return the element-wise maximum of x over all ranks, -Inf if none has an element; Inf where any rank has NaN."""
    if world_size() == 1:
        return x
    # A reduction may lose NaN.
    return _reduced(torch.full_like(x, -torch.inf) if _is_empty() else torch.where(x.isnan(), torch.inf, x), "MAX")


def reduce_sum(x: Tensor) -> Tensor:
    """Return the element-wise sum of x over all ranks."""
    if world_size() == 1:
        return x
    return _reduced(torch.zeros_like(x) if _is_empty() else x.clone(), "SUM")


def _reduced(x: Tensor, how: str) -> Tensor:
    """Reduce a tensor of one's own over all ranks; one of the CPU on a GPU, where the process group has no other."""
    moved = x.cuda() if x.device.type == "cpu" and dist.get_backend() == "nccl" else x
    dist.all_reduce(moved, op=getattr(dist.ReduceOp, how))
    return moved.to(x.device)


def reduce_mean(x: Tensor) -> Tensor:
    """Return the element-wise mean over the joined batch, from the means x of the ranks' shares; NaN if it is empty."""
    if world_size() == 1:
        return x
    wide = x.flatten().to(torch.float32 if x.device.type == "mps" else torch.float64)
    sums = reduce_sum(torch.cat([wide * _count(), torch.full_like(wide[:1], _count())]))
    return (sums[:-1] / sums[-1]).to(x.dtype).view_as(x)


_RANKS = Joining(reduce_mean, reduce_sum, reduce_max)


def ranks() -> Joining:
    """Return how the numbers of this rank's share become those of the joined batch."""
    return WHOLE if world_size() == 1 else _RANKS


def gather_rows(rows: Tensor) -> Tensor:
    """Join the rows of all ranks: (C, n) on each rank to (C, N). Rows that are equal on all ranks are returned once.

    It is for numbers that do not follow from sums of parts, such as a sorted order. Every rank holds the joined batch
    for a moment. If no rank has elements, the result is one NaN per row.
    """
    if world_size() == 1:
        return rows
    count = rows.new_tensor([0 if _is_empty() else rows.shape[1]], dtype=torch.int64)
    counts = [torch.zeros_like(count) for _ in range(world_size())]
    dist.all_gather(counts, count)
    lengths = [int(length) for length in counts]
    if not any(lengths):
        return rows.new_full((len(rows), 1), torch.nan)
    padded = rows.new_zeros(len(rows), max(lengths))
    padded[:, : int(count)] = rows[:, : int(count)]
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    parts = [part[:, :length] for part, length in zip(parts, lengths, strict=True)]
    same = all(part.shape == parts[0].shape and torch.equal(part, parts[0]) for part in parts)
    return parts[0] if same else torch.cat(parts, 1)
