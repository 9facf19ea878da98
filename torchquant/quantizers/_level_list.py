"""The base class of formats that are a plain list of levels."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from torchquant.quantizers._base import GridQuantizer
from torchquant.quantizers_functional.formats import Format, Levels


class LevelList(GridQuantizer):
    """A format without a rule for its levels: a code is an index into the sorted list of them."""

    @abstractmethod
    def level_list(self) -> Tensor:
        """Return the levels, sorted: (L,) or (C, L)."""

    @property
    def code_range(self) -> tuple[int, int]:
        return 0, 2**self.n_bits - 1

    def grid(self) -> tuple[Tensor | int, ...]:
        """Return the list of levels."""
        return (self.level_list(),)

    def format(self) -> Format:
        return Levels(self.level_list(), axis=self.axis)
