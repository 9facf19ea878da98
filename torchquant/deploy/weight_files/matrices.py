"""Collect what such files hold: codes, scales and zero points of linear weights; all other tensors in float."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchquant.deploy.lowering.stored_groups import GroupCodes
from torchquant.deploy.lowering.stored_weights import encoded_weight
from torchquant.errors import ExportError
from torchquant.qmodule.float_checkpoints import float_keys, float_state_dict
from torchquant.qmodule.input_slots import InputSlots
from torchquant.qmodule.weight_slots import WeightSlot
from torchquant.quantizers_functional.bn_fold import channel_view
from torchquant.utils import qmodules, weight_slots


@dataclass(frozen=True, eq=False)
class Matrix:
    """A quantized weight, (N, K). codes: int32; scale, float32, and zero_point, int32: (N, K / size), of groups of K.

    Its values are (codes - zero_point) * scale. `low`, `high`: the smallest and largest code that it may have.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    size: int
    low: int
    high: int


@torch.no_grad()
def split(model: nn.Module, what: str, to_matrix: Callable[[WeightSlot], Matrix | None]) -> Split:
    """Split a calibrated model into quantized matrices and float tensors, both under the keys of the float model.

    `what`: the name of the format for messages. `to_matrix`: makes the matrix of a weight; None, or an ExportError that
    says why, where the format cannot hold it. Raises ExportError that names every site whose numbers would not be those
    of the model.
    """
    problems = [f"{path or '(root)'}: {slot} is quantized" for path, slot in _quantized_activations(model)]
    problems += [f"{path}: a transform or a product beside the weight" for path in _transformed(model)]
    matrices: dict[str, tuple[Tensor, Matrix]] = {}
    for slot in weight_slots(model):
        if slot.quantizer is None:
            continue
        found, why = None, ""
        if type(slot.module.layer) is nn.Linear and slot.fold_factor is None:
            try:
                found = to_matrix(slot)
            except ExportError as error:
                why = f" ({error})"
        if found is None:
            kind = f"{type(slot.module.layer).__name__} with {type(slot.quantizer).__name__}"
            problems.append(f"{slot.key}: {kind}{why}")
        else:
            matrices[slot.path] = slot.weight, found
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise ExportError(
            f"a {what} file holds weights of linear layers only, of schemes that it knows. Not so here: {shown}. Leave "
            "these float ('skip' in a rule, or no spec for the slot), or write a packed file (save_packed)"
        )
    if not matrices:
        raise ExportError(f"no linear layer of {type(model).__name__} has a quantized weight; quantize it first")
    state, kept = float_state_dict(model), model.state_dict(keep_vars=True)
    quantized = {}
    for key, own in float_keys(model):
        for path, (weight, matrix) in matrices.items():
            place = f"{path}." if path else ""  # a float layer may be tied to it, under keys of its own
            if kept[own] is weight and own.startswith(place) and key.startswith(place):
                quantized[key] = matrix
    return Split(quantized, {key: tensor for key, tensor in state.items() if key not in quantized})


@dataclass(frozen=True, eq=False)
class Split:
    """The tensors of a model: quantized matrices, and what stays float. Tied weights are in it under each key."""

    matrices: dict[str, Matrix]
    floats: dict[str, Tensor]


def uniform_matrix(slot: WeightSlot) -> Matrix | None:
    """Return the weight as codes of uniform grids, per tensor, channel or group of inputs; None for other schemes.

    Raises ExportError for a weight that is not calibrated, not in float32 or of more than 8 bits.
    """
    assert slot.quantizer is not None
    kept = encoded_weight(slot.seen().detach(), slot.quantizer, slot.key, slot.path)
    low, high = slot.quantizer.code_range
    if isinstance(kept, GroupCodes):
        scale, zero_point, axis, size = kept.along_longer_side()
        width = kept.codes.shape[1]
        return None if axis != 1 or width % size else Matrix(kept.codes, scale, zero_point, size, low, high)
    if not isinstance(kept, tuple):
        return None
    codes, grid = kept
    scale, zero_point = (
        (channel_view(number, 2, 0) if number.ndim else number).expand(len(codes), 1)
        for number in (grid.scale, grid.zero_point)
    )
    return Matrix(codes, scale.contiguous(), zero_point.contiguous(), codes.shape[1], low, high)


def _quantized_activations(model: nn.Module) -> list[tuple[str, str]]:
    found = []
    for path, module in qmodules(model):
        weights = {slot.name for slot in module.weight_slots()}
        found += [(path, slot) for slot in module.quantizers() if slot not in weights]
    return found


def _transformed(model: nn.Module) -> list[str]:
    return [path for path, module in qmodules(model) if isinstance(module, InputSlots) and module.has_slots]


def tied_keys(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Find key -> an earlier key of the same tensor.

    >>> shared = torch.ones(2)
    >>> tied_keys({"a": shared, "b": shared.clone(), "c": shared})
    {'c': 'a'}
    """
    first: dict[tuple[Any, ...], str] = {}
    found = {}
    for key, tensor in tensors.items():
        known = first.setdefault((tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()), key)
        if known != key and tensor.numel():
            found[key] = known
    return found
