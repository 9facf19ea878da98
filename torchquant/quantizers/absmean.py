"""Ternary weights by their mean magnitude (BitNet b1.58). Maths: UniformGrid in quantizers_functional/formats.py."""

from __future__ import annotations

from torch import Tensor

from torchquant.quantizers._base import QUANTIZERS, About
from torchquant.quantizers._learned import first, or_one
from torchquant.quantizers._scaled import ScaledQuantizer
from torchquant.quantizers_functional._row_statistics import row_mean_magnitudes, usable_scale
from torchquant.quantizers_functional.formats import UniformGrid
from torchquant.range_observers._distributed import ranks
from torchquant.range_observers._statistics import rows


@QUANTIZERS.register("absmean")
class AbsMeanQuantizer(ScaledQuantizer):
    """{-gamma, 0, gamma}, gamma the mean of |x|: BitNet b1.58 (Ma et al. 2024, arXiv:2402.17764, eq. 1-3).

    Unlike `ternary`, it is a uniform grid: a weight is rounded to the nearest level, with thresholds at gamma / 2. The
    paper takes one gamma for a whole weight, activations of 8 bits with a scale for each token
    (`affine:8,symmetric=narrow/token`), and a norm before each linear layer. Deviation: the paper adds 1e-5 to gamma.
    Codes take 2 bits. Raises ConfigError.

    >>> import torch
    >>> quantizer = AbsMeanQuantizer()
    >>> quantizer.pre_observe(torch.tensor([1.0, -0.5, 0.3, 0.2]))
    >>> quantizer(torch.tensor([1.0, -0.5, 0.3, 0.2]))
    tensor([ 0.5000, -0.5000,  0.5000,  0.0000])
    """

    n_bits = 2
    code_range = (-1, 1)
    statistics = ("gamma",)
    is_uniform = True
    traits = frozenset({"step"})
    scale_of_zeros = 1.0
    typical = "{name}:{n}"
    about = About("clamp(RHE(x / gamma), -1, 1) * gamma, gamma = E|x|", "Ma et al. 2024, BitNet, arXiv:2402.17764", "2")

    def __init__(
        self, axis: int | None = None, momentum: float = 0.0, gradient_clip: bool = False, nonfinite: str = "raise"
    ) -> None:
        super().__init__(momentum, axis, gradient_clip, nonfinite)

    def measure(self, x: Tensor) -> tuple[Tensor, ...]:
        gamma = row_mean_magnitudes(rows(x, self.axis), ranks())
        return first((or_one(usable_scale(gamma, 1.0)),), self.axis)

    def format_with(self, *numbers: Tensor) -> UniformGrid:
        (gamma,) = numbers
        return UniformGrid(gamma, 0, *self.code_range, axis=self.axis)

    @classmethod
    def examples(cls, axis: int | None = None) -> list[AbsMeanQuantizer]:
        """Return the instances on which the laws are checked."""
        return [cls(axis, gradient_clip=True)]
