"""Represent many quantizers of one tensor as one staircase: between two thresholds all of them are constant."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchquant.errors import ConfigError, NoCodesError
from torchquant.quantizers import GridQuantizer, Quantizer
from torchquant.quantizers_functional._gradient import Clamp, where_strictly_inside
from torchquant.quantizers_functional.gradients import STE
from torchquant.search.learning._members import is_plain

MOST_BINS = 4096
CELLS = (4093, 8191, 10922, 13003, 16383)
MOST_PLACES = 2**15  # a place is kept as int16


@dataclass(frozen=True)
class Steps:
    """Quantizer k has the value `values[k, i]` and the gradient `slopes[k, i]` above `edges[i - 1]` up to `edges[i]`.

    edges: (n,). values: (K, n + 1). slopes: (K, n + 1) of 0 and 1, None where all are 1.
    """

    edges: Tensor
    values: Tensor
    slopes: Tensor | None


def steps_of(quantizers: Sequence[Quantizer], clamp: Clamp | None = None) -> Steps | None:
    """Make the staircase of per-tensor quantizers of the clamped x; None if one has none, or fails the test of it.

    Each bin is tested at both ends, to find a quantizer whose `thresholds()` are not where its level changes, or whose
    gradient changes elsewhere.

    >>> from torchquant.quantizers import PotQuantizer
    >>> quantizer = PotQuantizer(2)
    >>> quantizer.force(1.0)
    >>> steps_of([quantizer])
    Steps(edges=tensor([-1.5000,  0.0000,  1.5000]), values=tensor([[-2., -1.,  1.,  2.]]), slopes=None)
    """
    grids = [q for q in quantizers if isinstance(q, GridQuantizer) and is_plain(q)]
    if len(grids) < len(quantizers) or any(q.axis is not None or 2**q.n_bits > MOST_BINS for q in grids):
        return None
    if clamp is not None and not all(q.fuses_clamp for q in grids):
        return None
    with torch.no_grad():
        try:
            found = [edge for q in grids for edge in _edges(q)]
            found += [found[0].new_tensor([end]) for end in clamp or () if end is not None]
            edges = torch.cat(found).unique()
        except (NoCodesError, ConfigError):
            return None
        if len(edges) >= MOST_BINS or not bool(edges.isfinite().all()):
            return None
        span = (edges[-1:] - edges[:1]).clamp_min(edges.abs().amax().clamp_min(2.0**-100))
        outer = torch.cat([edges[:1] - span, edges, edges[-1:] + span])
        width = outer.diff()
        # The ends of a bin are rounded, so a very narrow bin is tested in its middle only.
        margin = torch.where(width < 2.0**-14 * span, width / 2, width / 256)
        probes = torch.stack([outer[:-1] + margin, outer[1:] - margin])
        found_there = [_values_and_slopes(q, probes, clamp) for q in grids]
    values, slopes = (torch.stack(t) for t in zip(*found_there, strict=True))
    if not torch.equal(values[:, 0], values[:, 1]) or not torch.equal(slopes[:, 0], slopes[:, 1]):
        return None
    return Steps(edges, values[:, 0], None if bool((slopes == 1).all()) else slopes[:, 0])


def _edges(quantizer: GridQuantizer) -> list[Tensor]:
    """Return where the level changes, and where the gradient may: at the ends, half a level or a cell beyond."""
    thresholds = quantizer.thresholds()
    if isinstance(quantizer.gradient, STE):
        return [thresholds]
    levels = quantizer.levels()
    ends, inner = levels[[0, -1]], levels[[1, -2]]
    half_a_level = ends + (ends - inner) / 2
    if len(thresholds) > 1:
        a_cell = 2 * thresholds[[0, -1]] - thresholds[[1, -2]]
        if not torch.allclose(half_a_level, a_cell):
            return [thresholds, ends, half_a_level, a_cell]
    return [thresholds, ends, half_a_level]


def _values_and_slopes(quantizer: GridQuantizer, probes: Tensor, clamp: Clamp | None) -> tuple[Tensor, Tensor]:
    """Return the value and the gradient of the quantizer at each probe."""
    is_clipped = not isinstance(quantizer.gradient, STE)
    value, inside = quantizer.format().project(probes, is_clipped, clamp)
    slope = torch.ones_like(probes) if inside is None else inside
    return value, slope if clamp is None else where_strictly_inside(probes, clamp, slope)


class Cells:
    """Finds the bin of each element like `torch.bucketize`, but much faster, through equal cells with few edges each.

    `place(x)` numbers the pairs (cell, edges of the cell that x is above); `bins` maps that number to the bin. x must
    not have NaN.

    >>> cells = Cells.over(torch.tensor([-1.0, 0.0, 4.0]))
    >>> cells.bins[cells.place(torch.tensor([-9.0, -1.0, 0.1, 5.0])).int()]
    tensor([0, 0, 2, 3])
    """

    def __init__(self, edges: Tensor, n_cells: int) -> None:
        self.n_cells = n_cells
        self.low = float(edges[0])
        self.per_unit = n_cells / (float(edges[-1]) - self.low)
        self._cell_of_edge = self._cell(edges)
        self.most = int(self._cell_of_edge.unique_consecutive(return_counts=True)[1].max())

    @classmethod
    def over(cls, edges: Tensor) -> Cells | None:
        """Make cells for sorted edges; None where the edges are too close together."""
        if not 2.0**-60 < float(edges[-1] - edges[0]) < 2.0**60:
            return None
        best: Cells | None = None
        for n_cells in CELLS:
            found = cls(edges, n_cells)
            if n_cells * (found.most + 1) <= MOST_PLACES and (best is None or found.most < best.most):
                best = found
            if found.most == 1:
                break
        return None if best is None else best._filled(edges)

    def _filled(self, edges: Tensor) -> Cells:
        count = self._cell_of_edge.to(torch.int64).bincount(minlength=self.n_cells)
        before = (count.cumsum(0) - count)[:, None]
        nth = torch.arange(self.most + 1)
        padded = torch.cat([edges, edges.new_full((self.most,), torch.inf)])
        self.edges = torch.where(nth[:-1] < count[:, None], padded[before + nth[:-1]], torch.inf).T.contiguous()
        self.bins = (before + nth).clamp_max_(len(edges)).flatten()
        return self

    def _cell(self, x: Tensor) -> Tensor:
        # Each of these steps rounds once and keeps order, so an edge falls into the cell of its neighbours.
        return x.sub(self.low).mul_(self.per_unit).clamp_(0, self.n_cells - 1).floor_()

    def place(self, x: Tensor) -> Tensor:
        """Return the index into `bins`, a whole number in x's type. x: (n,)."""
        cell = self._cell(x)
        index = cell.to(torch.int32)
        place = cell.mul_(len(self.edges) + 1)
        for edge in self.edges:
            place.add_(edge.index_select(0, index).lt_(x))
        return place


def has_only_numbers(x: Tensor) -> bool:
    """Tell whether no element is NaN or Inf; False also where the sum overflows."""
    return math.isfinite(x.sum().item())
