"""Further processes for tests, forked from one that has torch loaded: each would take seconds to load it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
CONTEXT: Any = multiprocessing.get_context(METHOD)
CONTEXT.set_forkserver_preload(["torch", "torch._dynamo", "torch.distributed"])


def run_ranks(work: Callable[..., None], *arguments: Any, n_ranks: int = 2) -> None:
    """Run work(rank, *arguments) in `n_ranks` processes at once, and raise what one of them raises."""
    torch.multiprocessing.start_processes(work, arguments, n_ranks, start_method=METHOD)


def results_of_ranks(work: Callable[[int, str], None], folder: Path, n_ranks: int = 2) -> list[Any]:
    """Run work(rank, folder) in each process, and load the `rank{rank}.pt` that each saves in the folder."""
    run_ranks(work, str(folder), n_ranks=n_ranks)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(n_ranks)]
