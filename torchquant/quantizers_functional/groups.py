"""Groups: runs of neighbours in the rows of a weight, each with numbers of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from torchquant._tensors import in_layout_of
from torchquant.quantizers_functional.formats import Format, OwnLevels


def cut_groups(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The whole groups (groups, size) and the shorter last ones (rows, rest); either may be empty.

    >>> whole, last = cut_groups(torch.arange(6.0).view(2, 3), 2)
    >>> whole.tolist(), last.tolist()
    ([[0.0, 1.0], [3.0, 4.0]], [[2.0], [5.0]])
    """
    rows = x.reshape(x.shape[0], -1) if x.numel() else x.reshape(0, size)
    end = rows.shape[1] - rows.shape[1] % size
    return rows[:, :end].reshape(-1, size), rows[:, end:]


def join_groups(whole: Tensor, last: Tensor, x: Tensor) -> Tensor:
    """What `cut_groups` cut, back in the shape and layout of x."""
    rows = len(last)
    joined = torch.cat([whole.reshape(rows, -1), last], 1) if rows else whole
    return in_layout_of(joined.reshape(x.shape), x)


@dataclass(frozen=True, eq=False)
class Groups(OwnLevels):
    """A format per row of groups, and one per row of the shorter last groups; None where there are no such groups."""

    size: int
    whole: Format | None
    last: Format | None

    @property
    def code_range(self) -> tuple[int, int]:
        one = self.whole or self.last
        assert one is not None
        return one.code_range

    def _by_parts(self, x: Tensor, work: Callable[[Format, Tensor], Tensor]) -> Tensor:
        parts = zip((self.whole, self.last), cut_groups(x, self.size), strict=True)
        whole, last = (part if format is None else work(format, part) for format, part in parts)
        return join_groups(whole, last, x)

    def codes(self, x: Tensor) -> Tensor:
        return self._by_parts(x, lambda format, part: format.codes(part))

    def values(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        return self._by_parts(codes, lambda format, part: format.values(part, dtype))

    def nearest(self, x: Tensor, want_inside: bool) -> tuple[Tensor, Tensor | None]:
        def along(i: int) -> Tensor:
            def work(format: Format, part: Tensor) -> Tensor:
                found = format.project(part, i == 1)[i]
                return torch.ones_like(part) if found is None else found

            return self._by_parts(x, work)

        return along(0), along(1) if want_inside else None
