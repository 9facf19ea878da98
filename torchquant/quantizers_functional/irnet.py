"""Signs of standardized weights times a power of two. docs/algorithms.md B17."""

from __future__ import annotations

import torch
from torch import Tensor

from torchquant._arguments import explained
from torchquant.quantizers_functional._gradient import Gradient, cast_back, compute_dtype
from torchquant.quantizers_functional._powers import pow2
from torchquant.quantizers_functional._row_statistics import WHOLE, Joining, mean_deviation, row_moments
from torchquant.quantizers_functional.binary import Signs
from torchquant.quantizers_functional.uniform import like


def standardized(w: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """Compute `(w - mean) / deviation`; 0 where the deviation is 0."""
    return (w - mean) / torch.where(deviation > 0, deviation, torch.ones_like(deviation))


@explained
def irnet_params(rows: Tensor, parts: Joining = WHOLE) -> tuple[Tensor, Tensor, Tensor]:
    """Find mean, standard deviation and scale of each row; the scale is `2**RHE(log2 E|w~|)` of the standardized row.

    rows: (C, n), n > 0. Returns three (C,) float64; the scale is 0 for a row of equal numbers. `parts`: how the sums
    over parts of the rows are joined. Source: Qin et al. 2020, IR-Net, arXiv:1909.10788, eq. 5-8.

    >>> [float(number) for number in irnet_params(torch.tensor([[-1.0, 3.0]]))]
    [1.0, 2.0, 1.0]
    """
    mean, deviation = row_moments(rows, parts)
    size = mean_deviation(rows, parts)[1] / torch.where(deviation > 0, deviation, torch.ones_like(deviation))
    scale = pow2(size.clamp(2.0**-60, 1.0).log2().round().nan_to_num(0.0).to(torch.int64), torch.float64)
    return mean, deviation, torch.where(deviation > 0, scale, deviation)


@explained
def irnet_quantize(
    w: Tensor, mean: Tensor, deviation: Tensor, scale: Tensor, gradient: str | Gradient = "ste", training: bool = True
) -> Tensor:
    """Quantize w to `scale` where w >= mean, else `-scale`, whatever the units of w.

    w: (*) float. mean, deviation, scale: () or broadcastable to w, see `irnet_params`; constants for the gradient.
    Returns (*). The gradient estimator, in the paper "ede", acts on the standardized w.
    Source: Qin et al. 2020, IR-Net, arXiv:1909.10788.

    >>> irnet_quantize(torch.tensor([-1.0, 3.0]), torch.tensor(1.0), torch.tensor(2.0), torch.tensor(1.0))
    tensor([-1.,  1.])
    """
    real = w.to(compute_dtype(w))
    unit = standardized(real, like(mean, real), like(deviation, real))
    return cast_back(Signs(like(scale, real)).quantize(unit, gradient, None, training), w.dtype)
