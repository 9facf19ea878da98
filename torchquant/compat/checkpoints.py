"""Load checkpoints of other libraries into a quantized model, strictly, with a map of where every key went.

Supported are float checkpoints (torchvision, timm, any other), our own, those of the published torchquant's fused
models, AutoQNN's state dicts, and NNI's exported model with its calibration config; the last two can be written too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchquant._files import write_whole
from torchquant._registry import did_you_mean
from torchquant._shown import some
from torchquant._tables import ShownAsTables, text_table
from torchquant.compat.autoqnn.checkpoints import read_quantizer, written_quantizers
from torchquant.compat.nni.calibration import calibration_config, differences, restore_calibration
from torchquant.compat.nni.state_dicts import unwrapped
from torchquant.deploy.packed.reading import read_checkpoint
from torchquant.errors import ConfigError
from torchquant.models import FusedEfficientNet, FusedResNet
from torchquant.qmodule import float_state_dict
from torchquant.qmodule.fused_part import current_keys
from torchquant.utils import observe_any_weights

__all__ = ["KeyMap", "KeyMapRow", "load_checkpoint", "save_autoqnn", "save_nni"]

WRAPPINGS = ("module.", "_orig_mod.", "bound_model.")
"""Prefixes that DataParallel, torch.compile and NNI put before every key."""
ENVELOPES = ("state_dict", "model", "model_state_dict", "net")
_QUANTIZER_KEY = re.compile(r"(_quantizers?\.|_extra_state$|(weight|bias|act)_quant\.)")
_AUTOQNN_KEY = re.compile(r"(?:(.*)\.)?((?:weight|bias|act)_quant)\.(\w+)$")
_OBSERVER_KEY = re.compile(r"(.*_quantizer\.observer)\.(range_min|range_max|num_batches_observed)$")


@dataclass(frozen=True)
class KeyMapRow:
    """Where one tensor of a checkpoint went. `target` is "" for one that was not needed; `note` says why."""

    source: str
    target: str
    note: str


class KeyMap(ShownAsTables, list[KeyMapRow]):
    """A list of KeyMapRow that prints as a table."""

    def __str__(self) -> str:
        return text_table(["checkpoint", "model", "note"], ([r.source, r.target or "-", r.note] for r in self))


def load_checkpoint(
    model: nn.Module,
    checkpoint: str | os.PathLike[str] | Mapping[str, Any],
    calibration: str | os.PathLike[str] | Mapping[str, Mapping[str, Any]] | None = None,
) -> KeyMap:
    """Load a checkpoint of another library into a quantized (or float) model; all of it, or nothing.

    `checkpoint`: a state dict, or a file with one (torch's, or .safetensors). `calibration`: NNI's calibration config,
    or a file with it. All weights and batch norm statistics must be there and have the model's shapes. Quantizers take
    their numbers from the checkpoint if it has them; the others do not change, and weight ranges are observed again.

    Raises ConfigError that names what is missing, left over or of another shape; MissingDependencyError.

    >>> from torchquant import quantize
    >>> net = nn.Sequential(nn.Linear(2, 2))
    >>> model = quantize(net, "w8a8")
    >>> print(load_checkpoint(model, net.state_dict()))
    checkpoint  model     note
    ----------  --------  ----
    0.weight    0.weight
    0.bias      0.bias
    """
    state = plain_state(read_checkpoint(checkpoint) if isinstance(checkpoint, str | os.PathLike) else checkpoint)
    state, numbers_of_nni = unwrapped(state)
    calibration = numbers_of_nni or None if calibration is None else calibration
    own = model.state_dict()
    loaded: dict[str, Tensor] = {}
    key_map = KeyMap()
    places = _places(model, own)
    observers: dict[str, dict[str, Tensor]] = {}
    theirs: dict[tuple[str, str], dict[str, Tensor]] = {}
    unknown = []
    is_published = not any(key.endswith("observed_weight") for key in state)
    names = {key: _renamed(key, model) for key in state}
    current = current_keys(model, names.values())
    for key, value in state.items():
        name = current.get(names[key], names[key])
        observer = _OBSERVER_KEY.match(name)
        if observer and is_published:
            observers.setdefault(observer[1], {})[observer[2]] = value
        elif name in places:
            for target in places[name]:
                loaded[target] = value
                key_map.append(KeyMapRow(key, target, ""))
        elif match := _AUTOQNN_KEY.match(key):
            theirs.setdefault((match[1] or "", match[2]), {})[match[3]] = value
        else:
            unknown.append(key)
    for prefix, numbers in observers.items():
        _take_observer(prefix, numbers, own, loaded, key_map)
    quantizers = []
    for (path, slot), buffers in theirs.items():
        quantizers.append(read := read_quantizer(model, path, slot, buffers))
        loaded |= read.loaded
        prefix = f"{path}.{slot}".removeprefix(".")
        key_map += [KeyMapRow(f"{prefix}.{name}", *note) for name, note in read.notes.items() if name in buffers]
    needed = {key for key in own if not _QUANTIZER_KEY.search(key)}
    _check_complete(model, unknown, sorted(needed - loaded.keys()), loaded, own)
    model.load_state_dict({**own, **loaded}, strict=True)
    if not any(_QUANTIZER_KEY.search(key) for key in loaded) or theirs:
        observe_any_weights(model)
    for read in quantizers:
        read.set()
    if calibration is not None:
        config = read_checkpoint(calibration) if isinstance(calibration, str | os.PathLike) else calibration
        restore_calibration(model, config)
        other = differences(model, config)
        for path, entry in config.items():
            note = "; ".join(part for part in (", ".join(entry), other.get(path, "")) if part)
            key_map.append(KeyMapRow(f"calibration config: {path}", path, note))
    return key_map


def save_nni(
    model: nn.Module, model_path: str | os.PathLike[str], calibration_path: str | os.PathLike[str]
) -> dict[str, dict[str, Any]]:
    """Write a model that a plan or the NNI API made as NNI's export_model does; return the calibration config.

    The file holds the float weights under the keys of the float model; the config is that of NNI 2.x. Raises
    ConfigError for a model that was not made from a float one.
    """
    inner = getattr(model, "bound_model", model)
    state = {key: value.detach().clone() for key, value in float_state_dict(inner).items()}
    config = calibration_config(inner)
    write_whole(Path(model_path), lambda temporary: torch.save(state, temporary))
    write_whole(Path(calibration_path), lambda temporary: torch.save(config, temporary))
    return config


def save_autoqnn(model: nn.Module, path: str | os.PathLike[str]) -> KeyMap:
    """Write a model that AutoQNN's `convert` made, here, as a state dict that AutoQNN loads; return what is where.

    The notes of the map say where AutoQNN will compute something else, and why. Raises ConfigError for layers and
    quantizers that AutoQNN does not have.
    """
    floats = {key: value.detach().clone() for key, value in float_state_dict(model).items()}
    quantizers = written_quantizers(model)
    write_whole(
        Path(path), lambda file: torch.save(floats | {key: value for key, (value, _) in quantizers.items()}, file)
    )
    rows = [KeyMapRow(key, key, "") for key in floats]
    return KeyMap([*rows, *(KeyMapRow("", key, note) for key, (_, note) in quantizers.items())])


def plain_state(state: Any) -> dict[str, Tensor]:
    """Extract the tensors of a state dict, without enclosing dictionaries and prefixes of wrappers."""
    for name in ENVELOPES:
        if isinstance(state, Mapping) and isinstance(state.get(name), Mapping):
            state = state[name]
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        kind = type(state).__name__
        raise ConfigError(f"a checkpoint must be a state dict of names and tensors, got {kind}")
    state = dict(state)
    while found := next((p for p in WRAPPINGS if all(key.startswith(p) for key in state)), None):
        state = {key.removeprefix(found): value for key, value in state.items()}
    return state


def _places(model: nn.Module, own: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Return key in a checkpoint, of the model or the float model -> keys in the model."""
    places = {key: [key] for key in own}
    for float_key, key in getattr(model, "float_keys", []):
        if float_key not in own:
            places.setdefault(float_key, []).append(key)
    return places


def _renamed(key: str, model: nn.Module) -> str:
    """Translate a key of a published fused model to ours."""
    if isinstance(model, FusedResNet):
        return re.sub(r"^(layer\d\.\d+)\.fused(\d)\.", lambda m: f"{m[1]}.body.{int(m[2]) - 1}.", key)
    match = re.match(r"^blocks\.(\d+)\.(\w+)\.(.*)", key)
    if isinstance(model, FusedEfficientNet) and match:
        block: Any = model.blocks[int(match[1])]
        n_layers = len(block.body)
        has_se = type(block.body[-2]).__name__ == "FusedSqueezeExcitation"
        names = ["expand_conv", "depthwise_conv", "se", "project_conv"]
        names = [n for n in names if n != "se" or has_se][-n_layers:]
        inside = {name: f"body.{i}" for i, name in enumerate(names)}
        if has_se:
            parts = ("adaptive_pool", "se_reduce", "se_expand", "excitation")
            inside |= {part: f"{inside['se']}.{part}" for part in parts}
        if match[2] in inside:
            return f"blocks.{match[1]}.{inside[match[2]]}.{match[3]}"
    return key


def _take_observer(
    prefix: str,
    numbers: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    loaded: dict[str, Tensor],
    key_map: KeyMap,
) -> None:
    """Take the ranges of a published observer, which stores averages without bias correction."""
    if f"{prefix}.range_min" not in own:
        key_map += [KeyMapRow(f"{prefix}.{name}", "", "there is no observer here") for name in numbers]
        return
    count = numbers.get("num_batches_observed")
    if count is not None and float(count) == 0 or "range_min" not in numbers:
        key_map += [KeyMapRow(f"{prefix}.{name}", "", "it has seen no data") for name in numbers]
        return
    correction = 1.0 if count is None else 1.0 - 0.9 ** float(count)  # the published momentum
    for name in ("range_min", "range_max"):
        loaded[f"{prefix}.{name}"] = numbers[name].to(own[f"{prefix}.{name}"].dtype) / correction
        note = "" if count is None else f"divided by 1 - 0.9 ** {int(count)}"
        key_map.append(KeyMapRow(f"{prefix}.{name}", f"{prefix}.{name}", note))
    weight = own[f"{prefix}.observed_weight"]
    loaded[f"{prefix}.observed_weight"] = torch.full_like(weight, correction)
    if count is not None:
        key_map.append(KeyMapRow(f"{prefix}.num_batches_observed", f"{prefix}.observed_weight", "1 - 0.9 ** n"))


def _check_complete(
    model: nn.Module,
    unknown: list[str],
    missing: list[str],
    loaded: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
) -> None:
    problems = []
    if unknown:
        hint = did_you_mean(unknown[0], own)
        problems.append(f"it has {some(unknown, 3)} too much{hint and f';{hint}'}")
    if missing:
        problems.append(f"it lacks {some(missing, 3)}")
    wrong = [k for k, v in loaded.items() if v.shape != own[k].shape and not _QUANTIZER_KEY.search(k)]
    if wrong:
        key = wrong[0]
        problems.append(f"{key} has shape {tuple(loaded[key].shape)} there and {tuple(own[key].shape)} here")
    if problems:
        raise ConfigError(f"the checkpoint does not fit this {type(model).__name__}: {'; '.join(problems)}")
