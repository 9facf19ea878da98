"""Granularities of weights finer than channels: one set of numbers per group of a row, or per block of a weight."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from torchquant.errors import ConfigError
from torchquant.quantizers._base import About, Quantizer
from torchquant.quantizers_functional._gradient import cast_back, compute_dtype
from torchquant.quantizers_functional.block_grid import BlockGrid, Blocks
from torchquant.quantizers_functional.formats import Format
from torchquant.quantizers_functional.groups import Groups, cut_groups, join_groups

_Work = Callable[[Quantizer, Tensor], Tensor]


def _unused(quantizer: Quantizer, part: Tensor) -> Tensor:
    """Join an empty part to the graph, so that learned parameters of its quantizer get a gradient of 0, not None."""
    learned = [parameter for parameter in quantizer.parameters() if parameter.requires_grad]
    if not learned:
        return part.detach()  # so that nothing is joined to the others
    return part + sum(parameter.sum() for parameter in learned).to(part.dtype)  # type: ignore[union-attr]


class PartedQuantizer(Quantizer):
    """The base of quantizers that apply per-channel quantizers to parts of a weight in place of channels.

    A subclass says how a weight is cut into rows, one for each part, and how rows are joined to a weight. Each
    quantizer is a child module; its numbers are `CHILD_NAME`.
    """

    about = About(granularity=("block",))

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        if quantizer.axis != 0:
            raise ConfigError(f"a group takes a quantizer per channel on axis 0, got axis={quantizer.axis!r}")
        self.n_bits = quantizer.n_bits
        self.signed = quantizer.signed
        self.is_idempotent = quantizer.is_idempotent

    @abstractmethod
    def _cut(self, x: Tensor) -> list[Tensor]:
        """Return the parts of x as rows, (parts, elements), for each child in turn."""

    @abstractmethod
    def _join(self, rows: list[Tensor], x: Tensor) -> Tensor:
        """Put the rows of `_cut` back into the shape and layout of x."""

    def by_child(self, x: Tensor) -> list[tuple[str, Quantizer, Tensor]]:
        """Return name, quantizer and rows of each child that has elements of x."""
        return [part for part in self._by_child(x) if part[2].numel()]

    def _by_child(self, x: Tensor) -> list[tuple[str, Quantizer, Tensor]]:
        return [(name, q, rows) for (name, q), rows in zip(self._children.items(), self._cut(x), strict=True)]

    @property
    def _children(self) -> dict[str, Quantizer]:
        return cast(dict[str, Quantizer], self._modules)

    def _ready(self) -> dict[str, Quantizer]:
        return {name: quantizer for name, quantizer in self._children.items() if quantizer.is_ready}

    def _mapped(self, x: Tensor, work: _Work, empty: _Work) -> Tensor:
        parts = self._by_child(x)
        return self._join([(work if rows.numel() else empty)(quantizer, rows) for _, quantizer, rows in parts], x)

    def allocate_for(self, weight: Tensor) -> None:
        for _, quantizer, rows in self.by_child(weight):
            quantizer.allocate_for(rows)

    def side_bytes(self, x: Tensor) -> int:
        return sum(quantizer.side_bytes(rows) for _, quantizer, rows in self.by_child(x))

    def parts(self, x: Tensor) -> list[Tensor]:
        return [part for rows in self._cut(x) for part in rows]

    def pre_observe(self, x: Tensor) -> None:
        for _, quantizer, rows in self._by_child(x):
            quantizer.pre_observe(rows)

    def numbers(self) -> dict[str, Tensor]:
        """Return the numbers of each child that has seen data, as `CHILD_NAME`."""
        return {f"{child}_{name}": n for child, q in self._ready().items() for name, n in q.numbers().items()}

    def _set_numbers(self, **numbers: Tensor | float) -> None:
        for child, quantizer in self._ready().items():
            own = {name: numbers[f"{child}_{name}"] for name in quantizer.numbers()}
            if own:
                quantizer.set_numbers(**own)

    def _numbers_of(self, weight: Tensor) -> dict[str, Tensor]:
        """Return {}: the children hold their numbers."""
        return {}

    @torch.no_grad()
    def preimage(self, values: Tensor) -> Tensor:
        return self._mapped(values, lambda q, rows: q.preimage(rows), lambda q, rows: rows)

    def quantize(self, x: Tensor) -> Tensor:
        return self._mapped(x, lambda q, rows: q.quantize(rows), _unused)

    def encode(self, x: Tensor) -> Tensor:
        return self._mapped(x, lambda q, rows: q.encode(rows), lambda q, rows: rows.to(torch.int32))

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return self._mapped(codes, lambda q, rows: q.decode(rows, dtype), lambda q, rows: rows.to(dtype))

    @property
    def is_ready(self) -> bool:
        return bool(self._ready())

    @property
    def is_memoryless(self) -> bool:
        return all(quantizer.is_memoryless for quantizer in self._children.values())

    @property
    def code_range(self) -> tuple[int, int]:
        return next(iter((self._ready() or self._children).values())).code_range


class GroupQuantizer(PartedQuantizer):
    """Applies any per-channel quantizer to groups of `size` elements instead of channels.

    A weight (out, in, ...) is read as `out` rows; each row is cut into groups of `size`, and the
    last may be shorter: its statistics are its own, nothing is padded into them. `quantizer` works per
    channel on axis 0. For weights: the number of rows must not change. Raises ConfigError.

    >>> from torchquant.quantizers import AffineQuantizer
    >>> from torchquant.range_observers import BatchMinMax
    >>> grouped = GroupQuantizer(AffineQuantizer(4, BatchMinMax(axis=0), "narrow"), size=2)
    >>> weight = torch.tensor([[7.0, 1.0, 0.7, 0.1, 0.5]])
    >>> grouped.pre_observe(weight)
    >>> grouped(weight)
    tensor([[7.0000, 1.0000, 0.7000, 0.1000, 0.5000]])
    """

    def __init__(self, quantizer: Quantizer, size: int) -> None:
        super().__init__(quantizer)
        if not (isinstance(size, int) and size > 0):
            raise ConfigError(f"the elements of a group must be a whole number > 0, got {size!r}")
        self.size = size
        self.whole = quantizer
        self.last = copy.deepcopy(quantizer)

    def _cut(self, x: Tensor) -> list[Tensor]:
        return list(cut_groups(x, self.size))

    def _join(self, rows: list[Tensor], x: Tensor) -> Tensor:
        whole, last = rows
        return join_groups(whole, last, x)

    def format(self) -> Format:
        whole, last = (q.format() if q.is_ready else None for q in (self.whole, self.last))
        return Groups(self.size, whole, last)

    @torch.no_grad()
    def nearest(self, x: Tensor, columns: Tensor) -> Tensor:
        return self.column_rounder()(x, columns)

    def column_rounder(self) -> Callable[[Tensor, Tensor], Tensor]:
        form = self.format()
        assert isinstance(form, Groups)
        return lambda x, columns: cast_back(form.columns(x.to(compute_dtype(x)), columns), x.dtype)

    def extra_repr(self) -> str:
        return f"size={self.size}"


class BlockwiseQuantizer(PartedQuantizer):
    """Applies any per-channel quantizer to the blocks of a weight instead of its channels.

    `sizes`: of a block along each axis of the weight, output channel first; -1 is the whole axis, as are the axes that
    are not given. Each size must divide its axis. `quantizer` works per channel on axis 0. Raises ConfigError.

    >>> from torchquant.quantizers import AffineQuantizer
    >>> from torchquant.range_observers import BatchMinMax
    >>> blockwise = BlockwiseQuantizer(AffineQuantizer(4, BatchMinMax(axis=0), "narrow"), (-1, 2))
    >>> weight = torch.tensor([[7.0, 1.0, 0.7, 0.1], [2.0, 3.0, 0.2, 0.3]])
    >>> blockwise.pre_observe(weight)
    >>> blockwise(weight)
    tensor([[7.0000, 1.0000, 0.7000, 0.1000],
            [2.0000, 3.0000, 0.2000, 0.3000]])
    """

    def __init__(self, quantizer: Quantizer, sizes: tuple[int, ...]) -> None:
        super().__init__(quantizer)
        self.blocks = BlockGrid(sizes)
        self.block = quantizer

    def _cut(self, x: Tensor) -> list[Tensor]:
        return [self.blocks.cut(x)]

    def _join(self, rows: list[Tensor], x: Tensor) -> Tensor:
        return self.blocks.join(rows[0], x)

    def format(self) -> Format:
        return Blocks(self.blocks, self.block.format())

    @torch.no_grad()
    def nearest(self, x: Tensor, columns: Tensor) -> Tensor:
        return super().nearest(x, columns) if not self.is_pinned else self.column_rounder()(x, columns)

    def column_rounder(self) -> Callable[[Tensor, Tensor], Tensor]:
        if not self.is_pinned:
            return super().column_rounder()
        form, shape = self.block.format(), torch.Size(int(size) for size in self.pinned.tolist())
        block_of = self.blocks.block_of_each(shape, self.pinned.device).flatten(1)

        def rounded(x: Tensor, columns: Tensor) -> Tensor:
            own = form.of_channels(block_of[:, columns].flatten())
            return cast_back(own.project(x.to(compute_dtype(x)).reshape(-1, 1))[0].view(x.shape), x.dtype)

        return rounded

    def extra_repr(self) -> str:
        return f"sizes={self.blocks.sizes}"
