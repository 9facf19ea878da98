"""Cross-layer equalization: channels of layers in a row are rescaled so that all use the range of their weights.

A producer's output channel i and a consumer's input channel i are joined by an operator that commutes with a positive
factor. `W1[i] /= s[i], b1[i] /= s[i], W2[:, i] *= s[i]` leaves the function as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchquant._arguments import explained
from torchquant.errors import ConfigError

SMALLEST, LARGEST = 1e-4, 1e4
"""Bounds of a factor."""
DONE = 1e-4
"""Sweeps over a model end where no factor is farther from 1 than this."""


def output_ranges(weight: Tensor, bias: Tensor | None = None, bias_weight: float = 5.0) -> Tensor:
    """The largest weight of each output channel, or a `bias_weight`-th of its bias if that is larger: (C,).

    weight: (C, ...), output channel first. Without the bias a channel of small weights and a large bias is blown up,
    and the activations with it. bias_weight: 2 to 20 by the ratio of biases to weights.

    >>> output_ranges(torch.tensor([[1.0, -2.0], [0.5, 0.0]]), torch.tensor([1.0, -10.0]))
    tensor([2., 2.])
    """
    largest = weight.flatten(1).abs().amax(1)
    return largest if bias is None else torch.maximum(largest, bias.abs() / bias_weight)


def input_ranges(weight: Tensor, groups: int = 1) -> Tensor:
    """The largest weight on each input channel: (C_in,). weight: (C_out, C_in / groups, ...).

    >>> input_ranges(torch.tensor([[1.0, -2.0], [0.5, 0.0]]))
    tensor([1., 2.])
    """
    largest = weight.abs().flatten(2).amax(2) if weight.ndim > 2 else weight.abs()
    return largest.unflatten(0, (groups, -1)).amax(1).flatten()


@explained
def equalization_factors(
    producer: Tensor,
    consumer: Tensor,
    activation: Tensor | None = None,
    alpha: float = 0.5,
    activation_share: float = 0.5,
) -> Tensor:
    """The factor s of each channel between a producer and its consumers: `r1^alpha / r2^(1 - alpha)`.

    producer, consumer: (C,) largest weights of the output channels before and of the input channels behind; the maximum
    over all where several producers share the channels (an addition) or several consumers read them. activation: (C,)
    largest |x| between; it takes the place of `activation_share` of the producer's range. At alpha 1/2, the published
    rule, both ranges become `sqrt(r1 r2)`. A channel where a range is 0 gets 1; others are kept in [1e-4, 1e4].
    Source: Nagel et al. 2019, arXiv:1906.04721, equation 11.

    >>> equalization_factors(torch.tensor([4.0, 0.5, 0.0]), torch.tensor([0.25, 2.0, 1.0]))
    tensor([4.0000, 0.5000, 1.0000])
    """
    if activation is not None:
        producer = torch.lerp(producer, activation.to(producer), activation_share)
    factors = producer.pow(alpha) / consumer.pow(1.0 - alpha)
    return _usable(factors, (producer > 0) & (consumer > 0))


@explained
def chain_factors(ranges: Sequence[Tensor]) -> list[Tensor]:
    """The factors between layers in a row that all have the same channels: one less than there are ranges.

    ranges: (C,) each, of the first layer's output channels, of each depthwise layer's channels, of the last layer's
    input channels. All ranges become their geometric mean m: `s_1 = r_1 / m`, `s_2 = s_1 r_2 / m` and so on; layer k is
    multiplied by `s_{k-1} / s_k`. A channel where a range is 0 gets 1.
    Source: Nagel et al. 2019, arXiv:1906.04721, of which two layers are equation 11; three are a depthwise block.

    >>> chain_factors([torch.tensor([4.0]), torch.tensor([0.5]), torch.tensor([0.5])])
    [tensor([4.]), tensor([2.])]
    """
    if len(ranges) < 2:
        raise ConfigError(f"equalization needs the ranges of at least 2 layers, got {len(ranges)}")
    stacked = torch.stack(list(ranges))
    alive = (stacked > 0).all(0)
    logs = torch.where(alive, stacked, 1.0).log()
    return [_usable(factors, alive) for factors in (logs - logs.mean(0)).cumsum(0)[:-1].exp()]


def _usable(factors: Tensor, alive: Tensor) -> Tensor:
    return torch.where(alive, factors, 1.0).clamp(SMALLEST, LARGEST)


def is_equalized(factors: Sequence[Tensor]) -> bool:
    """Whether a sweep of equalization changed next to nothing: no factor is farther from 1 than 1e-4.

    >>> is_equalized([torch.tensor([1.0, 1.00001])])
    True
    """
    return all(bool(((one - 1).abs() < DONE).all()) for one in factors)


def split_channels(weight: Tensor, columns: Tensor, scale: Tensor | float = 0.0) -> Tensor:
    """A weight whose `columns` (k,) stand twice, with half of their weights each: (rows, K + k).

    weight: (rows, K). With the scale of the rounding, () or (rows, 1), the halves are `(w - scale / 2) / 2` and
    `(w + scale / 2) / 2`, which round to codes that add up to the code of w. The input repeats the same columns.
    Source: Zhao et al. 2019, arXiv:1901.09504.

    >>> split_channels(torch.tensor([[3.0, 1.0]]), torch.tensor([0]))
    tensor([[1.5000, 1.0000, 1.5000]])
    """
    picked = weight[:, columns]
    halved = weight.index_copy(1, columns, (picked - scale / 2) / 2)
    return torch.cat([halved, (picked + scale / 2) / 2], 1)
