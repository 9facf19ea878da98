"""Integer codes of uniform formats, and quantization on them without a quantizer. The maths is in `UniformGrid`."""

from __future__ import annotations

from torch import Tensor

from torchquant._tensors import like as like
from torchquant.errors import ConfigError
from torchquant.quantizers_functional._gradient import Clamp, Gradient
from torchquant.quantizers_functional.formats import Bound as Bound
from torchquant.quantizers_functional.formats import UniformGrid
from torchquant.quantizers_functional.formats import uniform_codes as uniform_codes

MOST_BITS = 32


def integer_codes(n_bits: int, signed: bool) -> tuple[int, int]:
    """Return the smallest and largest n-bit integer, two's complement if signed. Raises ConfigError.

    >>> integer_codes(4, True), integer_codes(4, False)
    ((-8, 7), (0, 15))
    """
    if not 1 <= n_bits <= MOST_BITS:
        raise ConfigError(f"n_bits must be a whole number from 1 to {MOST_BITS}, got {n_bits}")
    return (-(2 ** (n_bits - 1)), 2 ** (n_bits - 1) - 1) if signed else (0, 2**n_bits - 1)


def uniform_quantize(
    x: Tensor,
    delta: Tensor | float,
    code_min: Bound,
    code_max: Bound,
    gradient: str | Gradient = "ste",
    clamp: Clamp | None = None,
    training: bool = True,
) -> Tensor:
    """Quantize x, or `x.clamp(*clamp)`, on `delta * {code_min .. code_max}`, differentiable.

    `inside` follows docs/algorithms.md A1: 1 where the rounded code was not clamped.
    """
    return UniformGrid(delta, 0, code_min, code_max).quantize(x, gradient, clamp, training)
