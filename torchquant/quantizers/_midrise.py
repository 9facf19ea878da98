"""The base of the mid-rise schemes: equal cells around a shift. Maths: quantizers_functional/midrise.py."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from torchquant.quantizers._scaled import ScaledQuantizer
from torchquant.quantizers_functional._row_statistics import usable_scale
from torchquant.quantizers_functional.formats import ScaledFormat
from torchquant.quantizers_functional.midrise import MIDRISE_STEP, MidriseGrid, check_midrise
from torchquant.quantizers_functional.uniform import integer_codes
from torchquant.range_observers._statistics import rows


class MidriseQuantizer(ScaledQuantizer):
    """The base of the family: cells given by `step` and `shift`, each with its midpoint as its value.

    `n_bits` 1..12; `axis` None or the channel axis; `momentum` as in `StatisticTracker`, 0 for weights.
    Raises ConfigError.
    """

    statistics: tuple[str, ...] = ("step", "shift")
    joined_by: ClassVar[Mapping[str, str]] = {"step": "rms", "threshold_step": "rms"}

    def __init__(
        self,
        n_bits: int,
        axis: int | None = None,
        momentum: float = 0.0,
        gradient_clip: bool = False,
        nonfinite: str = "raise",
    ) -> None:
        check_midrise(n_bits)
        super().__init__(momentum, axis, gradient_clip, nonfinite)
        self.n_bits = n_bits

    @property
    def code_range(self) -> tuple[int, int]:
        return integer_codes(self.n_bits, True)

    def measure(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(s if self.axis is not None else s.squeeze(0) for s in self.fit(rows(x, self.axis)))

    @abstractmethod
    def fit(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the statistics of each row, over all ranks. x: (C, n). (C,) each."""

    has_shift = True

    def numbers_at(self, scale: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
        return (scale, shift) if self.has_shift else (scale,)

    def format_with(self, *numbers: Tensor) -> ScaledFormat:
        step, *shift = numbers
        return MidriseGrid(step, self.n_bits, shift=shift[0] if shift else None, axis=self.axis)

    @classmethod
    def examples(cls, axis: int | None = None) -> list[Any]:
        """Return the instances on which the laws are checked."""
        return [cls(4, axis, gradient_clip=True), cls(1, axis), cls(8, axis)]

    def extra_repr(self) -> str:
        return f"n_bits={self.n_bits}, {super().extra_repr()}"

    def best_step(self, rms: Tensor) -> Tensor:
        """Return the step of least error on a Gaussian of that root mean square."""
        return usable_scale(MIDRISE_STEP[self.n_bits] * rms, 2.0**self.n_bits)
