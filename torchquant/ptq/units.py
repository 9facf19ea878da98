"""The weights that a run works on, chosen by name."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from torchquant.errors import ConfigError
from torchquant.qmodule import WeightSlot
from torchquant.utils import weight_slots


def find_units(model: nn.Module, names: Sequence[str], skip: Sequence[str]) -> tuple[list[WeightSlot], dict[str, str]]:
    """List each weight that the names select, and say why other quantized weights are not among them."""
    slots = [slot for slot in weight_slots(model) if slot.quantizer is not None]
    if not slots:
        raise ConfigError("the model has no quantized layers; use torchquant.quantize(model, rules, example) first")
    known = ", ".join(slot.label for slot in slots[:9]) + (", ..." if len(slots) > 9 else "")
    for what, patterns in (("names", names), ("skip", skip)):
        if missed := [pattern for pattern in patterns if not any(_matches(slot, [pattern]) for slot in slots)]:
            raise ConfigError(f"{what}: no quantized weight is called {missed[0]!r}; there are {known}")
    labels, places = {slot.key: slot.label for slot in slots}, _places(model)
    chosen: list[WeightSlot] = []
    left: dict[str, str] = {}
    for slot in slots:
        others = [labels.get(name, name) for name in places.get(id(slot.weight), ()) if name != slot.key]
        if not _matches(slot, names) or _matches(slot, skip):
            continue
        if others:
            left[slot.label] = f"its weight is that of {', '.join(others)} too"
        else:
            chosen.append(slot)
    if not chosen:
        raise ConfigError(
            f"names {list(names)} without {list(skip)} "
            f"select no weight that is only in one place; the quantized weights are {known}"
        )
    return chosen, left


def _places(model: nn.Module) -> dict[int, list[str]]:
    """Map the id of each parameter to its names, one for each place; a module in two places counts once."""
    found: dict[int, list[str]] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        if id(module._parameters) in seen:  # a wrapper has the parameters of the layer it holds
            continue
        seen.add(id(module._parameters))
        for name, parameter in module._parameters.items():
            found.setdefault(id(parameter), []).append(f"{path}.{name}" if path else name)
    return found


def _matches(slot: WeightSlot, names: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in (slot.path, slot.label) for pattern in names)
