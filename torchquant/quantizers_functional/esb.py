"""Elastic significant bits, ESB(b, k): sign, b-1-k exponent bits, k stored fraction bits.

The format is exactly a sign-magnitude mini-float with subnormals, no Inf or NaN, whose first normal number is 1
(Gong et al., TPDS 33(11) 2022, arXiv:2109.03513; docs/algorithms.md A4). k = 0 is power of two with zero,
k = b-2 is uniform narrow, (4, 1) is FP4 E2M1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchquant._arguments import explained
from torchquant.errors import ConfigError
from torchquant.quantizers_functional._gradient import Clamp, apply_projection
from torchquant.quantizers_functional.minifloat import FloatFormat, ScaledFloat, minifloat_decode, minifloat_encode

# (n_bits, significant_bits) -> alpha that minimises the squared error on N(0, 1); docs/algorithms.md H2.
# fmt: off
ESB_ALPHA = {
    (2, 0): 1.22400636,
    (3, 0): 0.518127213, (3, 1): 1.30153941,
    (4, 0): 0.0655253074, (4, 1): 0.487079179, (4, 2): 1.41364526,
    (5, 0): 0.000512547598, (5, 1): 0.0766382188, (5, 2): 0.482773226, (5, 3): 1.5459882,
    (6, 1): 0.0003002018, (6, 2): 0.0405514256, (6, 3): 0.499672029, (6, 4): 1.68780138,
    (7, 2): 0.000315185619, (7, 3): 0.0409406351, (7, 4): 0.524688208, (7, 5): 1.83236098,
    (8, 3): 0.000318393549, (8, 4): 0.0411766087, (8, 5): 0.552655222, (8, 6): 1.97568551,
    (9, 4): 0.000319108523, (9, 5): 0.041586367, (9, 6): 0.581613406, (9, 7): 2.11560356,
}
# fmt: on


def check_esb(n_bits: int, significant_bits: int) -> None:
    """Raise ConfigError unless the pair is a format: n_bits 2..16, 1 to 4 exponent bits."""
    whole = isinstance(n_bits, int) and isinstance(significant_bits, int)
    if not (whole and 2 <= n_bits <= 16 and significant_bits >= 0 and 1 <= n_bits - 1 - significant_bits <= 4):
        raise ConfigError(
            "(n_bits, significant_bits) must have n_bits 2..16 and 1..4 exponent bits (n_bits - 1 - significant_bits); "
            f"got ({n_bits!r}, {significant_bits!r})"
        )


class _ESBForm(FloatFormat):
    """A mini-float of up to 14 fraction bits; `check_esb` says which are allowed."""

    def __post_init__(self) -> None:
        pass


ESB_FORMS: dict[tuple[int, int], FloatFormat] = {
    (e + k + 1, k): _ESBForm(e, k, bias=1) for e in range(1, 5) for k in range(16 - e)
}
"""(n_bits, significant_bits) -> the mini-float of the format."""


def esb_max_exponent(n_bits: int, significant_bits: int) -> int:
    """Return the largest exponent N of the grid before scaling."""
    return int(2 ** (n_bits - 1 - significant_bits) - 2)


def esb_max(n_bits: int, significant_bits: int) -> float:
    """Return the largest value of the grid before scaling, `2**(N+1) - 2**(N-k)`."""
    return ESB_FORMS[n_bits, significant_bits].largest


@explained
def esb_quantize(
    x: Tensor,
    alpha: Tensor | float,
    n_bits: int,
    significant_bits: int,
    gradient: str = "ste",
    clamp: Clamp | None = None,
) -> Tensor:
    """Quantize x to `alpha` times the nearest value of the ESB(n_bits, significant_bits) grid.

    x: (*) float. alpha: () or broadcastable to x, > 0, same unit as x; `ESB_ALPHA[b, k] * rms(x)` is
    optimal for Gaussian data. Returns (*). `gradient="clipped"` stops the gradient where
    |x| > alpha * max. Raises ConfigError for a pair that is no format.

    >>> esb_quantize(torch.tensor([0.3, -0.8, 2.4, 9.0]), 1.0, 4, 1)
    tensor([ 0.5000, -1.0000,  2.0000,  6.0000])
    """
    check_esb(n_bits, significant_bits)
    return apply_projection(x, ScaledFloat(alpha, ESB_FORMS[n_bits, significant_bits]).project, gradient, clamp)


def esb_encode(significands: Tensor, n_bits: int, significant_bits: int) -> Tensor:
    """Return the codes of unscaled grid values: sign times the bit pattern `exponent . fraction`. int32, monotone.

    >>> esb_encode(torch.tensor([0.0, 0.5, 1.0, -6.0]), 4, 1)
    tensor([ 0,  1,  2, -7], dtype=torch.int32)
    """
    return minifloat_encode(significands, ESB_FORMS[n_bits, significant_bits])


def esb_decode(codes: Tensor, n_bits: int, significant_bits: int, dtype: torch.dtype) -> Tensor:
    """Return the unscaled grid values of `codes`; the inverse of `esb_encode`."""
    return minifloat_decode(codes, ESB_FORMS[n_bits, significant_bits], dtype)
