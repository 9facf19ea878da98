"""Powers of two without zero. Maths: quantizers_functional/pot.py. With zero it is ESB(n, 0), the preset "pot0"."""

from __future__ import annotations

from torch import Tensor

from torchquant.quantizers._base import QUANTIZERS, About
from torchquant.quantizers._scaled import ScaledQuantizer
from torchquant.quantizers_functional._row_statistics import row_mean_squares, usable_scale
from torchquant.quantizers_functional.formats import ScaledFormat
from torchquant.quantizers_functional.pot import POT_ALPHA, PowersOfTwo, check_pot, pot_max
from torchquant.quantizers_functional.uniform import integer_codes
from torchquant.range_observers._distributed import reduce_mean
from torchquant.range_observers._statistics import rows


@QUANTIZERS.register("pot")
class PotQuantizer(ScaledQuantizer):
    """{+-alpha 2**i} with the scale that is optimal for a Gaussian; 2**n_bits values, no zero. docs/algorithms.md A5.

    `n_bits` 1..5. Deviation from the AutoQNN code: its magnitudes lack level 1 (docs/algorithms.md I-15).
    Raises ConfigError.

    >>> quantizer = PotQuantizer(2)
    >>> quantizer.force(1.0)
    >>> quantizer.levels()
    tensor([-2., -1.,  1.,  2.])
    """

    statistics = ("alpha",)
    joined_by = {"alpha": "rms"}
    about = About("sign(x) * alpha * nearest of 2**i, alpha = c(n) * rms", "AutoQNN PotQ, arXiv:2304.03782", "1..5")

    def __init__(
        self,
        n_bits: int,
        axis: int | None = None,
        momentum: float = 0.0,
        gradient_clip: bool = False,
        nonfinite: str = "raise",
    ) -> None:
        check_pot(n_bits)
        super().__init__(momentum, axis, gradient_clip, nonfinite)
        self.n_bits = n_bits

    @property
    def code_range(self) -> tuple[int, int]:
        return integer_codes(self.n_bits, True)

    def measure(self, x: Tensor) -> tuple[Tensor, ...]:
        rms = reduce_mean(row_mean_squares(rows(x, self.axis))).sqrt()
        alpha = usable_scale(POT_ALPHA[self.n_bits] * rms, pot_max(self.n_bits))
        return (alpha if self.axis is not None else alpha.squeeze(0),)

    def format_with(self, *numbers: Tensor) -> ScaledFormat:
        (scale,) = numbers
        return PowersOfTwo(scale, self.n_bits, axis=self.axis)

    @classmethod
    def examples(cls, axis: int | None = None) -> list[PotQuantizer]:
        """Return the instances on which the laws are checked."""
        return [cls(3, axis, gradient_clip=True), cls(1, axis), cls(5, axis)]

    def extra_repr(self) -> str:
        return f"n_bits={self.n_bits}, {super().extra_repr()}"
