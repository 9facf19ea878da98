"""Loaders that read ahead."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader


class DataLoaderX(DataLoader[Any]):
    """A DataLoader that reads one batch ahead in a thread, while the caller works on the last one."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        end = object()
        batches = super().__iter__()
        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(next, batches, end)
            while (batch := ahead.result()) is not end:
                ahead = pool.submit(next, batches, end)
                yield batch


class data_prefetcher:  # noqa: N801 - published name
    """Copies batches of (input, target) to the accelerator, if there is one, one ahead. `next()` ends with Nones.

    >>> prefetcher = data_prefetcher([(torch.ones(1), torch.zeros(1))])
    >>> prefetcher.next()[0], prefetcher.next()
    (tensor([1.]), (None, None))
    """

    def __init__(self, loader: Iterable[tuple[Tensor, Tensor]]) -> None:
        self.loader = iter(loader)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.preload()

    def preload(self) -> None:
        """Start to copy the next batch."""
        batch = next(self.loader, (None, None))
        self.ahead = tuple(None if t is None else t.to(self.device, non_blocking=True) for t in batch)

    def next(self) -> tuple[Tensor | None, ...]:
        """Return the batch that was copied, and start to copy the one after it."""
        batch = self.ahead
        self.preload()
        return batch
