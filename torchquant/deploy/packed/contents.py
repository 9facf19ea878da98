"""The contents of a packed file: the tensors and the head that a calibrated model gives, and that a model loads."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchquant._modes import in_mode
from torchquant.deploy.packed.head import Head, type_name
from torchquant.deploy.packed.weight_codes import (
    CodesQuantizer,
    coded_tensors,
    codes_of,
    pack_codes,
    quantized_slots,
    tied_slots,
    unpack_codes,
)
from torchquant.errors import ConfigError, ExportError
from torchquant.graph.own_inputs import expect_slots
from torchquant.plan import QuantPlan
from torchquant.qmodule import QModuleState
from torchquant.qmodule.fused_part import current_keys
from torchquant.range_observers._pins import Pinnable
from torchquant.utils import set_qmodule_state

CODES, SHARED = ".codes", ".shared"
"""Name endings of the tensors of a weight: the bits of its codes, and the bits that all codes of a block share."""

Place = str | os.PathLike[str]


@torch.no_grad()
def contents_of(model: nn.Module, build: tuple[str, dict[str, Any]] | None = None) -> tuple[dict[str, Tensor], Head]:
    """Return the tensors and the head that hold a calibrated model, by the keys before packing, on the CPU.

    The codes of a weight are under its key + CODES, and + SHARED. Raises ExportError that names the weight.
    """
    weights: dict[str, list[Any]] = {}
    with in_mode(False, model):
        slots = {key: (slot, codes_of(slot)) for key, slot in quantized_slots(model).items()}
    tied = tied_slots(slots)
    tensors = _float_state(model, [slots[key][0].state_prefix for key in tied])
    for key, (slot, codes) in slots.items():
        assert slot.quantizer is not None
        form, elements, shared = pack_codes(codes.cpu(), slot.quantizer)
        weights[key] = [list(codes.shape), type_name(slot.weight), *form]
        if key not in tied:
            tensors[key + CODES] = elements
            if shared is not None:
                tensors[key + SHARED] = shared
    return tensors, Head(weights, _plan_of(model), build, tied)


@torch.no_grad()
def load_contents(place: Place, model: nn.Module, tensors: dict[str, Tensor], head: Head) -> None:
    """Load a quantized model from tensors and head, in place; put it in QUANT_EVAL, its weights decoded from codes.

    `place`: where they come from, for messages. Raises ConfigError for a model that does not fit.
    """
    expect_slots(model, tensors)
    none = torch.zeros(0, dtype=torch.uint8)
    bits = {key: (tensors.pop(key + CODES, none), tensors.pop(key + SHARED, none)) for key in head.weights}
    slots = quantized_slots(model)
    expect_names(place, model, "quantized weight", head.weights, slots)
    for key, other in head.tied.items():
        there, here = slots[other].state_prefix, slots[key].state_prefix
        tensors |= {here + k.removeprefix(there): value for k, value in tensors.items() if k.startswith(there)}
    load_state(place, model, tensors)
    coded = coded_tensors(model, model.state_dict(keep_vars=True))
    codes: dict[str, Tensor] = {}
    for key, (shape, kind, *form) in head.weights.items():
        slot = slots[key]
        quantizer, weight = slot.quantizer, slot.weight
        assert quantizer is not None
        if (shape, kind) != (list(slot.seen().shape), type_name(weight)):
            here = f"{type_name(weight)} of shape {list(slot.seen().shape)}"
            raise ConfigError(f"{place} holds another model: {key} is {kind} of shape {shape} there, {here} here")
        source = head.tied.get(key, key)
        if source not in codes:
            try:
                codes[source] = unpack_codes(form, shape, *bits[source], quantizer)
            except ConfigError as error:
                raise ConfigError(f"{place}, {key}: {error}") from error
        stored = CodesQuantizer(quantizer, codes[source].to(weight.device))
        slot.replace_quantizer(stored)
        if id(weight) in coded:
            slot.set_weight(stored.decode(stored.codes, weight.dtype))
            weight.requires_grad_(False)
    set_qmodule_state(model, QModuleState.QUANT_EVAL)


def load_state(place: Place, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load the tensors that are not codes. A tensor under several keys is stored under one of them.

    Raises ConfigError that names `place` for a model that does not fit.
    """
    current = current_keys(model, tensors)
    tensors = {current.get(key, key): value for key, value in tensors.items()}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Pinnable):
            module.expect_pins(tensors, f"{name}." if name else "")
    state = model.state_dict(keep_vars=True)
    coded = coded_tensors(model, state)
    given = {id(state[key]): value for key, value in tensors.items() if key in state}
    found = {id(value): value for value in state.values() if id(value) in coded} | given
    expect_names(
        place, model, "key", tensors, [k for k, value in state.items() if k in tensors or id(value) not in found]
    )
    for key in tensors:
        there, here = type_name(tensors[key]), type_name(state[key])
        if there != here:
            raise ConfigError(
                f"{place}: {key} is {there} in the file, {here} in the model; use model.to(torch.{there})"
            )
    try:
        model.load_state_dict({key: found[id(value)] for key, value in state.items()})
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{place} holds another model: {reason}") from error


def expect_names(place: Place, model: nn.Module, what: str, there: Collection[str], here: Collection[str]) -> None:
    """Raise ConfigError unless the file and the model have the same names."""
    problems = [
        f"{len(names)} {what}{'s' if len(names) > 1 else ''} only {where}: {', '.join(names[:3])}"
        for where, names in (
            ("in the file", [name for name in there if name not in here]),
            ("in the model", [name for name in here if name not in there]),
        )
        if names
    ]
    if problems:
        raise ConfigError(
            f"{place} holds another model than this {type(model).__name__}: {'; '.join(problems)}. Build it as it was "
            "for saving"
        )


def _float_state(model: nn.Module, left_out_keys: Sequence[str] = ()) -> dict[str, Tensor]:
    """Return the state without the weights that codes represent, each tensor once, by the keys before packing.

    `left_out_keys`: prefixes of keys that are left out too.
    """
    state = model.state_dict(keep_vars=True)
    left_out = coded_tensors(model, state)
    packed = [f"{p}." for p, m in model.named_modules(remove_duplicate=False) if isinstance(m, CodesQuantizer)]
    kept = {}
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise ExportError(f"{key} of the state_dict is a {type(value).__name__}; a packed file holds tensors only")
        prefix = next((p for p in packed if key.startswith(p)), "")
        if id(value) in left_out or (prefix and key == f"{prefix}codes") or key.startswith(tuple(left_out_keys)):
            continue
        left_out.add(id(value))
        name = prefix + key.removeprefix(prefix).removeprefix("quantizer.") if prefix else key
        kept[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    return kept


def _plan_of(model: nn.Module) -> dict[str, Any] | None:
    plan = getattr(model, "plan", None)
    try:
        return plan.to_dict() if isinstance(plan, QuantPlan) else None
    except ConfigError:  # it has functions
        return None
