"""How the spelling of NNI 3.0 of a `config_list` is read (docs/algorithms.md D4).

Modules: `op_types`, `op_names`, `op_names_re`, `exclude_*`. Tensors: `target_names`, among them `_input_`, `_input_1`,
`_input_query`, `_output_`, `_output_1`, `_output_logits`, `weight`, `bias` and any parameter or buffer by its name;
`target_settings`, `quant_dtype` ("int8"), `quant_scheme`, `granularity`, `apply_method`. A target that is configured
twice keeps the first setting. `fuse_names`: a layer, its batch norm and, if there is one, its activation.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from torchquant._registry import did_you_mean
from torchquant._shown import shown, some
from torchquant.compat.nni.config import LayerConfig, Target, check_known, one_of, types_of
from torchquant.compat.nni.granularity import spec_ending
from torchquant.compat.nni.named_targets import INPUT, OUTPUT, argument_names
from torchquant.errors import ConfigError
from torchquant.graph import Site
from torchquant.qmodule.weight_slots import n_values
from torchquant.qmodule.weights import weight_names

MODULE_KEYS = (*("op_types", "op_names", "op_names_re", "exclude_op_types", "exclude_op_names", "exclude_op_names_re"),)
SETTINGS = ("quant_dtype", "quant_scheme", "granularity", "apply_method")
KEYS_3 = (*MODULE_KEYS, *SETTINGS, "target_names", "target_settings", "fuse_names")
METHODS = {"clamp_round": "ste", "qat_clamp_round": "clipped", "bypass": ""}
"""Values of `apply_method` -> the gradient; "" leaves the tensor as it is."""


def is_3(entry: Mapping[str, Any]) -> bool:
    """Tell whether an entry is written in the spelling of 3.0."""
    own = {*KEYS_3} - {"op_types", "op_names", "quant_dtype", "quant_scheme"}
    return bool(own & entry.keys()) or bool(re.fullmatch(r"u?int\d+", str(entry.get("quant_dtype", ""))))


@dataclass
class Read3:
    """The settings of a config list of 3.0: path -> settings, and layer -> what is fused into it."""

    layers: dict[str, LayerConfig] = field(default_factory=dict)
    fused: dict[str, tuple[tuple[str, str], ...]] = field(default_factory=dict)


def read_3(config_list: list[dict[str, Any]], model: nn.Module, sites: Iterable[Site]) -> Read3:
    """Read a config list for a model. Raises ConfigError that names the entry."""
    modules = dict(model.named_modules(remove_duplicate=False))
    by_path = {site.path: site for site in sites}
    found: dict[str, dict[str, Target]] = {}
    read = Read3()
    for i, entry in enumerate(config_list):
        where = f"config_list[{i}]"
        for key in entry:
            one_of(f"{where}, key", key, KEYS_3)
        if not {"op_types", "op_names", "op_names_re"} & entry.keys():
            raise ConfigError(f"{where} needs op_types, op_names or op_names_re")
        check_known(where, "op_names", entry.get("op_names", ()), modules)
        selected = {path: module for path, module in modules.items() if path and _selects(entry, path, module)}
        if not selected and all(name in modules for name in entry.get("op_names", ())):
            warnings.warn(f"{where} selects no module of the model; {_selection(entry)}", stacklevel=5)
        settings = _settings(where, entry)
        for path, module in selected.items():
            place = _Place(where, path, module, by_path.get(path))
            targets = found.setdefault(path, {})
            for name, target in place.targets(entry, settings).items():
                targets.setdefault(name, target)
        read.fused.update(_fused(where, entry, modules, by_path))
    read.layers = {path: LayerConfig(targets) for path, targets in found.items() if targets}
    return read


def _selection(entry: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {shown(entry[key])}" for key in MODULE_KEYS if key in entry)


def _selects(entry: Mapping[str, Any], path: str, module: nn.Module) -> bool:
    def named(prefix: str) -> bool:
        by_name = path in entry.get(f"{prefix}op_names", ())
        return by_name or any(re.match(pattern, path) for pattern in entry.get(f"{prefix}op_names_re", ()))

    kind, types, excluded = type(module).__name__, types_of(entry), types_of(entry, "exclude_op_types") or set()
    if (types is not None and kind not in types) or kind in excluded or named("exclude_"):
        return False
    by_name = "op_names" in entry or "op_names_re" in entry
    return named("") if by_name else types is not None


def _settings(where: str, entry: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return target -> its settings; at "" those of a target without its own."""
    shared = {key: entry[key] for key in SETTINGS if key in entry}
    given = {_canonical(name): setting for name, setting in entry.get("target_settings", {}).items()}
    settings = {"": shared, **{name: {**shared, **setting} for name, setting in given.items()}}
    for name, setting in settings.items():
        place = f"{where}, target_settings of '{name}'" if name else where
        for key in setting:
            one_of(f"{place}, key", key, SETTINGS)
        one_of(f"{place}, quant_scheme", setting.get("quant_scheme") or "symmetric", ("affine", "symmetric"))
        one_of(f"{place}, apply_method", setting.get("apply_method") or "clamp_round", METHODS)
        _dtype(place, setting)
    return settings


