"""Find the channels that one rotation can serve: those of a residual stream, of the values of attention heads.

A rotation mixes channels, so that only sums, products with one number for all channels, weights, and norms without
scales of their own may stand between the layers that give the channels and those that read them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torchquant.ptq.channel_calls import BOUNDED, CENTRED, POSITIVE
from torchquant.ptq.channels import ALONE, STOP
from torchquant.ptq.ends import Columns, End, Rows, Scale
from torchquant.ptq.paths import Run, followed, sharing

_ALONE = "an operator treats each of its channels by itself"
_REASONS = {POSITIVE: _ALONE, BOUNDED: _ALONE, ALONE: _ALONE}


@dataclass(eq=False)
class RotationSet:
    """Layers and tables that give channels, norms between them, and layers that read them.

    `size`: the channels of a run, which a rotation mixes; all runs get the same one. `keeps_mean`: whether a norm takes
    off the mean of a run, which a rotation must keep, as one whose rows and columns sum to 1 does.
    """

    ends: list[End]
    size: int
    keeps_mean: bool = field(default=False)

    def rotate(self, rotation: Tensor) -> None:
        """Multiply each run of the value, as a row vector, by an orthogonal matrix, (size, size)."""
        with torch.no_grad():
            for end in self.ends:
                end.rotate(rotation)

    @property
    def readers(self) -> list[Columns]:
        """The quantized layers that read the channels."""
        return [end for end in self.ends if isinstance(end, Columns) and end.is_quantized]

    def tensors(self) -> list[Tensor]:
        """Return all tensors of the ends."""
        return [tensor for end in self.ends for tensor in end.tensors]

    @property
    def name(self) -> str:
        """Name what gives the channels."""
        return ", ".join(dict.fromkeys(end.path for end in self.ends if not isinstance(end, Columns | Scale)))


def rotation_sets(
    model: nn.Module, example_inputs: Any, is_folded: bool = True
) -> tuple[list[RotationSet], list[tuple[str, str]]]:
    """Run the float model once; return what can be rotated, and what cannot: (names of what gives it, reason).

    `is_folded`: whether the scales of norms must be folded already.
    """
    run = followed(model, example_inputs)
    labels, ends = run.channels.labels(linked=True), list(run.ends.values())
    found: list[RotationSet] = []
    left: list[tuple[str, str]] = []
    for group in sharing(len(labels), [labels[end.ids].unique() for end in ends]):
        one = RotationSet([ends[i] for i in group], 0)
        if not one.readers or all(isinstance(end, Columns) for end in one.ends):
            continue
        channels = torch.cat([labels[end.ids] for end in one.ends]).unique()
        why = _why_not(run, one, labels, channels, is_folded)
        if why:
            left.append((one.name or ", ".join(end.path for end in one.ends), why))
        else:
            found.append(one)
    return found, left


def _why_not(run: Run, one: RotationSet, labels: Tensor, channels: Tensor, is_folded: bool) -> str:
    """Say why channels cannot be rotated, "" if they can; the size of their runs is then known."""
    for ids, what, where in run.channels.notes:
        is_ours = bool(torch.isin(labels[ids], channels).any())
        if is_ours and (what == STOP or what in _REASONS):
            return str(where) if where and what in (STOP, ALONE) else _REASONS.get(what, str(where))
        one.keeps_mean |= is_ours and what == CENTRED
    for end in one.ends:
        if isinstance(end, Scale) and is_folded and not _is_even(end):
            return f"the scale of {end.path} differs between channels; fold it first, with the stage fold_norm"
        if isinstance(end, Rows | Columns) and end.groups > 1:
            return f"{end.path} has {end.groups} groups"
        if end.slot is not None and (end.slot.is_computed or (end.slot.quantizer and end.slot.quantizer.is_pinned)):
            return f"the weight of {end.path} is computed from other parameters, or rounded already"
    rows = [
        row
        for runs in run.channels.runs
        for row in _rows(labels[runs])
        if torch.isin(runs.new_tensor(row[:1]), channels)
    ]
    whole = [tuple(labels[end.ids].tolist()) for end in one.ends]
    one.size = min(map(len, rows or whole))
    allowed = {row for row in rows or whole if len(row) == one.size}
    is_whole = all(part in allowed for row in (*rows, *whole) for part in _parts(row, one.size))
    if not is_whole or len(allowed) * one.size != len(channels):
        return "its channels do not arrive in whole runs everywhere"
    return ""


def _is_even(scale: Scale) -> bool:
    values = scale.values()
    return bool((values == values[0]).all())


def _rows(labels: Tensor) -> Iterable[tuple[int, ...]]:
    return map(tuple, labels.tolist())


def _parts(row: tuple[int, ...], size: int) -> Iterable[tuple[int, ...]]:
    return (row[i : i + size] for i in range(0, len(row), size))
