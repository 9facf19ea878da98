"""Define how a run is carried out, apart from what it computes: device, precision, threads, what is used again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchquant.errors import ConfigError
from torchquant.kernels._compiler import CompileError, find_compiler
from torchquant.runs.settings import check_at_least, check_types, option
from torchquant.training.amp import check_amp
from torchquant.training.batches import usable_device

SMALL = 1e9
"""Largest number of floating-point operations, for a batch of 64 forward, of a model that one thread runs as fast."""
SAMPLE = 64


@dataclass(frozen=True)
class RunOptions:
    """How a run is carried out; a run that was stopped can resume with others, except for `amp`.

    `device`: where the model is; None: the CPU, or with torchrun the GPU of each process. `amp`, `compile`: as `amp`
    and `compiled` of `torchquant.fit`. `workers`: threads that prepare batches ahead; no number depends on them.
    `threads`: of the CPU; None: see `computing`. `force`: delete what another run left in the folder. `reuse_float`:
    take over the float model of an earlier run with the same float training. Raises ConfigError.
    """

    device: str | None = option(None, "cpu, cuda, cuda:1, mps, ...; default: cpu.")
    amp: str | None = option(None, "Train in mixed precision: bf16 or fp16.")
    compile: bool = option(False, "Train with torch.compile, which takes minutes at first.")
    workers: int = option(0, "Threads that prepare batches ahead; no number depends on them.")
    threads: int | None = option(
        None,
        "CPU threads. Default: 1 for a small model, else the idle cores. The same seed and number of threads give the "
        "same numbers; another number of threads rounds sums differently, so the last digits can differ.",
    )
    force: bool = option(False, "Delete what another run left in the folder, and start anew.")
    reuse_float: bool = option(True, "Take over the float model of an earlier run with the same float training.")

    def __post_init__(self) -> None:
        check_types(self)
        check_amp(self.amp)
        check_at_least(self, workers=0, **({} if self.threads is None else {"threads": 1}))
        device = usable_device(self.device or "cpu")
        if self.compile and device.type == "cpu":
            try:
                find_compiler()
            except CompileError as error:
                raise ConfigError(f"compile on the CPU compiles C++, but {error}") from error

    def that_change_numbers(self) -> dict[str, Any]:
        """Return the options that a run keeps with its settings, where they are not at their default."""
        return {} if self.amp is None else {"amp": self.amp}

    def threads_for(self, model: nn.Module, image: Tensor) -> tuple[int, str]:
        """Choose the number of CPU threads for a float model and images like (1, C, H, W); with the reason in words."""
        cores = usable_cores()
        if self.threads is not None:
            return self.threads, "as asked"
        if _operations(model, image) <= SMALL:
            return 1, "the model is small"
        others = round(os.getloadavg()[0]) if hasattr(os, "getloadavg") else 0
        free = max(cores - others, 1)
        return free, f"{cores} cores" + (f", of which other programs use {min(others, cores)}" if free < cores else "")

    @contextmanager
    def computing(self, model: nn.Module, image: Tensor) -> Iterator[str]:
        """Compute on a sensible number of CPU threads while the context lasts; gives it in words.

        Threads wait for each other at every operation: for small operations, and beside busy programs, more of them
        are slower, many times.
        """
        number, reason = self.threads_for(model, image)
        with on_threads(number):
            yield f"{number} thread{'s' * (number > 1)} ({reason}; --threads N for another number)"


@contextmanager
def on_threads(number: int) -> Iterator[None]:
    """Compute on so many CPU threads while the context lasts."""
    former = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(former)


def usable_cores() -> int:
    """Return the number of cores that this process may use, by affinity and by the quota of its control group."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        with open("/sys/fs/cgroup/cpu.max", encoding="ascii") as file:
            quota, period = file.read().split()
        return max(min(cores, round(int(quota) / int(period))), 1)
    except (OSError, ValueError):  # no control groups, or no quota
        return cores


def _operations(model: nn.Module, image: Tensor) -> float:
    """Count the floating-point operations of a batch forward, in a model that runs on the image."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image)
    return float(counter.get_total_flops()) * SAMPLE / len(image)
