"""Keys and values of attention in few bits: per channel over groups of tokens, per token over groups of channels."""

from __future__ import annotations

import torch
from torch import Tensor

from torchquant._arguments import explained
from torchquant.errors import ConfigError


@explained
def quantize_runs(x: Tensor, n_bits: int, size: int, axis: int) -> Tensor:
    """Quantize each run of `size` neighbours along an axis on 2^n_bits steps from its minimum to its maximum. (*).

    The offset is the minimum itself, a real number. The last run may be shorter. A run of one value stays it.

    >>> quantize_runs(torch.tensor([0.0, 0.4, 1.0, 5.0, 5.0]), 1, 3, 0)
    tensor([0., 0., 1., 5., 5.])
    """
    if n_bits < 1 or size < 1:
        raise ConfigError(f"n_bits and size must be whole numbers >= 1, got {n_bits} and {size}")
    return torch.cat([_quantize_run(run, n_bits, axis) for run in x.split(size, axis)], axis)


def _quantize_run(x: Tensor, n_bits: int, axis: int) -> Tensor:
    low, high = x.amin(axis, keepdim=True), x.amax(axis, keepdim=True)
    scale = (high - low) / (2**n_bits - 1)
    scale = torch.where(scale > 0, scale, 1.0)
    return low + ((x - low) / scale).round().clamp(0, 2**n_bits - 1) * scale


@explained
def quantized_tokens(n_tokens: int, group: int, residual: int = 0) -> int:
    """How many of the first tokens are quantized: whole groups of those before the last `residual`, which stay float.

    >>> quantized_tokens(6, group=4), quantized_tokens(8, group=4, residual=4), quantized_tokens(7, group=4, residual=4)
    (4, 4, 0)
    """
    return max(0, n_tokens - residual) // group * group


@explained
def quantize_keys(keys: Tensor, n_bits: int = 2, group: int = 32, residual: int = 128) -> Tensor:
    """Keys with each channel quantized over groups of tokens: channels of keys have offsets of their own.

    keys: (..., tokens, channels). A group never changes once it is whole, so that token by token gives what all at once
    gives; tokens that are not quantized yet are the same bits. Source: Liu et al. 2024, arXiv:2402.02750, section 3.

    >>> quantize_keys(torch.tensor([[5.0, 0.0], [5.4, 0.1], [6.0, 0.2]]), 1, group=2, residual=1)
    tensor([[5.0000, 0.0000],
            [5.4000, 0.1000],
            [6.0000, 0.2000]])
    """
    done = quantized_tokens(keys.shape[-2], group, residual)
    if not done:
        return keys.clone()
    return torch.cat([quantize_runs(keys[..., :done, :], n_bits, group, -2), keys[..., done:, :]], -2)


@explained
def quantize_values(values: Tensor, n_bits: int = 2, group: int = 32, residual: int = 128) -> Tensor:
    """Values with each token quantized over groups of channels, but for the last `residual` tokens.

    values: (..., tokens, channels). Source: Liu et al. 2024, arXiv:2402.02750, section 3.

    >>> quantize_values(torch.tensor([[0.0, 0.2, 1.0], [0.0, 0.2, 1.0]]), 1, group=3, residual=1)
    tensor([[0.0000, 0.0000, 1.0000],
            [0.0000, 0.2000, 1.0000]])
    """
    done = quantized_tokens(values.shape[-2], 1, residual)
    if not done:
        return values.clone()
    return torch.cat([quantize_runs(values[..., :done, :], n_bits, group, -1), values[..., done:, :]], -2)
