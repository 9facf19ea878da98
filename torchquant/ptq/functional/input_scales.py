"""Per-channel scales that move outliers of activations into weights: SmoothQuant and AWQ.

With s of an input channel, `W[:, j] * s_j` reads `x_j / s_j`: the float function stays, the roundings move. All readers
of the smoothed value are scaled together: their weights are stacked along the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from torchquant._arguments import checked, explained
from torchquant.ptq.functional.gram import output_error

Quantize = Callable[[Tensor], Tensor]
SMALLEST_MAXIMUM = 1e-5
SMALLEST_SCALE = 1e-4


@explained
def smooth_scales(input_max: Tensor, weight_max: Tensor, alpha: float = 0.5) -> Tensor:
    """The scales of SmoothQuant, `max|x_j|^alpha / max|W_j|^(1 - alpha)`: (K,).

    input_max: (K,) over tokens; weight_max: (K,) over the rows of all readers; both at least 1e-5. An input that was
    always 0 gets 1. Source: Xiao et al. 2023, arXiv:2211.10438, equation 4. Deviation: 1 for inputs of zeros.

    >>> smooth_scales(torch.tensor([16.0, 1.0, 0.0]), torch.tensor([1.0, 4.0, 1.0]))
    tensor([4.0000, 0.5000, 1.0000])
    """
    x, w = input_max.clamp_min(SMALLEST_MAXIMUM), weight_max.clamp_min(SMALLEST_MAXIMUM)
    return torch.where(input_max > 0, x.pow(alpha) / w.pow(1.0 - alpha), 1.0)


def smooth_candidates(input_max: Tensor, weight_max: Tensor, n_steps: int = 20) -> list[tuple[float | None, Tensor]]:
    """(alpha, scales) for alpha 0 .. 1 in steps of 1 / n_steps, behind (None, ones): no smoothing at all.

    The published 0.5 may lose where 0.75 wins: alpha is to be searched.

    >>> [alpha for alpha, _ in smooth_candidates(torch.ones(1), torch.ones(1), 2)]
    [None, 0.0, 0.5, 1.0]
    """
    alphas = [step / n_steps for step in range(n_steps + 1)]
    return [
        (None, torch.ones_like(input_max)),
        *((alpha, smooth_scales(input_max, weight_max, alpha)) for alpha in alphas),
    ]


@checked
def scaled_error(
    weight: Tensor, x: Tensor, scales: Tensor, quantize_weight: Quantize, quantize_input: Quantize
) -> Tensor:
    """Mean squared error of the outputs with the input divided and the weight multiplied by scales: ().

    weight: (rows, K) of all readers; x: (n, K); scales: (K,).

    >>> x, one = torch.tensor([[8.0, 0.25]]), torch.ones(1, 2)
    >>> scaled_error(one, x, torch.tensor([8.0, 0.25]), torch.round, torch.round)
    tensor(0.0625)
    """
    found = quantize_input(x / scales) @ quantize_weight(weight * scales).mT
    return (found - x @ weight.mT).square().mean()


@explained
def awq_scales(input_mean: Tensor, rho: float, weight_mean: Tensor | None = None) -> Tensor:
    """The scales of AWQ, `mean|x_j|^rho`, centred so that the largest times the smallest is 1: (K,).

    input_mean: (K,) over tokens. weight_mean: (K,), means of |W| over the largest of its group, for the variant
    `a^rho / w^(1 - rho)`. rho 0 gives ones (rounding to nearest), with `weight_mean` it does not.
    Source: Lin et al. 2024, arXiv:2306.00978.

    >>> awq_scales(torch.tensor([4.0, 1.0]), 0.5)
    tensor([1.4142, 0.7071])
    """
    scales = input_mean.pow(rho)
    if weight_mean is not None:
        scales = scales / weight_mean.clamp_min(SMALLEST_SCALE).pow(1.0 - rho)
    scales = scales.clamp_min(SMALLEST_SCALE)
    return scales / (scales.amax(-1, keepdim=True) * scales.amin(-1, keepdim=True)).sqrt()


@checked
def awq_error(weight: Tensor, gram: Tensor, scales: Tensor, quantize: Quantize) -> Tensor:
    """Squared error of each output with the weight quantized times the scales: (..., rows), from the Gram matrix alone.

    weight: (..., rows, K). gram: (..., K, K). scales: (..., K).

    >>> awq_error(torch.tensor([[0.3, 1.0]]), torch.eye(2), torch.tensor([4.0, 1.0]), torch.round)
    tensor([0.0025])
    """
    wide = scales[..., None, :]
    return output_error(weight - quantize(weight * wide) / wide, gram)


def awq_candidates(input_mean: Tensor, n_steps: int = 20) -> list[tuple[float, Tensor]]:
    """(rho, scales) for rho 0, 1 / n_steps .. 1 - 1 / n_steps. The first is rounding to nearest: never worse than it.

    >>> [rho for rho, _ in awq_candidates(torch.ones(1), 2)]
    [0.0, 0.5]
    """
    return [(step / n_steps, awq_scales(input_mean, step / n_steps)) for step in range(n_steps)]


def best_candidate(candidates: Iterable[tuple[float | None, Tensor]], error: Callable[[Tensor], Tensor]) -> Tensor:
    """The scales of least error; of equal ones the first, which is that of no change. error: scales to a sum.

    >>> best_candidate(awq_candidates(torch.tensor([4.0, 1.0]), 2), lambda scales: scales.amin())
    tensor([1.4142, 0.7071])
    """
    return min((scales for _, scales in candidates), key=lambda scales: float(error(scales).sum()))


@explained
def shifted_reader(weight: Tensor, bias: Tensor | None, scales: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer that reads `(x - d) / s` in place of x: `W s` and `b + W d`. (rows, K) and (rows,).

    weight: (rows, K). bias: (rows,) or None. scales, shift: (K,), s and d, which may be learned: the function stays the
    same whatever they are. Source: Shao et al. 2023, arXiv:2308.13137 (OmniQuant), equation 3.

    >>> shifted_reader(torch.tensor([[1.0, 2.0]]), None, torch.tensor([4.0, 0.5]), torch.tensor([1.0, 1.0]))
    (tensor([[4., 1.]]), tensor([3.]))
    """
    moved = weight @ shift
    return weight * scales, moved if bias is None else bias + moved


