"""Training, calibration and evaluation of a model on the data of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchquant import training
from torchquant._modes import in_mode
from torchquant.runs.data import BATCH_SIZE, TrainBatches, TrainingData
from torchquant.runs.options import RunOptions
from torchquant.training import Distillation, Monitor, OnEpoch
from torchquant.training.evaluation import top1

TEST_BATCH = 512
OnBatchOfEpoch = Callable[[int, int], object]
"""Called after batch n of an epoch of so many batches."""


def train(
    model: nn.Module,
    data: TrainingData,
    epochs: int,
    learning_rate: float,
    seed: int,
    on_epoch: OnEpoch | None = None,
    progress: Path | None = None,
    quantized: bool = False,
    teacher: Distillation | None = None,
    monitor: Monitor | None = None,
    options: RunOptions | None = None,
    on_batch: OnBatchOfEpoch | None = None,
) -> None:
    """Run `training.fit` on the training batches that `seed` draws; leaves the model in eval mode.

    `quantized`: train with the quantizers on; the model ends in QUANT_EVAL. `teacher`: whom it learns from as well.
    `monitor`: what watches the quantizers. `options`: workers, mixed precision, compilation. `on_batch(n, of)`: called
    after batch n of an epoch with `of` batches.
    """
    how = options or RunOptions()
    batches = TrainBatches(data, seed, workers=how.workers)
    loop = training.fit_quantized if quantized else training.fit
    given: dict[str, Any] = {"on_epoch": on_epoch, "progress": progress, "generator": batches.generator}
    given |= {"teacher": teacher, "monitor": monitor, "amp": how.amp, "compiled": how.compile}
    seen = batches if on_batch is None else _Counted(batches, on_batch)
    loop(model, seen, epochs, learning_rate, show_progress=False, **given)


class _Counted:
    """Batches that tell how many of an epoch were taken."""

    def __init__(self, batches: TrainBatches, on_batch: OnBatchOfEpoch) -> None:
        self.batches, self.on_batch = batches, on_batch

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for n, batch in enumerate(self.batches, 1):
            yield batch
            self.on_batch(n, len(self))


def calibrate(model: nn.Module, data: TrainingData, n_batches: int, seed: int, batch_size: int = BATCH_SIZE) -> None:
    """Run `training.calibrate` on training batches that `seed` draws."""
    training.calibrate(model, TrainBatches(data, seed, batch_size), n_batches, with_targets=True, show_progress=False)


def accuracy_on(model: nn.Module, data: TrainingData) -> float:
    """Compute the accuracy on the test images, 0..1, in the current state of the model."""
    parts = (data.test_images.split(TEST_BATCH), data.test_labels.split(TEST_BATCH))
    return training.evaluate(model, zip(*parts, strict=True), show_progress=False)


@torch.no_grad()
def predict(model: nn.Module, x: Tensor) -> Tensor:
    """Compute class scores (N, classes) of images (N, channels, H, W), in eval mode and the model's current state."""
    with in_mode(False, model):
        return torch.cat([model(part) for part in x.split(TEST_BATCH)])


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """Compute the share of rows of (N, classes) whose largest score is at the label, 0..1.

    >>> accuracy(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1]))
    0.5
    """
    return float(top1(scores, labels).mean())
