"""Training, calibration and evaluation: the few steps around the state machine."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchquant._files import write_whole
from torchquant.demo.data import TrainingData
from torchquant.qmodule import QModuleState
from torchquant.utils import observe_weights, qmodule_state, quantizer_parameters, set_qmodule_state

BATCH_SIZE = 64

OnEpoch = Callable[[int, float], None]
"""Called after each epoch with its number, from 1, and its mean loss."""


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
    generator = torch.Generator().manual_seed(seed)
    learned = quantizer_parameters(model)
    of_quantizers = set(map(id, learned["params"]))
    weights = {"params": [p for p in model.parameters() if id(p) not in of_quantizers]}
    groups = [weights, learned] if of_quantizers else [weights]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, weight_decay=1e-2)
    n_steps = epochs * steps_per_epoch(data)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=n_steps)
    model.train()
    first = 1
    if progress is not None and progress.exists():
        saved = torch.load(progress, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        generator.set_state(saved["batches"])
        torch.set_rng_state(saved["random"])
        first = int(saved["epoch"]) + 1
    for epoch in range(first, epochs + 1):
        losses = []
        for x, labels in data.train_batches(generator, BATCH_SIZE):
            loss = F.cross_entropy(model(x), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
        if progress is not None:
            saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            saved |= {"schedule": schedule.state_dict(), "epoch": epoch}
            saved |= {"batches": generator.get_state(), "random": torch.get_rng_state()}
            write_whole(progress, partial(torch.save, saved))
        if on_epoch is not None:
            on_epoch(epoch, float(torch.stack(losses).mean()))
    model.eval()


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
    set_qmodule_state(model, QModuleState.QUANT_AWARE_TRAIN)
    train(model, data, epochs, learning_rate, seed, on_epoch, progress)
    observe_weights(model)
    set_qmodule_state(model, QModuleState.QUANT_EVAL)


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
