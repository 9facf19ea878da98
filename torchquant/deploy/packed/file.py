"""Save and load packed models: one safetensors file with every quantized weight as codes at their true width."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchquant._arguments import checked
from torchquant._files import write_whole
from torchquant._modes import in_mode
from torchquant.deploy.packed.head import Head, metadata_of, read_head, type_name
from torchquant.deploy.packed.reading import read_safetensors
from torchquant.deploy.packed.references import model_of, split_reference
from torchquant.deploy.packed.weight_codes import (
    CodesQuantizer,
    coded_tensors,
    codes_of,
    pack_codes,
    quantized_slots,
    tied_slots,
    unpack_codes,
)
from torchquant.errors import ConfigError, ExportError, require
from torchquant.graph.own_inputs import expect_slots
from torchquant.plan import QuantPlan, quantize
from torchquant.qmodule import QModule, QModuleState
from torchquant.qmodule.fused_part import current_keys
from torchquant.range_observers._pins import Pinnable
from torchquant.utils import set_qmodule_state

CODES, SHARED = ".codes", ".shared"
"""Name endings of the tensors of a weight: the bits of its codes, and the bits that all codes of a block share."""

Build = str | tuple[str, Mapping[str, Any]]


@checked
@torch.no_grad()
def save_packed(model: nn.Module, path: str | os.PathLike[str], build: Build | None = None) -> Path:
    """Write a calibrated model as one .safetensors file that `load_packed` reads. Returns its path.

    Of a quantized weight only the codes are stored, as wide as `code_range` and without gaps, with the scale of a block
    once per block. A weight that several layers share is stored once if they agree on codes and numbers. The rest of
    the `state_dict` is stored unchanged, and so is the plan of a model that `quantize` made, unless the plan holds
    functions, which have no text. `build`: the function that builds the model when only the file is there:
    "package.module:function", "path/to/file.py:function" (relative to the working folder at that time), or a tuple of
    this and its keyword arguments. It returns the float model if the file has a plan, else the quantized one.

    The state of the QModules does not matter. A save that fails leaves no file. Needs the extra `deploy`.
    Raises ExportError that names the site, ConfigError for a bad `build`, MissingDependencyError.

    >>> import tempfile
    >>> from torchquant import observe_weights, quantize
    >>> model = quantize(nn.Linear(256, 256), [{"weight": "affine:4/channel"}])
    >>> observe_weights(model)
    >>> sizes = {"in_features": 256, "out_features": 256}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = save_packed(model, f"{folder}/model.safetensors", ("torch.nn:Linear", sizes))
    ...     file.stat().st_size < 256 * 256 * 4 / 6  # a sixth of float32
    ...     type(load_packed(file)).__name__
    True
    'QWrapper'
    """
    safetensors = require("safetensors.torch", "deploy")
    if not any(isinstance(module, QModule) for module in model.modules()):
        raise ExportError(
            f"{type(model).__name__} has no QModule, so nothing in it is quantized. Quantize it with "
            "torchquant.quantize, or save its state_dict"
        )
    reference = _checked_build(build)
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
    head = Head(weights, _plan_of(model), reference, tied)
    metadata = metadata_of(tensors, head)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    return write_whole(target, lambda temporary: safetensors.save_file(tensors, temporary, metadata))


@checked
@torch.no_grad()
def load_packed(path: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """Load the model of a packed file, in eval mode and QUANT_EVAL; it computes the same as the saved one, bit for bit.

    `model`: the float model if the file has a plan, or the quantized one, built as it was for saving; it is copied, not
    changed. Without it the file's `build` is called: a function of a module or Python file that the packed file names,
    with arguments from the file. This runs code, so do it only with files you trust. With `model` nothing is imported
    and no code runs. No pickle is read in either case.

    Quantized weights are decoded from their codes, so the model is for inference: quantizing in train mode raises
    ConfigError, and observing does not change weight quantizers. Its float weights, which other states use, are the
    values of the codes without the folded batch norm, and need no gradient. The model can be exported, analysed and
    packed again.

    Raises ConfigError for a file that is damaged or not a packed model, and for a model that does not fit the file;
    MissingDependencyError.

    >>> import tempfile
    >>> from torchquant import observe_weights, quantize
    >>> net = nn.Sequential(nn.Linear(4, 2))
    >>> model = quantize(net, [{"weight": "affine:4/channel"}])
    >>> observe_weights(model)
    >>> set_qmodule_state(model.eval(), QModuleState.QUANT_EVAL)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     loaded = load_packed(save_packed(model, f"{folder}/model.safetensors"), net)
    >>> x = torch.randn(3, 4)
    >>> torch.equal(loaded(x), model(x))
    True
    """
    tensors, metadata = read_safetensors(path)
    head = read_head(path, tensors, metadata)
    loaded = _built(path, head, model)
    expect_slots(loaded, tensors)
    none = torch.zeros(0, dtype=torch.uint8)
    bits = {key: (tensors.pop(key + CODES, none), tensors.pop(key + SHARED, none)) for key in head.weights}
    slots = quantized_slots(loaded)
    _expect(path, loaded, "quantized weight", head.weights, slots)
    for key, other in head.tied.items():
        there, here = slots[other].state_prefix, slots[key].state_prefix
        tensors |= {here + k.removeprefix(there): value for k, value in tensors.items() if k.startswith(there)}
    current = current_keys(loaded, tensors)
    tensors = {current.get(key, key): value for key, value in tensors.items()}
    for name, module in loaded.named_modules(remove_duplicate=False):
        if isinstance(module, Pinnable):
            module.expect_pins(tensors, f"{name}." if name else "")
    _load_state(path, loaded, tensors)
    coded = coded_tensors(loaded, loaded.state_dict(keep_vars=True))
    codes: dict[str, Tensor] = {}
    for key, (shape, kind, *form) in head.weights.items():
        slot = slots[key]
        quantizer, weight = slot.quantizer, slot.weight
        assert quantizer is not None
        if (shape, kind) != (list(slot.seen().shape), type_name(weight)):
            here = f"{type_name(weight)} of shape {list(slot.seen().shape)}"
            raise ConfigError(f"{path} holds another model: {key} is {kind} of shape {shape} there, {here} here")
        source = head.tied.get(key, key)
        if source not in codes:
            try:
                codes[source] = unpack_codes(form, shape, *bits[source], quantizer)
            except ConfigError as error:
                raise ConfigError(f"{path}, {key}: {error}") from error
        stored = CodesQuantizer(quantizer, codes[source].to(weight.device))
        slot.replace_quantizer(stored)
        if id(weight) in coded:
            slot.set_weight(stored.decode(stored.codes, weight.dtype))
            weight.requires_grad_(False)
    set_qmodule_state(loaded, QModuleState.QUANT_EVAL)
    return loaded.eval()


def _checked_build(build: Build | None) -> tuple[str, dict[str, Any]] | None:
    if build is None:
        return None
    reference, arguments = (build, {}) if isinstance(build, str) else build
    split_reference(reference)
    try:
        json.dumps(arguments)
    except TypeError as error:
        raise ConfigError(f"the arguments of {reference} must be plain JSON data: {error}") from error
    return reference, dict(arguments)


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


def _built(path: str | os.PathLike[str], head: Head, model: nn.Module | None) -> nn.Module:
    """Make a copied or newly built quantized model to load the file into."""
    if model is not None:
        own = copy.deepcopy(model)
    elif head.build is not None:
        reference, arguments = head.build
        own = model_of(reference, **arguments)
    else:
        raise ConfigError(
            f"{path} does not name a function that builds its model. Give load_packed the model, or save_packed a "
            "build such as 'my_package.models:my_model'"
        )
    if not any(isinstance(module, QModule) for module in own.modules()):
        if head.plan is None:
            raise ConfigError(
                f"{path} has no plan, so it is loaded into the quantized model, built as it was for saving; got a "
                f"float {type(own).__name__}"
            )
        own = quantize(own, QuantPlan.from_dict(head.plan, f"the plan in {path}"), inplace=True)
    for slot in quantized_slots(own).values():
        if isinstance(slot.quantizer, CodesQuantizer):
            slot.replace_quantizer(slot.quantizer.quantizer)
    return own


def _load_state(path: str | os.PathLike[str], model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load everything but the codes into the model. A tensor under several keys is stored under one of them."""
    state = model.state_dict(keep_vars=True)
    coded = coded_tensors(model, state)
    given = {id(state[key]): value for key, value in tensors.items() if key in state}
    found = {id(value): value for value in state.values() if id(value) in coded} | given
    _expect(path, model, "key", tensors, [k for k, value in state.items() if k in tensors or id(value) not in found])
    for key in tensors:
        there, here = type_name(tensors[key]), type_name(state[key])
        if there != here:
            raise ConfigError(f"{path}: {key} is {there} in the file, {here} in the model; use model.to(torch.{there})")
    try:
        model.load_state_dict({key: found[id(value)] for key, value in state.items()})
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path} holds another model: {reason}") from error


def _expect(
    path: str | os.PathLike[str], model: nn.Module, what: str, there: Collection[str], here: Collection[str]
) -> None:
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
            f"{path} holds another model than this {type(model).__name__}: {'; '.join(problems)}. Build it as it was "
            "for saving"
        )
