"""An algorithm's view of one layer: its weight as a matrix, its grid, and statistics of its inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torchquant.errors import ConfigError
from torchquant.ptq.functional.columns import Nearest
from torchquant.ptq.functional.gram import check_gram, damping_of, gram_sum, output_error
from torchquant.ptq.functional.mismatch import corrected_weight
from torchquant.ptq.ranks import errors_on_all_ranks
from torchquant.qmodule import WeightSlot
from torchquant.quantizers import GroupQuantizer, Quantizer
from torchquant.range_observers._distributed import reduce_max, reduce_sum, world_size

FEWEST = 8
"""Inputs of a group for which it must have one row at least; with fewer rows it is rounded to nearest."""


class Layer:
    """A quantized weight. Algorithms read it; only the engine changes it.

    `weight`: (groups, rows, K) float32 or wider, the real weight that QUANT_EVAL quantizes, a batch norm folded in.
    `rounded`: the same on its grid, once an algorithm has chosen; None before. `beside`: the weight that a low-rank
    product beside the layer stands for, None without one; it is not in `weight`. `path`: its name in messages.
    """

    def __init__(
        self, slot: WeightSlot, weight: Tensor, rounded: Tensor | None = None, beside: Tensor | None = None
    ) -> None:
        assert slot.quantizer is not None
        self.slot, self.path = slot, slot.label
        self.quantizer: Quantizer = slot.quantizer
        self.shape = slot.seen().shape
        self.weight = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        self.rounded, self.beside = rounded, beside

    def numbers(self) -> dict[str, Tensor]:
        """Return a copy of the numbers of the quantizer, by name."""
        return {name: number.clone() for name, number in self.quantizer.numbers().items()}

    def at_its_codes(self, rounded: Tensor, numbers: Mapping[str, Tensor]) -> Tensor:
        """Set the numbers of the quantizer; return the weight whose codes are those that `rounded` had before."""
        codes = self.quantizer.encode(self.quantizer.preimage(rounded.reshape(self.shape)))
        self.quantizer.set_numbers(**numbers)
        return self.quantizer.decode(codes, rounded.dtype).view(rounded.shape)

    @property
    def group_size(self) -> int | None:
        """How many columns have numbers in common, if not all columns of a channel have."""
        return self.quantizer.size if isinstance(self.quantizer, GroupQuantizer) else None

    def numbers_by_row(self, in_groups: bool = True) -> dict[str, Tensor]:
        """Return `numbers` of a quantizer with one set for all, or for each channel, or for each group of a channel.

        Raises ConfigError for others, and for groups unless `in_groups`.
        """
        found, has_groups = self.numbers(), in_groups and self.group_size is not None
        if not found or (self.quantizer.columns_differ and not has_groups):
            raise ConfigError(
                f"{type(self.quantizer).__name__} has no numbers that can be set channel by channel; give the weight "
                f"one scale (/tensor) or /channel{', or /group=N' if in_groups else ''}"
            )
        return found

    @property
    def nearest(self) -> Nearest:
        """Return the function that quantizes x, (groups, rows, k), on the grids of columns, (groups, k) int64.

        It has the numbers that the quantizer has now.
        """
        rounder, varies = self.quantizer.column_rounder(), self.quantizer.columns_differ

        def nearest(x: Tensor, columns: Tensor) -> Tensor:
            if len(x) == 1 or not varies or bool((columns == columns[:1]).all()):
                return rounder(x.flatten(0, 1), columns[0]).view(x.shape)
            every = [rounder(x.flatten(0, 1), own).view(x.shape)[i] for i, own in enumerate(columns)]
            return torch.stack(every)

        return nearest

    def quantized(self, weight: Tensor | None = None) -> Tensor:
        """Round a weight, by default the layer's own, to nearest: (groups, rows, K)."""
        weight = self.weight if weight is None else weight
        return self.quantizer(weight.reshape(self.shape)).detach().view(weight.shape)

    def neighbours(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return the levels below and above each weight: two (groups, rows, K)."""
        below, above = self.quantizer.neighbours(weight.reshape(self.shape))
        return below.view(weight.shape), above.view(weight.shape)


Rows = Tensor | Sequence[Tensor]
"""Input rows (groups, n, K) of a layer, or such blocks for its first groups, for the next ones, and so on."""


@dataclass
class LayerData:
    """Statistics of a layer's inputs over all batches; only those that the stages asked for are present.

    `n`: the number of rows, that is tokens or patches; of the group with most, if groups have inputs of their own. All
    statistics are means over the rows: `gram` (groups, K, K) of the current inputs, `cross_gram` (groups, K, K) of
    these, transposed, with the inputs in the float model; `mean_input` and `mean_float_input` (groups, K). `uses`:
    how often each row of a table was looked up, (rows,); None for a layer that multiplies. `has_own_rows`: whether
    groups have inputs of their own, each with its own number of rows. `generator`: for random numbers.
    """

    path: str
    wanted: frozenset[str]
    generator: torch.Generator
    n: int = 0
    uses: Tensor | None = None
    has_own_rows: bool = False
    _n_columns: int = field(default=0, repr=False)
    _counts: Tensor | float = field(default=0.0, repr=False)
    _sums: dict[str, Tensor] = field(default_factory=dict, repr=False)
    _means: dict[str, Tensor] = field(default_factory=dict, repr=False)
    _corrected: tuple[Tensor, float, Tensor] | None = field(default=None, repr=False)

    def add(self, rows: Rows, float_rows: Rows | None) -> None:
        """Add rows of both models."""
        self.has_own_rows = not isinstance(rows, Tensor)
        self._n_columns = rows[0].shape[-1]
        blocks, others = _blocks(rows), None if float_rows is None else _blocks(float_rows)
        counts = torch.cat([torch.full((len(b),), b.shape[1], dtype=torch.float64, device=b.device) for b in blocks])
        found = {"gram": lambda: _joined([*map(gram_sum, blocks)]), "means": lambda: _row_sums(blocks)}
        if others is not None:
            found["cross_gram"] = lambda: _joined([*map(gram_sum, blocks, others)])
            found["float_means"] = lambda: _row_sums(others)
        self._add(counts, {name: found[name]() for name in self.wanted & found.keys()})

    def add_uses(self, uses: Tensor, n_columns: int) -> None:
        """Add how often each row of a table of n_columns was looked up, (rows,): its weights are read as they are."""
        self.uses = uses if self.uses is None else self.uses + uses
        count = uses.sum().to(torch.float64)[None]
        unit = count[:, None, None] * torch.eye(n_columns, dtype=torch.float64, device=uses.device)
        self._add(count, {name: unit.clone() for name in self.wanted & {"gram", "cross_gram"}})

    def _add(self, counts: Tensor, sums: Mapping[str, Tensor]) -> None:
        assert not self._means, "a mean has been taken already"
        self.n += int(counts.max())
        self._counts = self._counts + counts
        for name, value in sums.items():
            self._sums[name] = self._sums[name].add_(value) if name in self._sums else value

    def join_ranks(self, weight: Tensor) -> None:
        """Sum all statistics over the ranks of a process group; weight: (groups, rows, K).

        Raises ConfigError for rows that are not of K inputs.
        """
        groups, rows, k = weight.shape
        with errors_on_all_ranks():
            if self._n_columns not in (0, k):
                raise ConfigError(
                    f"{self.path}: a batch gives it rows of {self._n_columns} inputs, and its weight has {k}; give "
                    "batches that the float model takes"
                )
        if world_size() == 1:
            return
        self.has_own_rows = bool(reduce_max(torch.tensor(float(self.has_own_rows), device=weight.device)))
        self._n_columns = k
        square, flat = (groups, k, k), (groups, k)
        shapes = {"gram": square, "cross_gram": square, "means": flat, "float_means": flat, "uses": (rows,)}
        mine = self._sums if self.uses is None else self._sums | {"uses": self.uses}
        known = reduce_max(torch.tensor([float(name in mine) for name in shapes], device=weight.device))
        joined = {}
        for name, shape in (item for item, is_known in zip(shapes.items(), known, strict=True) if is_known):
            own = mine[name].to(torch.float64) if name in mine else weight.new_zeros(shape, dtype=torch.float64)
            joined[name] = reduce_sum(own)
        self.uses = joined.pop("uses", None)
        self._sums, self.n = joined, int(reduce_sum(torch.tensor(self.n, device=weight.device)))
        self._counts = reduce_sum(self._counts + weight.new_zeros(groups, dtype=torch.float64))

    def _mean(self, name: str) -> Tensor:
        if name not in self.wanted:
            raise ConfigError(f"{self.path}: the algorithm asks for {name!r}, which is not among what it needs")
        if name not in self._sums and name not in self._means:
            raise ConfigError(f"{self.path}: no calibration batch reached this layer; give batches that do")
        if name not in self._means:
            total = self._sums.pop(name)
            assert isinstance(self._counts, Tensor)
            counts = self._counts.clamp_min(1.0).view(-1, *[1] * (total.ndim - 1))
            self._means[name] = total.div_(counts)  # in place: these are the largest tensors of a run
        return self._means[name]

    @property
    def is_known(self) -> Tensor | None:
        """Tell where enough is known of the inputs to round by them, as (groups, rows, K) or 1; None: everywhere.

        Not of rows of a table that were never looked up, and of groups with inputs of their own that have fewer rows
        than one for each `FEWEST` inputs.
        """
        if self.uses is not None:
            return (self.uses > 0).view(1, -1, 1)
        return self._has_rows.view(-1, 1, 1) if self.has_own_rows else None

    @property
    def remark(self) -> str:
        """Say of what too little is known, "" if of nothing."""
        if self.uses is not None:
            never = int((self.uses == 0).sum())
            return f"{never} of its {len(self.uses)} rows were never looked up and stay nearest" if never else ""
        if not self.has_own_rows or bool(self._has_rows.all()):
            return ""
        counts = [int(n) for n in self._counts.tolist()]  # type: ignore[union-attr]
        few = ", ".join(f"{i} ({counts[i]} rows)" for i in (~self._has_rows).nonzero().flatten().tolist())
        return f"of its {len(counts)} groups these had few rows and stay nearest: {few}; give more batches"

    @property
    def _has_rows(self) -> Tensor:
        assert isinstance(self._counts, Tensor)
        return self._counts * FEWEST >= self._n_columns

    @property
    def gram(self) -> Tensor:
        return self._mean("gram")

    @property
    def cross_gram(self) -> Tensor:
        return self._mean("cross_gram")

    @property
    def mean_input(self) -> Tensor:
        return self._mean("means")

    @property
    def mean_float_input(self) -> Tensor:
        return self._mean("float_means")

    @property
    def damping(self) -> float:
        """Return how much to add to the diagonal of the Gram matrix, in units of its mean; see `damping_of`."""
        return damping_of(self.n, self._n_columns)

    def damped(self, damp: float | None = None) -> Tensor:
        """Return the Gram matrix with a share of its mean diagonal added to the diagonal: (groups, K, K).

        The error of a rounding under it is the one on these rows and a pull toward the target, which keeps roundings
        from fitting the noise of few rows. damp: the share, None for `damping`.
        """
        added = (self.damping if damp is None else damp) * self.gram.diagonal(dim1=-2, dim2=-1).mean(-1)
        damped = self.gram.clone()
        damped.diagonal(dim1=-2, dim2=-1).add_(added[:, None])
        return damped

    def check(self, damp: float) -> None:
        """Raise for a Gram matrix that carries no information about the layer."""
        check_gram(self.gram, self.n, damp)

    def corrected(self, weight: Tensor, damp: float | None = None) -> Tensor:
        """Solve for the weight whose outputs on the current inputs are nearest to the float ones: (groups, rows, K).

        damp: in units of the mean diagonal of the Gram matrix, None for `damping`.
        """
        damp = self.damping if damp is None else damp
        known = self._corrected
        if known is None or known[1] != damp or not torch.equal(known[0], weight):
            known = self._corrected = (weight, damp, corrected_weight(weight, self.gram, self.cross_gram, damp))
        return known[2]

    def error(self, weight: Tensor, rounded: Tensor) -> Tensor:
        """Compute the mean squared error of each output under a rounded weight: (groups, rows).

        The rows of a table count as often as they were looked up.
        """
        found = output_error((weight - rounded).to(self.gram.dtype), self.gram)
        return found if self.uses is None else found * self.uses / self.n


def are_alike(rows: Rows, others: Rows | None) -> bool:
    """Whether two sets of rows have the same shapes, so that their rows can be pairs."""
    return others is not None and [b.shape for b in _blocks(rows)] == [b.shape for b in _blocks(others)]


def _blocks(rows: Rows) -> Sequence[Tensor]:
    return [rows] if isinstance(rows, Tensor) else rows


def _row_sums(blocks: Sequence[Tensor]) -> Tensor:
    return _joined([block.sum(1, dtype=torch.float64) for block in blocks])


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
