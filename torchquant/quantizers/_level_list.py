"""What formats that are a plain list of levels share."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from torchquant.errors import NoAffineViewError
from torchquant.quantizers._base import GridQuantizer
from torchquant.quantizers._integer_terms import IntegerTerms
from torchquant.quantizers_functional._gradient import cast_back
from torchquant.quantizers_functional._levels import level_values, nearest_level
from torchquant.range_observers._statistics import per_channel_view


class LevelList(GridQuantizer):
    """A format without a rule for its levels: a code is an index into the sorted list of them."""

    @abstractmethod
    def level_list(self) -> Tensor:
        """The levels, sorted: (L,) or (C, L)."""

    @property
    def code_range(self) -> tuple[int, int]:
        return 0, 2**self.n_bits - 1

    def grid(self) -> tuple[Tensor | int, ...]:
        """The list."""
        return (self.level_list(),)

    def _grid_for(self, ndim: int, axis: int | None) -> tuple[Any, ...]:
        return self.level_list(), axis

    def _n_channels(self) -> int | None:
        levels = self.level_list()
        return len(levels) if levels.ndim == 2 else None

    def decoding_numbers(self) -> list[Tensor]:
        return [self.level_list()]

    def codes(self, x: Tensor, *grid: Any) -> Tensor:
        levels, axis = grid
        return nearest_level(x, levels.to(x.dtype), axis)

    def values(self, codes: Tensor, dtype: torch.dtype, *grid: Any) -> Tensor:
        levels, axis = grid
        return level_values(codes.to(torch.int64), levels.to(dtype), axis)

    def project(self, x: Tensor, want_inside: bool, *grid: Any) -> tuple[Tensor, Tensor | None]:
        value, inside = super().project(x, want_inside, *grid)
        return value.add_(x.clamp(0.0, 0.0)), inside

    def _ends(self, x: Tensor, *grid: Any) -> tuple[Tensor, Tensor]:
        levels, axis = grid
        low, high = (per_channel_view(levels[..., i].to(x.dtype), x.ndim, axis) for i in (0, -1))
        return low, high

    def integer_terms(self) -> IntegerTerms:
        raise NoAffineViewError(f"the levels of {type(self).__name__} are any numbers, not whole ones times a scale")

    @torch.no_grad()
    def _decode(self, codes: Tensor, dtype: torch.dtype, axis: int | None) -> Tensor:
        levels = self.level_list()
        working = torch.float64 if dtype == torch.float64 else torch.float32
        return cast_back(self.values(codes.to(levels.device), working, levels, axis), dtype)
