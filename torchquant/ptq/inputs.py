"""Run a stage for inputs at the layers that read one value: measure its candidates, and put the best before them."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from torchquant.errors import ConfigError, NonFiniteError, one_line
from torchquant.graph.own_inputs import read_own_input
from torchquant.ptq.input_folding import InputFolding
from torchquant.ptq.padding import Padding
from torchquant.ptq.paths import ChannelSet
from torchquant.ptq.ranks import is_any
from torchquant.ptq.readers import Call, Readers, each_readers
from torchquant.ptq.report import StepReport
from torchquant.ptq.stage import InputStage
from torchquant.qmodule import ChannelScale, InputTransform, QModuleState, WeightSlot
from torchquant.qmodule.input_slots import InputSlots
from torchquant.qmodule.weight_slots import LayerSlot
from torchquant.utils import qmodule_state

KEPT = 1e-4
"""Largest deviation of a layer's float output, relative to its largest value, that a transform may cause."""


def has_slots(slot: WeightSlot) -> bool:
    """Tell whether something in float stands before or beside the layer of a weight."""
    return isinstance(slot, LayerSlot) and bool(slot.module.has_slots)


def why_not(slot: WeightSlot) -> str:
    """Say why no transform can be put before the layer of a weight, "" if one can."""
    if not isinstance(slot, LayerSlot):
        return "a transform is for layers with one weight"
    return "" if slot.module.has_known_channels else "it is not known which axis of its input holds the channels"


class InputWork:
    """The work of one stage, called `name` in reports.

    `keep`: "best" leaves inputs as they are where no candidate lowers the error. `folding`: where scales can go in
    place of a product before the layers, None for nowhere.
    """

    def __init__(
        self,
        model: nn.Module,
        stage: InputStage,
        name: str,
        keep: str,
        report: Callable[[StepReport], None],
        folding: InputFolding | None = None,
    ) -> None:
        self.model, self.stage, self.name, self.keep, self.report = model, stage, name, keep, report
        self.changed: dict[str, InputSlots] = {}
        self.folding = folding

    def run_all(
        self,
        slots: Mapping[str, WeightSlot],
        calls: Sequence[Call],
        paddings: Sequence[Padding],
        generator_of: Callable[[str], torch.Generator],
    ) -> None:
        """Work on the readers of each value in turn; changed layers quantize their own inputs afterwards."""
        left = {path: why_not(slot) or "no batch reached it" for path, slot in slots.items()}
        modules = {path: slot.module for path, slot in slots.items() if not why_not(slot)}
        with qmodule_state(self.model, QModuleState.BYPASSED):
            for readers in each_readers(self.model, modules, calls, paddings, generator_of):
                for step in self._work(readers):
                    del left[step.path]
                    self.report(step)
        for path, wrapper in self.changed.items():  # while forwards wait, their model must keep its modules
            read_own_input(self.model, path)
            wrapper.forget_ranges("input")
        if self.folding is not None:
            self.folding.apply(self.name)
        for path, why in left.items():
            self.report(StepReport(self.name, path, note=f"left as it is: {why}"))

    def _work(self, readers: Readers) -> list[StepReport]:
        """Choose a transform and put it before all readers. Returns one report for each of them."""
        began = time.perf_counter()
        before = after = None
        place = None if self.folding is None else self.folding.place_for(list(readers.wrappers))
        if isinstance(place, tuple):
            readers.channels, readers.can_shift = place[1], place[0].can_shift and readers.axis == -1
        try:
            before = readers.error(None) if readers.n_rows else None
            label, best, after = self._best(readers, before)
            note = label if best is None else self._placed(readers, best, label, place)
        except (ConfigError, NonFiniteError) as error:
            note, after = f"left as it is: {one_line(error)}", before
        seconds = (time.perf_counter() - began) / len(readers.wrappers)
        return [StepReport(self.name, p, seconds, before, after, None, readers.n_rows, note) for p in readers.wrappers]

    def _best(self, readers: Readers, before: float | None) -> tuple[str, InputTransform | None, float | None]:
        best: tuple[str, InputTransform | None, float | None]
        best = "left as it is: no candidate lowers the error", None, before
        for label, transform in self.stage.candidates(readers):
            if before is None:  # nothing to measure with
                return label, transform, None
            error = readers.error(transform)
            is_first = best[1] is None and self.keep == "always"
            if is_first or (best[2] is not None and error < best[2]):
                best = label, transform, error
        return best

    def _placed(
        self, readers: Readers, transform: InputTransform, label: str, place: tuple[ChannelSet, Tensor] | str | None
    ) -> str:
        """Fold the transform into what gives the channels, else put it before the readers; say which."""
        if self.folding is not None and isinstance(place, tuple) and isinstance(transform, ChannelScale):
            return f"{label}; {self.folding.choose(*place, transform)}"
        return self._put(readers, transform, label) + (f"; before the layer, because {place}" if place else "")

    def _put(self, readers: Readers, transform: InputTransform, label: str) -> str:
        """Put the transform before every reader, and take it off again where it changes the function of the layer."""
        refused = []
        for path, wrapper in readers.wrappers.items():
            weight = wrapper.weight_slots()[0].weight
            former, former_steps = weight.clone(), wrapper.input_transform
            wanted = [wrapper.layer(x) for x in readers.sample[:1]]
            wrapper.transform_input(copy.deepcopy(transform))
            found = [wrapper.layer(transform(x)) for x in readers.sample[:1]]
            if is_any(not all(map(_is_kept, found, wanted))):
                wrapper.put_back_input(former_steps, former)
                refused.append(path)
            else:
                self.changed[path] = wrapper
        return label + "".join(f"; taken off {path}, whose forward does more than one product" for path in refused)


def _is_kept(found: Tensor, wanted: Tensor) -> bool:
    tolerance = max(KEPT, 8.0 * torch.finfo(wanted.dtype).eps)
    return float((found - wanted).abs().amax()) <= tolerance * float(wanted.abs().amax())
