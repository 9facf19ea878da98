"""Numbers of channels: those given to the channels of a model in a run, which of them are one, and what ends there."""

from __future__ import annotations

import torch
from torch import Tensor

STOP, NORMED = "stop", "normed"
"""Notes: the path ends, for a reason; it ends in a norm, where factors end but no rotation."""
ALONE = "alone"
"""Note: each channel is treated by itself, so that a rotation of the channels would change the result."""
ZERO, UNKNOWN = -1, 0
"""Numbers of a zero, which any factor leaves as it is, and of a value that no weight can scale."""


class Channels:
    """Gives numbers, joins them, and notes what each can take.

    `n`: how many were given; `notes`: (numbers, what, where), in the order of the run. `linked`: pairs of numbers
    before and behind a norm, which a rotation changes alike; `runs`: (R, d), rows of numbers that a rotation may mix.
    """

    def __init__(self) -> None:
        self.n = 1
        self.pairs: list[Tensor] = []
        self.linked: list[Tensor] = []
        self.runs: list[Tensor] = []
        self.notes: list[tuple[Tensor, str, object]] = []
        self._stopped: set[int] = set()

    def new(self, n: int) -> Tensor:
        """Return n new numbers, (n,)."""
        self.n += n
        return torch.arange(self.n - n, self.n)

    def note(self, ids: Tensor, what: str, where: object = "") -> None:
        """Note something about these numbers: "stop" with the reason, or what a factor or shift must heed."""
        found = compact(ids).unique()
        if len(found := found[found > UNKNOWN]):
            self.notes.append((found, what, where))
            self._stopped.update(found.tolist() if what in (STOP, NORMED) else ())

    def are_stopped(self, ids: Tensor) -> bool:
        """Tell whether a path has ended already for each of these numbers."""
        found = compact(ids)
        return self._stopped.issuperset(found[found > UNKNOWN].unique().tolist())

    def join(self, a: Tensor, b: Tensor, why: str) -> Tensor:
        """Make the numbers of two tensors, of shapes that broadcast, one; return those of the result.

        A number that meets an unknown one stops, for the reason `why`.
        """
        shape = torch.broadcast_shapes(a.shape, b.shape)
        a, b = compact_both(a.expand(shape), b.expand(shape))
        first, second = a.flatten(), b.flatten()
        for one, other in ((first, second), (second, first)):
            self.note(one[other == UNKNOWN], STOP, why)
        both = (first > UNKNOWN) & (second > UNKNOWN) & (first != second)
        if bool(both.any()):
            self.pairs.append(torch.stack([first[both], second[both]]).unique(dim=1))
        return repeated(torch.where(a == ZERO, b, torch.where(b == UNKNOWN, b, a))).expand(shape)

    def link(self, before: Tensor, behind: Tensor) -> None:
        """Note that a rotation of one tensor's channels is the same rotation of the other's, of the same shape."""
        first, second = (flat.flatten() for flat in compact_both(before, behind))
        for one, other in ((first, second), (second, first)):
            self.note(one[other <= UNKNOWN], ALONE, "a norm reads it together with what no layer gives")
        both = (first > UNKNOWN) & (second > UNKNOWN)
        self.linked.append(torch.stack([first[both], second[both]]).unique(dim=1))

    def again(self, ids: Tensor) -> Tensor:
        """Return new numbers in the places of a tensor's, linked to them."""
        small = compact(ids)
        values, places = small.unique(return_inverse=True)
        fresh = torch.where(values > UNKNOWN, self.new(len(values)), values)[places]
        self.link(small, fresh)
        return fresh.expand(ids.shape)

    def confine(self, ids: Tensor, dims: list[int]) -> None:
        """Note that a rotation may mix the numbers along these dimensions only."""
        small = compact(ids)
        dims = sorted(dim % small.ndim for dim in dims)
        rows = small.movedim(dims, list(range(-len(dims), 0))).flatten(-len(dims))
        rows = rows.reshape(-1, rows.shape[-1]).unique(dim=0)
        is_known = rows > UNKNOWN
        self.note(rows[is_known & ~is_known.all(1, keepdim=True)], ALONE, "it meets what no layer gives")
        self.runs.append(rows[is_known.all(1)])

    def labels(self, linked: bool = False) -> Tensor:
        """Return the least number that each number is one with, (n,). `linked`: also across norms."""
        labels = torch.arange(self.n)
        pairs = [*self.pairs, *(self.linked if linked else ())]
        if not pairs:
            return labels
        first, second = torch.cat(pairs, 1)
        while True:
            least = torch.minimum(labels[first], labels[second])
            found = labels.scatter_reduce(0, labels[first], least, "amin").scatter_reduce(
                0, labels[second], least, "amin"
            )
            found = found[found]
            if torch.equal(found, labels):
                return labels
            labels = found


def compact(ids: Tensor) -> Tensor:
    """Drop the repetitions of an expanded tensor."""
    for dim, stride in enumerate(ids.stride()):
        if stride == 0 and ids.shape[dim] > 1:
            ids = ids.narrow(dim, 0, 1)
    return ids


def compact_both(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Drop the repetitions that two tensors of one shape share."""
    for dim, size in enumerate(a.shape):
        if size > 1 and a.stride(dim) == 0 and b.stride(dim) == 0:
            a, b = a.narrow(dim, 0, 1), b.narrow(dim, 0, 1)
    return a, b


def repeated(ids: Tensor) -> Tensor:
    """Return the same numbers without the memory of what repeats along a dimension."""
    small = ids
    for dim, size in enumerate(ids.shape):
        if size > 1:
            first = small.narrow(dim, 0, 1)
            small = first if ids.stride(dim) == 0 or bool((small == first).all()) else small
    return small.expand(ids.shape)


def along(ids: Tensor, dim: int) -> Tensor | None:
    """Return the numbers along one dimension, (C,), if they are the same everywhere else, zeros aside; else None."""
    small, dim = compact(ids), dim % max(ids.ndim, 1)
    if small.shape[dim] != ids.shape[dim]:
        small = small.expand(*[-1] * dim, ids.shape[dim], *[-1] * (ids.ndim - dim - 1))
    rows = small.movedim(dim, 0).flatten(1)
    if not rows.numel():
        return None
    found = rows.amax(1)
    return found if bool(((rows == found[:, None]) | (rows == ZERO)).all()) else None


def reduced(ids: Tensor, dims: list[int]) -> Tensor | None:
    """Return the numbers with these dimensions of size 1, if they are the same along them, zeros aside; else None."""
    for dim in dims:
        if ids.stride(dim) == 0 and ids.shape[dim] > 1:
            ids = ids.narrow(dim, 0, 1)
    found = ids.amax(dims, keepdim=True) if dims else ids
    return found if bool(((ids == found) | (ids == ZERO)).all()) else None


def placed(ids: Tensor, dim: int, shape: torch.Size) -> Tensor:
    """Lay numbers (C,) along one dimension of a shape."""
    dim %= len(shape)
    return ids.view(-1, *[1] * (len(shape) - dim - 1)).expand(shape)
