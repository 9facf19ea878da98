"""Agreement over the ranks of torch.distributed; without it, every function returns its input."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of ranks, 1 without an initialised process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def reduce_max(x: Tensor) -> Tensor:
    """Element-wise maximum of x over all ranks; Inf where any rank has NaN, which a reduction may lose."""
    if world_size() > 1:
        x = torch.where(x.isnan(), torch.inf, x)
        dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x


def reduce_sum(x: Tensor) -> Tensor:
    """Element-wise sum of x over all ranks."""
    if world_size() > 1:
        dist.all_reduce(x, op=dist.ReduceOp.SUM)
    return x


def reduce_mean(x: Tensor) -> Tensor:
    """Element-wise mean of x over all ranks."""
    return reduce_sum(x).div_(world_size()) if world_size() > 1 else x
