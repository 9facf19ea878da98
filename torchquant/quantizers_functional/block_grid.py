"""Blocks: boxes of a weight with one set of numbers each, of a given size along each axis."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from torchquant._tensors import in_layout_of
from torchquant.errors import ConfigError
from torchquant.quantizers_functional.formats import Format, OwnLevels

WHOLE = -1
"""The size of a block that covers its axis."""


@dataclass(frozen=True)
class BlockGrid:
    """The blocks of a tensor. `sizes`: of a block along each axis; -1, and an axis that is not given: the whole axis.

    Raises ConfigError for other sizes, and where a tensor is cut whose axes the sizes do not divide.

    >>> BlockGrid((2, -1)).cut(torch.arange(8.0).view(4, 2)).tolist()
    [[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 7.0]]
    """

    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if not (self.sizes and all(isinstance(n, int) and (n > 0 or n == WHOLE) for n in self.sizes)):
            raise ConfigError(
                f"the sizes of a block must be whole numbers > 0, or -1 for a whole axis; got {self.sizes!r}"
            )

    def _places(self, shape: torch.Size) -> tuple[list[int], list[int]]:
        """Return how many blocks there are along each axis, and how many elements each has."""
        sizes = [*self.sizes, *[WHOLE] * (len(shape) - len(self.sizes))]
        sizes = [all_of if n == WHOLE else n for n, all_of in zip(sizes, shape, strict=False)]
        if len(sizes) < len(self.sizes) or any(all_of % n for n, all_of in zip(sizes, shape, strict=True) if n):
            raise ConfigError(
                f"blocks of {self} do not divide a weight of shape {tuple(shape)} (output channel first); give each "
                "axis a size that divides it or -1 for the whole axis, or give this layer another spec"
            )
        return [all_of // n if n else 1 for n, all_of in zip(sizes, shape, strict=True)], sizes

    def cut(self, x: Tensor) -> Tensor:
        """Return the blocks of x in the order of their places, (blocks, elements)."""
        counts, sizes = self._places(x.shape)
        paired = x.reshape([n for pair in zip(counts, sizes, strict=True) for n in pair])
        return paired.permute(*range(0, paired.ndim, 2), *range(1, paired.ndim, 2)).reshape(prod(counts), prod(sizes))

    def join(self, rows: Tensor, x: Tensor) -> Tensor:
        """Put the blocks that `cut` made back into the shape and layout of x."""
        counts, sizes = self._places(x.shape)
        paired = rows.view(*counts, *sizes)
        order = [axis for i in range(x.ndim) for axis in (i, x.ndim + i)]
        return in_layout_of(paired.permute(order).reshape(x.shape), x)

    def runs(self, shape: torch.Size) -> tuple[int, int]:
        """Return how many neighbours of a flattened row, and how many rows, a block has in one piece."""
        counts, sizes = self._places(shape)
        parted = [axis for axis in range(1, len(sizes)) if counts[axis] > 1]
        return prod(sizes[parted[-1] if parted else 1 :]), sizes[0]

    def block_of_each(self, shape: torch.Size, device: torch.device) -> Tensor:
        """Return the place of the block of each element of a tensor of that shape, int64."""
        counts, sizes = self._places(shape)
        places = torch.arange(prod(counts), device=device)[:, None].expand(-1, prod(sizes))
        return self.join(places.contiguous(), places.new_empty(shape))

    def __str__(self) -> str:
        return "x".join(map(str, self.sizes))


@dataclass(frozen=True, eq=False)
class Blocks(OwnLevels):
    """A format with one row of `form`, along axis 0, for each block."""

    blocks: BlockGrid
    form: Format

    @property
    def code_range(self) -> tuple[int, int]:
        return self.form.code_range

    def ends(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.ends_of_elements(x)

    def neighbours(self, x: Tensor) -> tuple[Tensor, Tensor]:
        below, above = self.form.neighbours(self.blocks.cut(x))
        return self.blocks.join(below, x), self.blocks.join(above, x)

    def codes(self, x: Tensor) -> Tensor:
        return self.blocks.join(self.form.codes(self.blocks.cut(x)), x)

    def values(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        return self.blocks.join(self.form.values(self.blocks.cut(codes), dtype), codes)

    def nearest(self, x: Tensor, want_inside: bool) -> tuple[Tensor, Tensor | None]:
        value, inside = self.form.project(self.blocks.cut(x), want_inside)
        return self.blocks.join(value, x), None if inside is None else self.blocks.join(inside, x)
