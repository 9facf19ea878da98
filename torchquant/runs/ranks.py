"""A run on several processes: each sees its share of the batches, the first one writes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torchquant.errors import ConfigError
from torchquant.runs.data import BATCH_SIZE, TrainBatches, TrainingData
from torchquant.training.batches import usable_device

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables that torchrun sets."""


@dataclass(frozen=True)
class Ranks:
    """Which process this is, of how many, and where it computes."""

    rank: int = 0
    world: int = 1
    device: str = "cpu"

    @property
    def is_first(self) -> bool:
        """Whether it is the one that writes and speaks."""
        return self.rank == 0

    def of_first(self, value: Any) -> Any:
        """The value that the first process has."""
        box = [value]
        if self.world > 1:
            dist.broadcast_object_list(box)
        return box[0]

    def at_first(self, work: Callable[[], object]) -> None:
        """Do it in the first process; the others wait. A ConfigError is raised in all of them."""
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
        """The part of the data that this process sees."""
        return data if self == Ranks() else Share(data, self.rank, self.world, self.device)


@dataclass(frozen=True)
class Share:
    """Every `world`-th batch, from the one at `rank`, on a device; as many for each process. All test images.

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
                f"too few for {self.world} processes"
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
        """All batches are drawn, so that the generators of all processes stay alike."""
        n_batches = -(-self.data.n_train // batch_size) // self.world * self.world
        for i, (images, labels) in enumerate(self.data.train_batches(generator, batch_size)):
            if i % self.world == self.rank and i < n_batches:
                yield images.to(self.device), labels.to(self.device)


@contextmanager
def process_group(distributed: bool, device: str | None = None) -> Iterator[Ranks]:
    """The processes that torchrun started, joined as long as the context lasts; without `distributed` this one alone.

    `device`: "cpu", "cuda", ...; None: the GPU of each rank, if there are any, for `distributed`, else the CPU. gloo on
    the CPU, NCCL on GPUs. A group that is there already is used. Raises ConfigError without torchrun.
    """
    if not distributed:
        yield Ranks(device=str(usable_device(device or "cpu")))
        return
    missing = [name for name in VARIABLES if name not in os.environ]
    if missing and not dist.is_initialized():
        raise ConfigError(
            f"distributed needs one process a rank, but {', '.join(missing)} is not in the environment; start it with "
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
    """Whether torchrun, if it started this process, made it the first one."""
    return os.environ.get("RANK", "0") == "0"
