"""The ranks of a process group in a run: what only one of them knows, and errors that only one of them meets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from torchquant.errors import ConfigError
from torchquant.range_observers._distributed import reduce_max, reduce_sum, world_size

ELSEWHERE = "another rank of the process group has failed, and says why; this one cannot go on without it"


@contextmanager
def errors_on_all_ranks() -> Iterator[None]:
    """Let an error of one rank end all, so that none waits for ever; the others raise a ConfigError.

    Nothing inside may wait for the other ranks after what can fail.
    """
    if world_size() == 1:
        yield
        return
    error: Exception | None = None
    try:
        yield
    except Exception as found:  # noqa: BLE001 - it is raised again
        error = found
    any_failed = bool(reduce_max(torch.tensor(float(error is not None))))
    if error is not None:
        raise error
    if any_failed:
        raise ConfigError(ELSEWHERE)


def total(n: int) -> int:
    """Return the sum of a number over all ranks."""
    return int(reduce_sum(torch.tensor(n)))


def is_any(flag: bool) -> bool:
    """Tell whether something is true on a rank."""
    return bool(reduce_max(torch.tensor(float(flag))))


def joined_groups(groups: Sequence[list[str]]) -> list[list[str]]:
    """Join the groups that each rank has found: those of the first, then what only later ones know."""
    every: list[Sequence[list[str]]] = [groups]
    if world_size() > 1:
        every = [[] for _ in range(world_size())]
        dist.all_gather_object(every, list(groups))
    placed: set[str] = set()
    joined = []
    for found in every:
        for group in found:
            new = [path for path in group if path not in placed]
            placed.update(new)
            joined += [new] if new else []
    return joined


def mean_gradients(found: Sequence[Tensor | None], learned: Sequence[Tensor], counts: bool) -> list[Tensor | None]:
    """Return the mean over the ranks that count of each gradient; None where no rank has one.

    found: the gradients of this rank, None for what its batch does not reach. learned: what they belong to.
    """
    if world_size() == 1:
        return list(found)
    flat = [torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in zip(found, learned, strict=True)]
    has = learned[0].new_tensor([float(counts), *(float(g is not None) for g in found)], dtype=torch.float32)
    sums = reduce_sum(torch.cat([has, *(g.to(torch.float32) for g in flat)]))
    n, known = sums[0].clamp_min(1.0), sums[1 : len(has)].tolist()
    parts = sums[len(has) :].split([g.numel() for g in flat])
    return [
        (part / n).view_as(p).to(p.dtype) if is_known else None
        for part, p, is_known in zip(parts, learned, known, strict=True)
    ]


def are_alike(tensors: Sequence[Tensor]) -> bool:
    """Tell whether all ranks have the same tensors."""
    if world_size() == 1 or not tensors:
        return True
    whole = torch.cat([x.detach().flatten().to(torch.float32) for x in tensors])
    return torch.equal(reduce_max(whole), -reduce_max(-whole))
