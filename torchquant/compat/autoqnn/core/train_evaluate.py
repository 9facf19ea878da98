"""AutoQNN's training and validation loops, and its metrics."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchquant._files import write_whole
from torchquant.compat.autoqnn.core.precision import learned_widths, precision_loss
from torchquant.errors import ConfigError

Metric = Callable[[Tensor, Tensor], Tensor]


def accuracy(output: Tensor, target: Tensor, topk: Sequence[int] = (1,)) -> list[Tensor]:
    """Compute the percentage of rows of (N, classes) scores with the label among the `k` largest; (1,) for each k."""
    ranked = output.topk(min(max(topk), output.shape[1]), 1).indices
    hits = ranked == target.view(-1, 1)
    return [hits[:, :k].any(1).float().mean().view(1) * 100.0 for k in topk]


def top1(output: Tensor, target: Tensor) -> Tensor:
    """Compute the percentage of labels with the largest score.

    >>> top1(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1]))
    tensor([50.])
    """
    return accuracy(output, target)[0]


def top5(output: Tensor, target: Tensor) -> Tensor:
    """Compute the percentage of labels among the five largest scores."""
    return accuracy(output, target, (5,))[0]


class AverageMeter:
    """The last value, `val`, and the mean of all, `avg`, weighted by `n`.

    >>> meter = AverageMeter()
    >>> meter.update(1.0, n=3)
    >>> meter.update(5.0)
    >>> meter.val, meter.avg
    (5.0, 2.0)
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all values."""
        self.val: Any = 0
        self.avg: Any = 0
        self.sum: Any = 0
        self.count = 0

    def update(self, val: Any, n: int = 1) -> None:
        """Take a value that stands for `n` samples."""
        self.val = val
        self.sum = self.sum + val * n
        self.count += n
        self.avg = self.sum / self.count


def adjust_learning_rate(optimizer: torch.optim.Optimizer, epoch: int, steps: Sequence[int] = (10,)) -> None:
    """Set all rates of an optimizer to that of its first group, a tenth of it in an epoch that `steps` lists."""
    rate = optimizer.param_groups[0]["lr"] * (0.1 if epoch in steps else 1.0)
    for group in optimizer.param_groups:
        group["lr"] = rate


def save_checkpoint(state: Any, is_best: bool, filename: str | os.PathLike[str] = "checkpoint.pth.tar") -> None:
    """Save a state with torch; the best one also as model_best.pth.tar beside it."""
    path = Path(filename)
    write_whole(path, lambda temporary: torch.save(state, temporary))
    if is_best:
        shutil.copyfile(path, path.with_name("model_best.pth.tar"))


class _Averages:
    """Averages over batches, weighted by their sizes, and a line that shows them."""

    def __init__(self, metric_meds: Sequence[Metric]) -> None:
        self.metrics = metric_meds
        self.totals = [0.0] * (1 + len(metric_meds))
        self.count = 0

    def update(self, output: Tensor, target: Tensor, loss: Tensor) -> None:
        n = len(target)
        found = [float(loss.detach()), *(float(metric(output.detach(), target)) for metric in self.metrics)]
        self.totals = [total + value * n for total, value in zip(self.totals, found, strict=True)]
        self.count += n

    def result(self) -> tuple[float, list[Tensor]]:
        """Return the loss, and each metric as a tensor (), as AutoQNN does: its users call `.item()`."""
        if not self.count:
            raise ConfigError("the loader yielded no batch; give at least one")
        loss, *metrics = (total / self.count for total in self.totals)
        return loss, [torch.tensor(metric, dtype=torch.float64) for metric in metrics]

    def line(self) -> str:
        loss, metrics = self.result()
        named = (f"{getattr(m, '__name__', 'metric')} {v:.3f}" for m, v in zip(self.metrics, metrics, strict=True))
        return "\t".join([f"Loss {loss:.4f}", *named])


def _device(model: nn.Module) -> torch.device:
    return next((tensor.device for tensor in model.parameters()), torch.device("cpu"))


def _batch(model: nn.Module, batch: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    return batch[0].to(_device(model)), batch[1].to(_device(model))


def _run(
    loader: Iterable[Sequence[Tensor]],
    model: nn.Module,
    criterion: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer | None,
    metric_meds: Sequence[Metric],
    print_freq: int,
    title: str,
) -> tuple[float, float, float, list[Tensor]]:
    """Run one pass over a loader: (seconds per batch, of which waiting for data, loss, metrics)."""
    model.train(optimizer is not None)
    averages = _Averages(metric_meds)
    started = time.perf_counter()
    waiting, n_batches = 0.0, 0
    learns = bool(learned_widths(model))
    with torch.set_grad_enabled(optimizer is not None):
        asked = started
        for i, batch in enumerate(loader):
            x, target = _batch(model, batch)
            waiting += time.perf_counter() - asked
            output = model(x)
            loss = criterion(output, target)
            if optimizer is not None:
                optimizer.zero_grad()
                (loss + precision_loss(model) if learns else loss).backward()
                optimizer.step()
            averages.update(output, target, loss)
            n_batches = i + 1
            if print_freq and n_batches % print_freq == 0:
                print(f"{title}[{n_batches}]\t{averages.line()}")
            asked = time.perf_counter()
    loss_mean, metrics = averages.result()
    return (time.perf_counter() - started) / n_batches, waiting / n_batches, loss_mean, metrics


def train(
    train_loader: Iterable[Sequence[Tensor]],
    model: nn.Module,
    criterion: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    epoch: int = 1,
    metric_meds: Sequence[Metric] = (),
    print_freq: int = 10,
) -> tuple[float, float, float, list[Tensor]]:
    """Train for one epoch on the model's device: (seconds per batch, of which waiting for data, loss, metrics).

    Quantizers that learn their widths add `precision_loss(model)` to the loss that is minimized, not to the one shown.
    """
    return _run(train_loader, model, criterion, optimizer, metric_meds, print_freq, f"Epoch: [{epoch}]")


def validate(
    val_loader: Iterable[Sequence[Tensor]],
    model: nn.Module,
    criterion: Callable[[Tensor, Tensor], Tensor],
    metric_meds: Sequence[Metric] = (),
    print_freq: int = 10,
) -> tuple[float, list[Tensor]]:
    """Compute loss and metrics over a loader, in evaluation mode."""
    return _run(val_loader, model, criterion, None, metric_meds, print_freq, "Test: ")[2:]


def train_on_batch(
    train_loader: Iterable[Sequence[Tensor]],
    model: nn.Module,
    criterion: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    metric_meds: Sequence[Metric] = (),
) -> tuple[float, list[Tensor]]:
    """Train one step on the first batch of the loader; return loss and metrics before the step."""
    first = [next(iter(train_loader))]
    return _run(first, model, criterion, optimizer, metric_meds, 1, "Step ")[2:]


def validate_on_batch(
    val_loader: Iterable[Sequence[Tensor]],
    model: nn.Module,
    criterion: Callable[[Tensor, Tensor], Tensor],
    metric_meds: Sequence[Metric] = (),
) -> tuple[float, list[Tensor]]:
    """Compute loss and metrics on the first batch of the loader."""
    return _run([next(iter(val_loader))], model, criterion, None, metric_meds, 1, "Test: ")[2:]
