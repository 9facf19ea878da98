"""Further processes for tests, forked from one that has torch loaded: each would take seconds to load it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch

METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
CONTEXT: Any = multiprocessing.get_context(METHOD)
CONTEXT.set_forkserver_preload(["torch", "torch._dynamo", "torch.distributed"])


def run_ranks(work: Callable[..., None], *arguments: Any, n_ranks: int = 2) -> None:
    """Run work(rank, *arguments) in `n_ranks` processes at once, and raise what one of them raises."""
    torch.multiprocessing.start_processes(work, arguments, n_ranks, start_method=METHOD)
