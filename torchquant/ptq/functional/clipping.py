"""Ranges that clip: chosen by the error of the layer's output, or learned."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torchquant._arguments import checked, explained
from torchquant.quantizers_functional._gradient import pass_through

QuantizeShrunk = Callable[[Tensor, float], Tensor]
"""`quantize(weight, ratio)`: the weight on the grids of its own ranges times a ratio."""
AWQ_RATIOS = tuple(1.0 - step / 20 for step in range(10))
"""Ratios that AWQ tries (arXiv:2306.00978, code)."""
SEQUENTIAL_RATIOS = tuple(step / 20 for step in range(20, 0, -1))
"""Ratios that sequential MSE tries (AIMET)."""
LEARNED_START = 4.0
"""Where the logits of learned clipping begin: 98 % of the range."""


@explained
def clip_errors(difference: Tensor, gram: Tensor, group: int | None = None) -> Tensor:
    """Squared output error of each row, or of each `group` columns of it alone: (..., rows, 1) or (..., rows, groups).

    difference: (..., rows, K). gram: (..., K, K), or its diagonal (..., K). Products of columns of two groups are left
    out. The last group may be shorter.

    >>> clip_errors(torch.ones(1, 3), torch.eye(3), group=2)
    tensor([[2., 1.]])
    """
    is_diagonal = gram.ndim < difference.ndim
    errors = []
    for start in range(0, difference.shape[-1], group or difference.shape[-1]):
        now = slice(start, start + (group or difference.shape[-1]))
        part, own = difference[..., now].to(gram.dtype), gram[..., now] if is_diagonal else gram[..., now, now]
        errors.append((part.square() @ own[..., None])[..., 0] if is_diagonal else ((part @ own) * part).sum(-1))
    return torch.stack(errors, -1)


@checked
def best_ratios(
    weight: Tensor,
    gram: Tensor,
    quantize: QuantizeShrunk,
    ratios: Sequence[float] = AWQ_RATIOS,
    group: int | None = None,
) -> Tensor:
    """The ratio of least output error of each row and group: (..., rows, 1) or (..., rows, groups).

    weight: (..., rows, K). gram: (..., K, K); its diagonal (..., K) weighs each input by its power alone, ones are the
    error of the weight itself. Of equal errors the first ratio: put the full range, 1, there, and the result is never
    worse than min-max. Source: Lin et al. 2024, arXiv:2306.00978, and its code.

    >>> def quantize(weight, ratio):
    ...     step = ratio * weight.abs().amax(-1, keepdim=True)
    ...     return (weight / step).round().clamp(-1, 1) * step
    >>> best_ratios(torch.tensor([[1.0, 0.4, 0.4]]), torch.eye(3), quantize)
    tensor([[0.6000]])
    """
    errors = torch.stack([clip_errors(weight - quantize(weight, ratio), gram, group) for ratio in ratios])
    return torch.tensor(list(ratios), dtype=weight.dtype, device=weight.device)[errors.argmin(0)]


@explained
def importance_step(weight: Tensor, codes: Tensor, importance: Tensor, step: Tensor) -> Tensor:
    """The weighted mean of `|w| / |c|` over the codes c that are not 0, for the step of each row: (..., rows).

    weight, codes: (..., rows, K); importance: (..., K) >= 0, such as the diagonal of the Gram matrix; step: (..., rows)
    kept where all codes are 0. Source: the scale estimation of NNCF, which repeats it five times with codes found anew.

    >>> importance_step(torch.tensor([[1.2, 0.9]]), torch.tensor([[2.0, 1.0]]), torch.tensor([1.0, 3.0]), torch.ones(1))
    tensor([0.8250])
    """
    used = (codes != 0) * importance[..., None, :]
    total = used.sum(-1)
    ratios = weight.abs() / codes.abs().where(codes != 0, 1.0)
    return torch.where(total > 0, (used * ratios).sum(-1) / total.where(total > 0, 1.0), step)


@explained
def clipped_quantize(weight: Tensor, high_logit: Tensor, low_logit: Tensor, n_bits: int) -> Tensor:
    """Quantize on `2^n_bits` steps from `sigmoid(b) min w` to `sigmoid(a) max w`, a and b learned: (..., rows, K).

    weight: (..., rows, K). high_logit, low_logit: (..., rows, 1), a and b, 4 to begin with. The zero point is whole and
    has no gradient; the step h has the rounding's: `round(w / h) - w / h` inside, `code - zero point` outside.
    Source: Shao et al. 2023, arXiv:2308.13137, equation 2. A row of zeros stays zeros.

    >>> clipped_quantize(torch.tensor([[-1.0, 0.1, 2.0]]), torch.full((1, 1), 4.0), torch.full((1, 1), 4.0), 2)
    tensor([[-0.9820,  0.0000,  1.9640]])
    """
    high = high_logit.sigmoid() * weight.amax(-1, keepdim=True)
    low = low_logit.sigmoid() * weight.amin(-1, keepdim=True)
    step = (high - low) / (2**n_bits - 1)
    step = torch.where(step > 0, step, 1.0)
    zero_point = -(low / step).detach().round()
    scaled = weight / step
    rounded = scaled.detach().round()
    kept = (rounded + zero_point).clamp(0, 2**n_bits - 1) - zero_point
    return pass_through(scaled, kept, kept == rounded) * step
