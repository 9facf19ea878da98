"""Per-group granularity: one set of numbers per group of adjacent elements in a row of a weight."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from torchquant.errors import ConfigError
from torchquant.quantizers._base import About, Quantizer
from torchquant.quantizers_functional._gradient import cast_back, compute_dtype
from torchquant.quantizers_functional.formats import Format
from torchquant.quantizers_functional.groups import Groups, cut_groups, join_groups


def _unused(quantizer: Quantizer, part: Tensor) -> Tensor:
    """Join an empty part to the graph, so that learned parameters of its quantizer get a gradient of 0, not None."""
    learned = [parameter for parameter in quantizer.parameters() if parameter.requires_grad]
    if not learned:
        return part.detach()  # so that nothing is joined to the others
    return part + sum(parameter.sum() for parameter in learned).to(part.dtype)  # type: ignore[union-attr]


class GroupQuantizer(Quantizer):
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

    about = About(granularity=("block",))

    def __init__(self, quantizer: Quantizer, size: int) -> None:
        super().__init__()
        if quantizer.axis != 0:
            raise ConfigError(f"a group takes a quantizer per channel on axis 0, got axis={quantizer.axis!r}")
        if not (isinstance(size, int) and size > 0):
            raise ConfigError(f"the elements of a group must be a whole number > 0, got {size!r}")
        self.size = size
        self.n_bits = quantizer.n_bits
        self.signed = quantizer.signed
        self.is_idempotent = quantizer.is_idempotent
        self.whole = quantizer
        self.last = copy.deepcopy(quantizer)

    def _parts(self, x: Tensor) -> list[tuple[Quantizer, Tensor]]:
        return list(zip((self.whole, self.last), cut_groups(x, self.size), strict=True))

    def side_bytes(self, x: Tensor) -> int:
        return sum(quantizer.side_bytes(part) for quantizer, part in self._parts(x) if part.numel())

    def parts(self, x: Tensor) -> list[Tensor]:
        return [group for part in cut_groups(x, self.size) for group in part]

    def pre_observe(self, x: Tensor) -> None:
        for quantizer, part in self._parts(x):
            quantizer.pre_observe(part)

    def format(self) -> Format:
        whole, last = (q.format() if q.is_ready else None for q in (self.whole, self.last))
        return Groups(self.size, whole, last)

    def numbers(self) -> dict[str, Tensor]:
        """Return the numbers of the whole groups and of the shorter last ones, `whole_NAME` and `last_NAME`."""
        named = (("whole", self.whole), ("last", self.last))
        return {f"{part}_{name}": n for part, q in named if q.is_ready for name, n in q.numbers().items()}

    def _set_numbers(self, **numbers: Tensor | float) -> None:
        for part, quantizer in (("whole", self.whole), ("last", self.last)):
            own = {name: numbers[f"{part}_{name}"] for name in quantizer.numbers()} if quantizer.is_ready else {}
            if own:
                quantizer.set_numbers(**own)

    @torch.no_grad()
    def nearest(self, x: Tensor, columns: Tensor) -> Tensor:
        return self.column_rounder()(x, columns)

    def column_rounder(self) -> Callable[[Tensor, Tensor], Tensor]:
        form = self.format()
        assert isinstance(form, Groups)
        return lambda x, columns: cast_back(form.columns(x.to(compute_dtype(x)), columns), x.dtype)

    @torch.no_grad()
    def preimage(self, values: Tensor) -> Tensor:
        whole, last = (q.preimage(part) if part.numel() else part for q, part in self._parts(values))
        return join_groups(whole, last, values)

    def _numbers_of(self, weight: Tensor) -> dict[str, Tensor]:
        """Return {}: the groups hold their numbers."""
        return {}

    def quantize(self, x: Tensor) -> Tensor:
        whole, last = (q.quantize(part) if part.numel() else _unused(q, part) for q, part in self._parts(x))
        return join_groups(whole, last, x)

    def encode(self, x: Tensor) -> Tensor:
        whole, last = (q.encode(part) if part.numel() else part.to(torch.int32) for q, part in self._parts(x))
        return join_groups(whole, last, x)

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        whole, last = (q.decode(part, dtype) if part.numel() else part.to(dtype) for q, part in self._parts(codes))
        return join_groups(whole, last, codes)

    @property
    def is_ready(self) -> bool:
        return self.whole.is_ready or self.last.is_ready

    @property
    def is_memoryless(self) -> bool:
        return self.whole.is_memoryless

    @property
    def code_range(self) -> tuple[int, int]:
        return (self.whole if self.whole.is_ready else self.last).code_range

    def extra_repr(self) -> str:
        return f"size={self.size}"
