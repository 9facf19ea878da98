"""Training, calibration and evaluation: the few steps around the state machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from torchquant.demo.data import TrainingData
from torchquant.qmodule import QModuleState
from torchquant.training import OnEpoch, fit, fit_quantized
from torchquant.utils import qmodule_state, set_qmodule_state

BATCH_SIZE = 64


def train(
    model: nn.Module,
    data: TrainingData,
    epochs: int,
    learning_rate: float,
    seed: int,
    on_epoch: OnEpoch | None = None,
    progress: Path | None = None,
) -> None:
    """Train on cross entropy with AdamW and a one-cycle learning rate; leaves the model in eval mode.

    `progress`: a file that keeps where the training is after each epoch; if it is there already, training goes on
    from it and ends with the same numbers, bit for bit.
    """
    _run(fit, model, data, epochs, learning_rate, seed, on_epoch, progress)


def _run(
    loop: Callable[..., None],
    model: nn.Module,
    data: TrainingData,
    epochs: int,
    learning_rate: float,
    seed: int,
    on_epoch: OnEpoch | None,
    progress: Path | None,
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        return data.train_batches(generator, BATCH_SIZE)

    n_steps = steps_per_epoch(data)
    loop(model, batches, epochs, learning_rate, n_steps, on_epoch=on_epoch, progress=progress, generator=generator)


def steps_per_epoch(data: TrainingData) -> int:
    """Batches in an epoch."""
    return -(-data.n_train // BATCH_SIZE)


@torch.no_grad()
def calibrate(model: nn.Module, data: TrainingData, n_batches: int, seed: int) -> None:
    """Show `n_batches` distorted training batches to every observer; then the model is in QUANT_EVAL."""
    batches = data.train_batches(torch.Generator().manual_seed(seed), BATCH_SIZE)
    with qmodule_state(model.eval(), QModuleState.CALIBRATION):
        for (x, _), _ in zip(batches, range(n_batches), strict=False):
            model(x)
    set_qmodule_state(model, QModuleState.QUANT_EVAL)


def quantization_aware_train(
    model: nn.Module,
    data: TrainingData,
    epochs: int,
    learning_rate: float,
    seed: int,
    on_epoch: OnEpoch | None = None,
    progress: Path | None = None,
) -> None:
    """`train` with quantizers on, then bring the weight ranges up to date; the model ends in QUANT_EVAL."""
    _run(fit_quantized, model, data, epochs, learning_rate, seed, on_epoch, progress)


@torch.no_grad()
def predict(model: nn.Module, x: Tensor, batch_size: int = 512) -> Tensor:
    """Class scores (N, 10) of (N, 1, 16, 16) images, in eval mode and in the state the model is in."""
    was_training = model.training
    model.eval()
    scores = torch.cat([model(part) for part in x.split(batch_size)])
    model.train(was_training)
    return scores


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """Share of rows of (N, classes) whose largest score is at the label, 0..1.

    >>> accuracy(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1]))
    0.5
    """
    return float((scores.argmax(1) == labels).double().mean())
