"""What batch norms remember of data that is gone: ranges of activations, and a loss for inputs made up to match."""

from __future__ import annotations

import math

from torch import Tensor

from torchquant._arguments import explained


@explained
def normal_ranges(
    beta: Tensor, gamma: Tensor, deviations: float = 6.0, low: float = -math.inf, high: float = math.inf
) -> tuple[Tensor, Tensor]:
    """The range `beta -+ 6 |gamma|` of each channel behind a batch norm, clamped as its activation clamps: two (C,).

    low, high: 0 and inf for a ReLU, 0 and 6 for a ReLU6. Source: Nagel et al. 2019, arXiv:1906.04721.

    >>> import torch
    >>> normal_ranges(torch.tensor([1.0]), torch.tensor([-0.5]), low=0.0)
    (tensor([0.]), tensor([4.]))
    """
    reach = deviations * gamma.abs()
    return (beta - reach).clamp(low, high), (beta + reach).clamp(low, high)


@explained
def statistics_error(x: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """How far the statistics of x are from a batch norm's: squared distance of means and of deviations, ().

    x: (N, C, *), what a batch norm reads; mean, deviation: (C,), `running_mean` and the root of `running_var`. The
    deviation of x is that of a population. Add it up over the batch norms of a model, and for the input with mean 0 and
    deviation 1. Source: Cai et al. 2020, arXiv:2001.00281.

    >>> import torch
    >>> statistics_error(torch.tensor([[1.0], [3.0]]), torch.tensor([2.5]), torch.tensor([1.0]))
    tensor(0.2500)
    """
    channels = x.movedim(1, 0).flatten(1)
    found = channels.std(1, correction=0)
    return (channels.mean(1) - mean).square().sum() + (found - deviation).square().sum()
