"""Fold the scales before a layer into what gives its channels, so that nothing is multiplied at run time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchquant.ptq.channel_calls import BOUNDED
from torchquant.ptq.ends import Columns, End
from torchquant.ptq.paths import ChannelSet, channel_sets
from torchquant.ptq.shifted_scale import ShiftedScale
from torchquant.ptq.structure import restart_ranges, same_function
from torchquant.qmodule import ChannelScale


class InputFolding:
    """Finds where the scales of layers that read one value can go, and puts them there when all are known.

    `example`: an input to run the float model on.
    """

    def __init__(self, model: nn.Module, example: Any) -> None:
        self.model, self.example = model, example
        self.found = channel_sets(model, example)
        self.chosen: list[tuple[ChannelSet, Tensor, Tensor | None]] = []

    def place_for(self, paths: Sequence[str]) -> tuple[ChannelSet, Tensor] | str:
        """Return what layers at these paths read, and the channel of it that each of theirs is, (K,); or why not."""
        found = {path: self._columns(path) for path in paths}
        if lost := [path for path, columns in found.items() if columns is None]:
            reasons = (reason for end, reason in self.found.left if _is_of(end, lost[0]))
            return next(reasons, "what gives its input is unknown")
        (one, first), *others = (columns for columns in found.values() if columns is not None)
        if any(other is not one or not torch.equal(end.index, first.index) for other, end in others):
            return "its readers take the channels in different ways"
        if bool((first.index < 0).any()):
            return "only some of its channels can be scaled"
        return why if (why := self._why_fixed(one, paths)) else (one, first.index)

    def _columns(self, path: str) -> tuple[ChannelSet, Columns] | None:
        found = ((one, end) for one in self.found.sets for end in one.readers if _is_of(end, path))
        return next(((one, end) for one, end in found if isinstance(end, Columns)), None)

    def _why_fixed(self, one: ChannelSet, paths: Sequence[str]) -> str:
        """Say why a set that layers at these paths read cannot be scaled for them, "" if it can."""
        if BOUNDED in one.notes:
            return "the values end at a bound that a factor would move"
        for end in one.readers:
            if end.slot is not None and end.is_quantized and end.slot.path not in paths:
                return f"{end.path} reads the channels too"
        for end in (*one.producers, *one.readers):
            quantizer = None if end.slot is None else end.slot.quantizer
            if quantizer is not None and quantizer.is_pinned:
                return f"{end.path} has been rounded already"
            if end.slot is not None and end.slot.is_computed:
                return f"the weight of {end.path} is computed from other parameters"
        for end in one.producers:
            quantizer = None if end.slot is None else end.slot.quantizer
            if quantizer is not None and quantizer.axis != 0 and not quantizer.levels_vary:
                return f"the weight of {end.path} has one scale for several of its channels"
        return ""

    def choose(self, one: ChannelSet, index: Tensor, transform: ChannelScale) -> str:
        """Note that the channels of the readers, (K,), are to be transformed; say where that goes."""
        factors = torch.ones(one.n, dtype=torch.float64)
        factors[index] = 1.0 / transform.factor.cpu().double()
        shift = None
        if isinstance(transform, ShiftedScale):
            shift = torch.zeros_like(factors)
            shift[index] = transform.shift.cpu().double()
        self.chosen.append((one, factors, shift))
        said = "folded" if shift is None else "folded with a shift"
        return f"{said} into {', '.join(dict.fromkeys(end.path for end in one.producers))}"

    def apply(self, stage: str) -> None:
        """Scale all that was chosen. Raises ConfigError, with everything unchanged, if that changes the function."""
        ends = [end for one, _, _ in self.chosen for end in (*one.producers, *one.readers)]
        if not ends:
            return
        with same_function(self.model, self.example, ends, stage, "keep the scales before the layers, fold=False"):
            for one, factors, shift in self.chosen:
                if shift is not None:
                    one.shift(shift)
                one.scale(factors)
        restart_ranges(self.model, ends)


def _is_of(end: End, path: str) -> bool:
    return end.slot is not None and end.slot.path == path and isinstance(end, Columns)
