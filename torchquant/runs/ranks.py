"""Run on several processes: each sees its share of the batches, and the first one writes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torchquant.errors import ConfigError
from torchquant.runs.data import BATCH_SIZE, BatchTask, TrainBatches, TrainingData, batch_tasks
from torchquant.training.batches import usable_device

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables that torchrun sets."""


@dataclass(frozen=True)
class Ranks:
    """The rank of this process, the number of processes, and the device it computes on."""

    rank: int = 0
    world: int = 1
    device: str = "cpu"

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and messages."""
        return self.rank == 0

    def of_first(self, value: Any) -> Any:
        """Return the value of the first process, in every process."""
        box = [value]
        if self.world > 1:
            dist.broadcast_object_list(box)
        return box[0]

    def at_first(self, work: Callable[[], object]) -> None:
        """Do the work in the first process; the others wait. A ConfigError is raised in all of them."""
        error: str | None = None
        if self.is_first:
            try:
                work()
            except ConfigError as found:
                error = str(found)
        error = self.of_first(error)
        if error is not None:
            raise ConfigError(error)

    def share(self, data: TrainingData) -> TrainingData:
        """Return the part of the data that this process sees."""
        return data if self == Ranks() else Share(data, self.rank, self.world, self.device)


@dataclass(frozen=True)
class Share:
    """Every `world`-th batch from batch `rank` on, on a device, equally many per process; and all test images.

    Raises ConfigError for data with fewer batches than processes.
    """

    data: TrainingData
    rank: int
    world: int
    device: str

    def __post_init__(self) -> None:
        if len(TrainBatches(self.data)) < self.world:
            raise ConfigError(
                f"{self.data.n_train} training images make {len(TrainBatches(self.data))} batches of {BATCH_SIZE}, "
                f"too few for {self.world} processes; start fewer processes"
            )

    @property
    def n_train(self) -> int:
        return len(TrainBatches(self.data)) // self.world * BATCH_SIZE

    @property
    def n_channels(self) -> int:
        return self.data.n_channels

    @property
    def n_classes(self) -> int:
        return self.data.n_classes

    @property
    def test_images(self) -> Tensor:
        return self.data.test_images.to(self.device)

    @property
    def test_labels(self) -> Tensor:
        return self.data.test_labels.to(self.device)

    def train_batches(self, generator: torch.Generator, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of this process; all batches are drawn, so that all generators stay equal."""
        return (task() for task in self.train_tasks(generator, batch_size))

    def train_tasks(self, generator: torch.Generator, batch_size: int) -> Iterator[BatchTask]:
        """Yield what makes these batches."""
        n_batches = -(-self.data.n_train // batch_size) // self.world * self.world
        for i, task in enumerate(batch_tasks(self.data, generator, batch_size)):
            if i % self.world == self.rank and i < n_batches:
                yield partial(self._moved, task)

    def _moved(self, task: BatchTask) -> tuple[Tensor, Tensor]:
        images, labels = task()
        return images.to(self.device), labels.to(self.device)


@contextmanager
def process_group(distributed: bool, device: str | None = None) -> Iterator[Ranks]:
    """Join the processes that torchrun started while the context lasts; without `distributed`, only this process.

    `device`: "cpu", "cuda", ...; None: with `distributed` the GPU of each rank, if there is one, else the CPU. The
    backend is gloo on
    the CPU and NCCL on GPUs. An existing process group is used. Raises ConfigError without torchrun.
    """
    if not distributed:
        yield Ranks(device=str(usable_device(device or "cpu")))
        return
    missing = [name for name in VARIABLES if name not in os.environ]
    if missing and not dist.is_initialized():
        raise ConfigError(
            f"distributed needs one process per rank, but {', '.join(missing)} is not in the environment; start with "
            "torchrun --nproc-per-node 2 -m torchquant search ... --distributed"
        )
    if device is None:
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    if usable_device(device).type != "cpu":
        torch.cuda.set_device(device)
    made = not dist.is_initialized()
    if made:
        dist.init_process_group("gloo" if device == "cpu" else "nccl")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), device)
    finally:
        if made:
            dist.destroy_process_group()


def is_first_of_environment() -> bool:
    """Tell whether this process is the first one that torchrun started, or was not started by torchrun."""
    return os.environ.get("RANK", "0") == "0"