def _dtype(where: str, setting: Mapping[str, Any]) -> tuple[str, int]:
    """Read "int8" or "uint4"; None, which NNI allows, is int8."""
    text = str(setting.get("quant_dtype") or "int8")
    match = re.fullmatch(r"(u?int)(\d+)", text)
    if match is None or not 0 < len(match[2]) < 3 or not 0 < int(match[2]) < 32:
        raise ConfigError(
            f"{where}: quant_dtype must be intN or uintN with N from 1 to 31, such as 'int8', got {shown(text)}"
        )
    return match[1], int(match[2])


def _canonical(name: str) -> str:
    return f"{name}0" if name in (INPUT, OUTPUT) else name


@dataclass(frozen=True)
class _Place:
    """A module that an entry selects."""

    where: str
    path: str
    module: nn.Module
    site: Site | None

    def targets(self, entry: Mapping[str, Any], settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Target]:
        names = list(entry.get("target_names") or [n for n in settings if n])
        found: dict[str, Target] = {}
        for name in names or self._usual():
            slot = self._slot(name)
            setting = settings.get(_canonical(name), settings[""])
            if slot is None or METHODS[setting.get("apply_method") or "clamp_round"] == "":
                if slot is not None:
                    warnings.warn(f"'{name}' of '{self.path}' stays float: its apply_method is bypass", stacklevel=6)
                continue
            target = self._target(name, setting)
            if found.setdefault(slot, target) != target:
                raise ConfigError(
                    f"{self.where}: all inputs of '{self.path}' ({type(self.module).__name__}) share one range; give "
                    f"'{name}' the settings of its other inputs"
                )
        return found

    def _usual(self) -> list[str]:
        """Return the targets that are meant where none are named: all that the module has."""
        own = [name for name in ("weight", "bias") if isinstance(getattr(self.module, name, None), torch.Tensor)]
        return [INPUT, *own, OUTPUT]

    def _slot(self, name: str) -> str | None:
        """Return the slot of the module for a target, the target itself if it is none, or None if nothing is there."""
        fields = () if self.site is None else self.site.fields
        if name in (INPUT, OUTPUT):
            slot = name.strip("_")
            return slot if slot in fields else f"{name}0"
        if name.startswith(INPUT):
            key, names = name.removeprefix(INPUT), argument_names(self.module)
            is_many = {"args", "kwargs"} & {*names}
            if not key.isdigit() and key not in names and not is_many:
                raise self._missing(name, f"its arguments are {', '.join(names)}")
            index = int(key) if key.isdigit() else names.index(key) if key in names else len(names)
            has_slot = "input" in fields and index < n_values(self.module)
            return "input" if has_slot else name
        if name.startswith(OUTPUT):
            return "output" if name == f"{OUTPUT}0" and "weight" in fields else name
        if (name in ("weight", "bias") and name in fields) or name in weight_names(self.module):
            return name
        return self._tensor(name)

    def _tensor(self, name: str) -> str | None:
        own = {**dict(self.module.named_parameters(recurse=False)), **dict(self.module.named_buffers(recurse=False))}
        if name in own:
            return name
        if name == "bias" and getattr(self.module, name, name) is None:
            warnings.warn(f"{self.where}: '{self.path}' has no bias to quantize", stacklevel=7)
            return None
        slots = (INPUT, OUTPUT, *own)
        hint = did_you_mean(name, slots).strip()
        targets = f"{some(slots, len(slots))}, '{INPUT}1', '{OUTPUT}1' and so on"
        raise self._missing(name, f"{hint} its targets are {targets}".strip())

    def _missing(self, name: str, rest: str) -> ConfigError:
        kind = type(self.module).__name__
        return ConfigError(f"{self.where}: '{self.path}' ({kind}) has no '{name}'; {rest}")

    def _target(self, name: str, setting: Mapping[str, Any]) -> Target:
        dtype, n_bits = _dtype(self.where, setting)
        tensor = None if name.startswith((INPUT, OUTPUT)) else getattr(self.module, name, None)
        ending = spec_ending(f"{self.where}, '{name}' of '{self.path}'", setting.get("granularity"), tensor)
        is_symmetric = (setting.get("quant_scheme") or "symmetric") == "symmetric"
        gradient = METHODS[setting["apply_method"]] if setting.get("apply_method") else ""
        return Target(n_bits, dtype, is_symmetric, ending, gradient, str(setting.get("quant_dtype")))


def _fused(
    where: str, entry: Mapping[str, Any], modules: Mapping[str, nn.Module], sites: Mapping[str, Site]
) -> dict[str, tuple[tuple[str, str], ...]]:
    """Read fuse_names: path of a layer -> (path, class) of what is fused into it."""
    given = entry.get("fuse_names", ())
    is_list = isinstance(given, list | tuple) and all(isinstance(each, list | tuple) for each in given)
    if not is_list or not all(len(each) > 1 and all(isinstance(name, str) for name in each) for each in given):
        raise ConfigError(
            f"{where}: fuse_names must be a list of tuples such as ('conv1', 'bn1'), with the layer first; got "
            f"{shown(given)}"
        )
    fused = {}
    for layer, *parts in given:
        unknown = [name for name in (layer, *parts) if name not in modules]
        if unknown:
            raise ConfigError(f"{where}, fuse_names: the model has no module '{unknown[0]}'")
        if layer not in sites or not sites[layer].is_layer:
            raise ConfigError(
                f"{where}, fuse_names: '{layer}' ({type(modules[layer]).__name__}) is no layer with a weight; name the "
                "convolution or linear layer first, then its batch norm and its activation"
            )
        fused[layer] = tuple((name, type(modules[name]).__name__) for name in parts)
    return fused
