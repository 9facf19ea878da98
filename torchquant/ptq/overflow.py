"""A limit on the memory that waiting forwards hold: what goes beyond it lies in memory-mapped files."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


class Overflow:
    """Moves arguments of waiting calls to temporary files while those in memory exceed `limit` bytes.

    A tensor stays the same object with the same values; only its memory becomes that of a file, which the operating
    system writes out and reads back as it sees fit. `moved`: bytes moved so far. `foreign`: what holds tensors that
    belong to others, such as the batches; these stay where they are.
    """

    def __init__(self, limit: int, foreign: Any = ()) -> None:
        self.limit, self.moved = limit, 0
        self._foreign = {id(leaf) for leaf in tree_leaves(foreign)}
        self._held: dict[int, int] = {}

    def hold(self, owner: object, arguments: Any) -> None:
        """Count the arguments that the owner waits with, in place of its former ones; move them if there are many."""
        self._held.pop(id(owner), None)
        tensors = [leaf for leaf in tree_leaves(arguments) if _can_move(leaf) and id(leaf) not in self._foreign]
        size = sum(x.nbytes for x in tensors)
        if sum(self._held.values()) + size <= self.limit:
            self._held[id(owner)] = size
            return
        for x in tensors:
            x.data = _in_a_file(x)
        self.moved += size


def _can_move(value: Any) -> bool:
    """Tell whether a value is a dense tensor of the CPU with memory of its own, not a part of another's."""
    return (
        type(value) is Tensor
        and value.device.type == "cpu"
        and value.layout == torch.strided
        and 0 < value.nbytes == value.untyped_storage().nbytes()
    )


def _in_a_file(x: Tensor) -> Tensor:
    """Copy a dense tensor to a file that is gone with the copy."""
    with tempfile.TemporaryDirectory(prefix="torchquant-", ignore_cleanup_errors=True) as folder:
        path = Path(folder, "waiting.bin")  # the mapping outlives the name of its file
        copy = torch.from_file(str(path), shared=True, size=x.numel(), dtype=x.dtype)
        return copy.as_strided(x.size(), x.stride()).copy_(x)
