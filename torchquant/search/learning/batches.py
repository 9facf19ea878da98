"""Read the batches of a search."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from itertools import cycle
from typing import Any

Batches = Iterable[Any] | Callable[[int], Iterable[Any]]
"""(inputs, targets) pairs: an iterable for every epoch, or a function of the epoch's number, from 1."""


def batches_of(batches: Batches, epoch: int) -> Iterable[Any]:
    """Return the batches of one epoch."""
    return batches(epoch) if callable(batches) else batches


def n_batches(stream: Iterable[Any], otherwise: int) -> int:
    """Return the number of batches if the stream has a length, or else `otherwise`."""
    return max(len(stream), 1) if isinstance(stream, Sized) else otherwise


def pairs(stream: Iterable[Any], arch_batches: Batches | None, epoch: int) -> Iterator[tuple[Any, Any]]:
    """Yield (batch for the weights, batch for logits and widths or None), from two sources, or from one in turns.

    >>> list(pairs([1, 2, 3], None, 1)), list(pairs([1, 2, 3], [7, 8], 1))
    ([(1, 2), (3, None)], [(1, 7), (2, 8), (3, 7)])
    """
    if arch_batches is not None:
        again = cycle(batches_of(arch_batches, epoch))
        for batch in stream:
            yield batch, next(again)
        return
    turns = iter(stream)
    for batch in turns:
        yield batch, next(turns, None)
