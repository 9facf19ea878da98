"""Arithmetic of batch-norm folding (docs/algorithms.md D1, D2). All vectors are (C,), C output channels."""

from __future__ import annotations

import torch
from torch import Tensor

from torchquant._tensors import channel_view as channel_view


def bn_sigma(var: Tensor, eps: float) -> Tensor:
    """Compute the standard deviation as batch norm uses it, `sqrt(var + eps)`."""
    return torch.sqrt(var + eps)


def fold_factor(gamma: Tensor | None, sigma: Tensor) -> Tensor:
    """Compute the factor of each output channel of the weight, `gamma / sigma`."""
    return 1.0 / sigma if gamma is None else gamma / sigma


def fold_bias(bias: Tensor | None, mean: Tensor, factor: Tensor, beta: Tensor | None) -> Tensor:
    """Compute the bias of the folded layer, `beta + (bias - mean) * factor`.

    >>> fold_bias(None, torch.tensor([0.5]), torch.tensor([2.0]), torch.tensor([0.25]))
    tensor([-0.7500])
    """
    shifted = -mean if bias is None else bias - mean
    folded = shifted * factor
    return folded if beta is None else folded + beta
