"""Collect what one batch tells of every site: its own error and the inherited one, and the facts of its slots."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from torchquant._units import decibels
from torchquant.analysis.effects import energy
from torchquant.analysis.facts import SlotFacts, SlotSum
from torchquant.analysis.replay import Kept, Replay, kept_now
from torchquant.graph.called import tensors_in
from torchquant.graph.cost import agree
from torchquant.qmodule import QModule, QModuleState, WeightSlot
from torchquant.qmodule.state import is_real
from torchquant.quantizers import Quantizer
from torchquant.utils import qmodules, weight_slots


class SiteSums:
    """The errors and facts of the sites of a model while it runs quantized, summed over batches.

    Each site is run again in float on its own, quantized inputs. What that result lacks of the float model's comes from
    earlier sites: the inherited error. What the site's quantized result lacks of it is the error that the site adds.
    """

    def __init__(self, model: nn.Module) -> None:
        self.paths = {module: path for path, module in qmodules(model) if module.quantizers()}
        self.errors = {module: defaultdict[str, float](float) for module in self.paths}
        self.slots = {
            quantizer: SlotSum(path or "(root)", slot, module, quantizer)
            for module, path in self.paths.items()
            for slot, quantizer in module.quantizers().items()
        }
        self.tied = _tied(model)
        self.own_results: dict[nn.Module, Kept] = {}
        """The float result of each module for its quantized inputs, in its first call on the current batch."""

    @contextmanager
    def watching(self, is_first: bool) -> Iterator[None]:
        """Collect the facts of a batch while the context lasts; those of weights are taken from the first."""
        watched = [(q, found) for q, found in self.slots.items() if is_first or not found.slot_is_weight]
        handles = []
        for quantizer, found in watched:
            found.begin()

            def look(q: nn.Module, args: Any, kwargs: Any, result: Tensor, found: SlotSum = found) -> None:
                found.add(args[0], result, **kwargs)

            handles.append(quantizer.register_forward_hook(look, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def add_call(self, floats: Replay, module: nn.Module, number: int, again: Any, result: Any) -> None:
        """Add the errors of one call of a module. `again()` runs it on the same inputs."""
        if not isinstance(module, QModule) or module not in self.paths:
            return
        reference = floats.result(module, number)
        state = module.state
        module.state = QModuleState.BYPASSED
        try:
            own = again()
        finally:
            module.state = state
        if number == 0:
            self.own_results[module] = kept_now(own)
        if reference is None:  # it was written to after the call
            return
        sums = self.errors[module]
        for y, inherited, got in zip(*map(_reals, (reference, own, result)), strict=False):
            if y.shape != got.shape:
                continue
            sums["signal"] += energy(y)
            sums["added"] += energy(got - inherited)
            sums["inherited"] += energy(inherited - y)
            largest = float(got.abs().max()) if got.numel() else 0.0
            for quantizer in module.quantizers().values():
                self.slots[quantizer].largest_output = max(self.slots[quantizer].largest_output, largest)
        sums["calls"] = max(sums["calls"], number + 1.0)

    def sqnr_db(self, module: QModule, which: str) -> float | None:
        """Return the SQNR of the module's output with the "added" or the "inherited" error; None if unknown."""
        sums = self.errors[module]
        return decibels(sums["signal"], sums[which]) if sums["calls"] else None

    def facts(self, module: QModule) -> tuple[SlotFacts, ...]:
        """Return the facts of the slots of a module that saw data."""
        path = self.paths[module] or "(root)"  # not that of the sums: slots may share a quantizer
        return tuple(
            replace(self.slots[quantizer].facts(), path=path, slot=slot, tied_to=self.tied.get(quantizer, ()))
            for slot, quantizer in module.quantizers().items()
            if self.slots[quantizer].sums["elements"]
        )

    def state(self) -> dict[str, Any]:
        """Return all sums as plain data."""
        errors = {self.paths[module]: dict(sums) for module, sums in self.errors.items()}
        return {"errors": errors, "slots": [found.state() for found in self.slots.values()]}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from the result of `state`."""
        for module, sums in self.errors.items():
            sums.update(state["errors"][self.paths[module]])
        for found, kept in zip(self.slots.values(), state["slots"], strict=True):
            found.load(kept)


def _tied(model: nn.Module) -> dict[Quantizer, tuple[tuple[str, str], ...]]:
    """Return each quantizer of a weight -> the slots that quantize the same weight with other numbers."""
    owners: dict[int, list[WeightSlot]] = {}
    for slot in weight_slots(model):
        if slot.quantizer is not None:
            owners.setdefault(slot.weight.data_ptr(), []).append(slot)
    found = {}
    for slots in owners.values():
        for slot in slots:
            own = slot.quantizer
            others = [s for s in slots if s.weight.shape == slot.weight.shape and not agree(own, s.quantizer)]
            if own is not None and others:
                found[own] = tuple((s.path or "(root)", s.name) for s in others)
    return found


def _reals(value: Any) -> list[Tensor]:
    return [tensor for tensor in tensors_in(value) if is_real(tensor)]
