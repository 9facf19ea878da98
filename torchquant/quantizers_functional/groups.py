"""Groups: adjacent elements in the rows of a weight, with one set of numbers per group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from torchquant._tensors import in_layout_of
from torchquant.quantizers_functional.formats import Format, OwnLevels


def cut_groups(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the whole groups (groups, size) and the shorter last ones (rows, rest); either may be empty.

    >>> whole, last = cut_groups(torch.arange(6.0).view(2, 3), 2)
    >>> whole.tolist(), last.tolist()
    ([[0.0, 1.0], [3.0, 4.0]], [[2.0], [5.0]])
    """
    rows = x.reshape(x.shape[0], -1) if x.numel() else x.reshape(0, size)
    end = rows.shape[1] - rows.shape[1] % size
    return rows[:, :end].reshape(-1, size), rows[:, end:]


def join_groups(whole: Tensor, last: Tensor, x: Tensor) -> Tensor:
    """Put the groups that `cut_groups` made back into the shape and layout of x."""
    joined = torch.cat([whole.reshape(len(last), -1), last], 1) if last.numel() or last.requires_grad else whole
    return in_layout_of(joined.reshape(x.shape), x)


@dataclass(frozen=True, eq=False)
class Groups(OwnLevels):
    """A format with one row per whole group, and one with a row per shorter last group; None if there are none."""

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

    def ends(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.ends_of_elements(x)

    def neighbours(self, x: Tensor) -> tuple[Tensor, Tensor]:
        below = self._by_parts(x, lambda format, part: format.neighbours(part)[0])
        return below, self._by_parts(x, lambda format, part: format.neighbours(part)[1])

    def columns(self, x: Tensor, columns: Tensor) -> Tensor:
        """Quantize x, (rows, k), on the grids of these columns, (k,) int64, of the weight's rows."""
        n_rows = len(x)
        n_whole = 0 if self.whole is None else (self.whole.n_channels or 0) // n_rows
        group = columns // self.size
        found = torch.empty_like(x)
        for format, of_last in ((self.whole, False), (self.last, True)):
            here = (group >= n_whole) == of_last
            if format is None or not bool(here.any()):
                continue
            row = torch.arange(n_rows, device=x.device)[:, None]
            channel = row.expand(-1, int(here.sum())) if of_last else row * n_whole + group[here]
            own, _ = format.of_channels(channel.flatten()).project(x[:, here].reshape(-1, 1))
            found[:, here] = own.view(n_rows, -1)
        return found

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
