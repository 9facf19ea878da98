"""Biases that make good what rounding does to the mean of an output, and biases that later layers take over."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchquant._arguments import explained

SQRT_2PI = math.sqrt(2.0 * math.pi)


@explained
def clipped_normal_mean(mean: Tensor, deviation: Tensor, low: float = 0.0, high: float = math.inf) -> Tensor:
    """The mean of `clamp(x, low, high)` of a normal x: of what a ReLU (0, inf) or ReLU6 (0, 6) gives behind batch norm.

    mean, deviation: (...), the shift and the scale of the batch norm, whose sign does not matter; deviation 0 gives the
    clamped mean. Source: Nagel et al. 2019, arXiv:1906.04721, appendix C.

    >>> clipped_normal_mean(torch.tensor([0.0, 3.0]), torch.tensor([1.0, 0.0]))
    tensor([0.3989, 3.0000])
    """
    size = deviation.abs()
    spread = torch.where(size > 0, size, 1.0)
    below, above = (low - mean) / spread, (high - mean) / spread
    density_below, density_above = (torch.exp(-(at.square()) / 2) / SQRT_2PI for at in (below, above))
    inside = torch.special.ndtr(above) - torch.special.ndtr(below)
    result = spread * (density_below - density_above) + mean * inside
    for end, share in ((low, torch.special.ndtr(below)), (high, torch.special.ndtr(-above))):
        result = result + (end * share if math.isfinite(end) else 0.0)
    return torch.where(size > 0, result, mean.clamp(low, high))


@explained
def bias_correction(
    weight: Tensor, rounded: Tensor, mean_input: Tensor, mean_float_input: Tensor | None = None
) -> Tensor:
    """Compute the change of the bias that makes the mean of each output the float model's: (..., rows).

    weight, rounded: (..., rows, K), before and after. mean_input: (..., K), of what the layer reads now; with
    `mean_float_input`, what it reads in the float model, errors of earlier layers are made good as well. The means are
    those of unfolded patches, padding included, before the activation. The squared error falls by n times the squared
    change. Without data: the means of `clipped_normal_mean`. Source: Nagel et al. 2019, arXiv:1906.04721, section 4.2.

    >>> weight, mean = torch.tensor([[0.5, 1.0]]), torch.tensor([1.0, 2.0])
    >>> bias_correction(weight, weight.round(), mean)
    tensor([0.5000])
    """
    change = (weight - rounded) @ mean_input[..., None]
    if mean_float_input is not None:
        change = change + weight @ (mean_float_input - mean_input)[..., None]
    return change[..., 0]


def channel_means(means: Tensor, kernel_elements: int, groups: int = 1) -> Tensor:
    """The mean of each input of a convolution's patches from that of its channels: (C,) to (groups, C / groups * k).

    kernel_elements: k, the product of the kernel size. Padding is left out: at a border the mean is smaller.

    >>> channel_means(torch.tensor([1.0, 2.0]), 2)
    tensor([[1., 1., 2., 2.]])
    """
    return means.repeat_interleave(kernel_elements).unflatten(0, (groups, -1))


@explained
def absorbed_bias(beta: Tensor, gamma: Tensor, deviations: float = 3.0) -> Tensor:
    """Compute what a channel always exceeds, which the next bias can take over: `max(0, beta - 3 |gamma|)`, (C,).

    beta, gamma: (C,), of the folded batch norm, or the mean and deviation of data. With c of them `b1 -= c` and
    `b2 += sum W2 c` (`absorbed_output`) leaves a ReLU network as it is where x >= c: for a normal x but .13 % of the
    time. Wrong at zero-padded borders, whose zeros are not shifted. Source: Nagel et al. 2019, arXiv:1906.04721,
    section 4.1.3.

    >>> absorbed_bias(torch.tensor([5.0, 1.0]), torch.tensor([1.0, -0.5]))
    tensor([2., 0.])
    """
    return (beta - deviations * gamma.abs()).clamp_min(0.0)


@explained
def absorbed_output(weight: Tensor, absorbed: Tensor, groups: int = 1) -> Tensor:
    """Compute the next layer's share of an absorbed bias: (C_out,). weight: (C_out, C_in / groups, ...); (C_in,).

    >>> absorbed_output(torch.tensor([[1.0, 2.0]]), torch.tensor([3.0, 0.5]))
    tensor([4.])
    """
    summed = weight.flatten(2).sum(2) if weight.ndim > 2 else weight
    return (summed.unflatten(0, (groups, -1)) @ absorbed.unflatten(0, (groups, -1))[..., None]).flatten()