@explained
def shared_by_heads(scales: Tensor, head_size: int, repeats: int) -> Tensor:
    """Scales of an output projection's inputs made equal for query heads that share a value head, and the value's own.

    scales: (heads * head_size,), value head by value head `repeats` query heads. The maximum of each group is taken.
    Returns (heads / repeats * head_size,), by which the rows of the value projection are divided; repeated head by head
    it is what the columns of the output projection are multiplied with.

    >>> shared_by_heads(torch.tensor([1.0, 2.0, 3.0, 1.0]), head_size=2, repeats=2)
    tensor([3., 2.])
    """
    return scales.unflatten(0, (-1, repeats, head_size)).amax(1).flatten()


@checked
def split_index(weight_max: Tensor, n: int) -> Tensor:
    """Choose n times the channel with the largest weights, which each choice shares out: the index of `ChannelSplit`.

    weight_max: (K,). Returns (K + n,): all channels, then those that are given once more, in the order of choice.
    Source: Zhao et al. 2019, arXiv:1901.09504, section 3.

    >>> split_index(torch.tensor([1.0, 9.0, 4.0]), 3)
    tensor([0, 1, 2, 1, 1, 2])
    """
    counts, chosen = torch.ones_like(weight_max), []
    for _ in range(n):
        largest = int((weight_max / counts).argmax())
        counts[largest] += 1
        chosen.append(largest)
    return torch.cat([torch.arange(len(weight_max)), torch.tensor(chosen, dtype=torch.int64)])
