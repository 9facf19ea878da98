"""Evaluate a metric of a model over batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from torchquant._arguments import checked, number
from torchquant._modes import in_mode
from torchquant._shown import shown
from torchquant.errors import ConfigError
from torchquant.graph.recording import call_with
from torchquant.training.batches import OnBatch, check_batches, count, pair_of, place, progress_bar, taken

Metric = Callable[[Any, Any], Any]
"""(outputs, targets) of a batch -> one value per sample, or one number, the mean over the samples."""


def top1(outputs: Any, targets: Any) -> Tensor:
    """Compute the share of labels at the largest score: (N, classes, ...) scores, (N, ...) labels -> (N,) float64.

    >>> top1(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1])).tolist()
    [1.0, 0.0]
    """
    is_scores = isinstance(outputs, Tensor) and isinstance(targets, Tensor) and outputs.ndim > 1
    if not is_scores or outputs.shape[:1] + outputs.shape[2:] != targets.shape or not len(targets):
        raise ConfigError(
            f"the accuracy needs scores of shape (N, classes, ...) and labels of shape (N, ...), got {shown(outputs)} "
            f"and {shown(targets)}; otherwise give metric, a function of outputs and targets"
        )
    hits = (outputs.argmax(1) == targets).to("cpu", torch.float64)
    return hits.reshape(len(hits), -1).mean(1)


@checked
def evaluate(
    model: nn.Module,
    batches: Iterable[Any],
    metric: Metric = top1,
    max_batches: int | None = None,
    device: str | torch.device | None = None,
    on_batch: OnBatch | None = None,
    show_progress: bool | None = None,
) -> float:
    """Compute the mean of a metric over all samples, in the model's current state; by default top-1 accuracy, 0..1.

    `batches`: (inputs, targets) pairs. `metric`: a function of the outputs and targets of a batch that returns one
    value per sample, or their mean. The model runs in eval mode, without gradients; afterwards each module has its
    former mode again. The other arguments are as in `calibrate`. Raises ConfigError if there are no batches.

    >>> net = nn.Linear(2, 2)
    >>> x, labels = torch.randn(6, 2), torch.zeros(6, dtype=torch.int64)
    >>> batches = list(zip(x.split(4), labels.split(4)))
    >>> evaluate(net, batches) == float((net(x).argmax(1) == 0).double().mean())
    True
    >>> error = evaluate(net, [(x, x)], metric=nn.functional.mse_loss)
    """
    check_batches(batches, max_batches)
    where = place(model, device)
    total, n_samples = 0.0, 0
    with (
        torch.no_grad(),
        in_mode(False, model),
        progress_bar("evaluating", count(batches, max_batches), show_progress, on_batch) as advance,
    ):
        for i, batch in enumerate(taken(batches, max_batches, where, on_batch)):
            inputs, targets = pair_of(batch, i)
            value, n = summed(metric(call_with(model, inputs, "a batch"), targets), batch)
            total, n_samples = total + value, n_samples + n
            advance()
    if n_samples == 0:
        raise ConfigError("there are no batches to evaluate on; give at least one")
    return total / n_samples


def summed(value: Any, batch: Any) -> tuple[float, int]:
    """Return the sum of a metric over the samples of a batch, and the number of samples."""
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim]
    n_samples = len(tensors[-1]) if tensors else 1
    if isinstance(value, Tensor) and value.shape == (n_samples,):
        return float(value.to("cpu", torch.float64).sum()), n_samples
    return number(value, "the metric, if it is not one value per sample,") * n_samples, n_samples
