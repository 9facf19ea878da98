"""Compile NNI's `config_list`, in both spellings, to a QuantPlan (docs/algorithms.md D4).

2.x: `op_types`, `op_names` (both: intersection), `quant_types`, `quant_bits`, `quant_dtype`, `quant_scheme`,
`quant_start_step`, `exclude`; the last entry that matches a module replaces all before it.
3.0: `op_types`, `op_names`, `op_names_re`, `exclude_*`, `target_names`, `target_settings`, `quant_dtype` ("int8"),
`quant_scheme`, `granularity`; a target that is configured twice keeps the first setting. `fuse_names` folds batch
norms, all of them.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from torchquant._registry import did_you_mean
from torchquant._shown import shown
from torchquant.errors import ConfigError
from torchquant.graph import Site, SitePlan, capture
from torchquant.plan import QuantPlan
from torchquant.plan.quant_plan import what_is_at

DEFAULT_OP_TYPES = (
    *("Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d", "Linear", "Bilinear"),
    *("PReLU", "Embedding", "EmbeddingBag"),
)
"""Layer types that "default" means in `op_types`."""
QUANT_TYPES = ("input", "weight", "output")
SCHEMES = tuple(f"per_{part}_{kind}" for part in ("tensor", "channel") for kind in ("affine", "symmetric"))
DTYPES = ("int", "uint")
KEYS = (
    *("op_types", "op_names", "exclude", "quant_types", "quant_bits", "quant_dtype", "quant_scheme"),
    "quant_start_step",
)
KEYS_3 = (
    *("op_types", "op_names", "op_names_re", "exclude_op_types", "exclude_op_names", "exclude_op_names_re"),
    *("target_names", "target_settings", "quant_dtype", "quant_scheme", "granularity", "fuse_names"),
)
LISTS = (
    *("op_types", "op_names", "op_names_re", "exclude_op_types", "exclude_op_names", "exclude_op_names_re"),
    *("quant_types", "target_names"),
)
"""Keys that take a list of strings."""
TARGETS_3 = {"_input_": "input", "weight": "weight", "bias": "bias", "_output_": "output"}
GRANULARITIES = ("default", "out_channel", "in_channel", "per_channel")

_defaults: dict[str, tuple[str, str]] = {}


def set_quant_scheme_dtype(quant_type: str, quant_scheme: str | None = None, quant_dtype: str | None = None) -> None:
    """Set the default scheme and dtype of "input", "weight" or "output" for config lists that are read from now on.

    The initial defaults are per_tensor_affine and uint; `reset_quant_scheme_dtype` restores them. Raises ConfigError.
    """
    _one_of("quant_type", quant_type, QUANT_TYPES)
    scheme, dtype = _defaults.get(quant_type, (SCHEMES[0], "uint"))
    scheme, dtype = quant_scheme or scheme, quant_dtype or dtype
    _one_of("quant_scheme", scheme, SCHEMES)
    _one_of("quant_dtype", dtype, DTYPES)
    _defaults[quant_type] = (scheme, dtype)


def reset_quant_scheme_dtype() -> None:
    """Restore the initial defaults of `set_quant_scheme_dtype`."""
    _defaults.clear()


@dataclass(frozen=True)
class Target:
    """The settings for one tensor of a module."""

    n_bits: int
    dtype: str = "uint"
    symmetric: bool = False
    per_channel: bool = False

    @property
    def grid(self) -> str:
        """The value of `symmetric` of the affine quantizer with these codes."""
        if self.dtype == "int":
            return "narrow" if self.symmetric else "asymmetric-narrow"
        return "torch" if self.symmetric else "false"

    @property
    def scheme(self) -> str:
        """NNI's name for scheme and granularity."""
        return SCHEMES[2 * self.per_channel + self.symmetric]


@dataclass(frozen=True)
class LayerConfig:
    """The settings of a config list for one module: "weight", "input", "output", "bias" -> Target."""

    targets: Mapping[str, Target]
    start_step: int = 0


@dataclass(frozen=True)
class Compiled:
    """A config list as a plan, with the settings that a plan cannot express."""

    plan: QuantPlan
    layers: dict[str, LayerConfig] = field(default_factory=dict)


MakeSpec = Callable[[str, Target], "str | None"]


def compile_config(
    model: nn.Module, config_list: Sequence[Mapping[str, Any]], spec: MakeSpec, fuse_bn: bool = False
) -> Compiled:
    """Compile a config list to a plan for a model; `spec(site, target)` returns the spec of a tensor's quantizer.

    Each module is a site of its own, as in NNI. Unknown names and types warn, as in NNI; any other error raises
    ConfigError.
    """
    if not isinstance(config_list, Sequence) or isinstance(config_list, str):
        raise ConfigError(f"config_list must be a list of dictionaries, got {shown(config_list)}")
    for i, entry in enumerate(config_list):
        if not isinstance(entry, Mapping):
            raise ConfigError(f"config_list[{i}] must be a dictionary, got {shown(entry)}")
        _check_lists(f"config_list[{i}]", entry)
    fuse = "bn" if fuse_bn or any("fuse_names" in entry for entry in config_list) else False
    captured = capture(model, trace="modules", fuse=fuse)
    modern = [_is_3(entry) for entry in config_list]
    if any(modern) and not all(_is_3(entry) or "quant_types" not in entry for entry in config_list):
        raise ConfigError(
            "config_list mixes the spelling of NNI 2.x (quant_types) and of NNI 3.0 (target_names); use one of them"
        )
    read = _read_3 if any(modern) else _read_2
    found = read([dict(entry) for entry in config_list], captured.sites)
    plans = []
    for site in captured.sites:
        config = found.get(site.path)
        if config is None:
            continue
        missing = set(config.targets) - set(site.fields)
        if missing:
            raise ConfigError(
                f"module '{site.path}' ({site.types[-1]}) has no {', '.join(sorted(missing))} to quantize; it has "
                f"{', '.join(site.fields)}"
            )
        specs = {name: spec(name, target) for name, target in config.targets.items()}
        plans.append(SitePlan(site.path, **specs, fold_bn="running" if site.fused else False))
    plan = QuantPlan(tuple(plans), captured.floats, "modules", fuse, {s.path: what_is_at(s) for s in captured.sites})
    return Compiled(plan, found)


def _check_lists(where: str, entry: Mapping[str, Any]) -> None:
    """Raise ConfigError for a key that needs a list of strings and has something else, such as a single string."""
    for key in LISTS:
        names = entry.get(key, ())
        is_list = isinstance(names, list | tuple | set | frozenset)
        if not is_list or not all(isinstance(name, str) for name in names):
            example = f"; write [{shown(names)}]" if isinstance(names, str) else ""
            raise ConfigError(f"{where}: {key} must be a list of strings, got {shown(names)}{example}")
        for pattern in names if key.endswith("_re") else ():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"{where}: {key} has {shown(pattern)}, not a regular expression: {error}") from error
    settings = entry.get("target_settings", {})
    if not isinstance(settings, Mapping) or not all(isinstance(setting, Mapping) for setting in settings.values()):
        raise ConfigError(f"{where}: target_settings must be a dictionary of dictionaries, got {shown(settings)}")


def _one_of(name: str, value: Any, allowed: Iterable[str]) -> None:
    allowed = list(allowed)
    if value not in allowed:
        hint = did_you_mean(str(value), allowed)
        raise ConfigError(f"{name}: got {shown(value)};{hint} Allowed: {', '.join(allowed)}")


def _is_3(entry: Mapping[str, Any]) -> bool:
    own = set(KEYS_3) - set(KEYS)
    return bool(own & entry.keys()) or bool(re.fullmatch(r"u?int\d+", str(entry.get("quant_dtype", ""))))


def _check_known(where: str, key: str, names: Iterable[str], known: Iterable[str]) -> None:
    known = sorted(set(known))
    for name in names:
        if name not in known:
            hint = did_you_mean(name, known)
            warnings.warn(f"{where}: {key} '{name}' is not in the model{hint and ';' + hint}", stacklevel=4)


def _types_of(entry: Mapping[str, Any], key: str = "op_types") -> set[str] | None:
    if key not in entry:
        return None
    return {kind for name in entry[key] for kind in (DEFAULT_OP_TYPES if name == "default" else (name,))}


def _read_2(config_list: list[dict[str, Any]], sites: Sequence[Site]) -> dict[str, LayerConfig]:
    checked = []
    for i, entry in enumerate(config_list):
        where = f"config_list[{i}]"
        for key in entry:
            _one_of(f"{where}, key", key, KEYS)
        if "op_types" not in entry and "op_names" not in entry:
            raise ConfigError(f"{where} needs op_types, op_names or both")
        _check_known(where, "op_names", entry.get("op_names", ()), [site.path for site in sites])
        written = [t for t in entry.get("op_types", ()) if t != "default"]
        _check_known(where, "op_types", written, [*(s.types[-1] for s in sites), *DEFAULT_OP_TYPES])
        checked.append((_types_of(entry), entry.get("op_names"), _layer_2(where, entry)))
    found: dict[str, LayerConfig] = {}
    for site in sites:
        for types, names, config in checked:
            if (types is None or site.types[-1] in types) and (names is None or site.path in names):
                if config is None:
                    found.pop(site.path, None)
                else:
                    found[site.path] = config
    return found


def _layer_2(where: str, entry: Mapping[str, Any]) -> LayerConfig | None:
    """Read the settings of a 2.x entry for a module; None for an excluded one."""
    exclude = entry.get("exclude", False)
    if not isinstance(exclude, bool):
        raise ConfigError(f"{where}: exclude must be True or False, got {shown(exclude)}")
    if exclude:
        return None
    for key in ("quant_types", "quant_bits"):
        if key not in entry:
            raise ConfigError(f"{where} needs {key}, or exclude: True")
    for name in entry["quant_types"]:
        _one_of(f"{where}, quant_types", name, QUANT_TYPES)
    start = entry.get("quant_start_step", 0)
    if type(start) is not int or start < 0:
        raise ConfigError(f"{where}: quant_start_step must be a whole number of at least 0, got {shown(start)}")
    targets = {}
    for name in entry["quant_types"]:
        scheme, dtype = _defaults.get(name, (SCHEMES[0], "uint"))
        scheme = _per_type(where, entry, "quant_scheme", name, scheme)
        dtype = _per_type(where, entry, "quant_dtype", name, dtype)
        bits = _per_type(where, entry, "quant_bits", name, None)
        _one_of(f"{where}, quant_scheme", scheme, SCHEMES)
        _one_of(f"{where}, quant_dtype", dtype, DTYPES)
        if type(bits) is not int or not 0 < bits < 32:
            raise ConfigError(f"{where}: quant_bits of {name} must be a whole number from 1 to 31, got {shown(bits)}")
        targets[name] = Target(bits, dtype, scheme.endswith("symmetric"), "channel" in scheme)
    return LayerConfig(targets, start)


def _per_type(where: str, entry: Mapping[str, Any], key: str, name: str, default: Any) -> Any:
    value = entry.get(key, default)
    if not isinstance(value, Mapping):
        return value
    if name not in value and default is None:
        raise ConfigError(f"{where}: {key} must have a value for '{name}', which is in quant_types")
    return value.get(name, default)


def _read_3(config_list: list[dict[str, Any]], sites: Sequence[Site]) -> dict[str, LayerConfig]:
    found: dict[str, dict[str, Target]] = {}
    for i, entry in enumerate(config_list):
        where = f"config_list[{i}]"
        for key in entry:
            _one_of(f"{where}, key", key, KEYS_3)
        _check_known(where, "op_names", entry.get("op_names", ()), [site.path for site in sites])
        targets = _targets_3(where, entry)
        for site in sites:
            if _selected_3(entry, site):
                for name, target in targets.items():
                    if name in site.fields:
                        found.setdefault(site.path, {}).setdefault(name, target)
    return {path: LayerConfig(targets) for path, targets in found.items()}


def _selected_3(entry: Mapping[str, Any], site: Site) -> bool:
    def named(prefix: str) -> bool:
        by_name = site.path in entry.get(f"{prefix}op_names", ())
        return by_name or any(re.match(pattern, site.path) for pattern in entry.get(f"{prefix}op_names_re", ()))

    types, excluded = _types_of(entry), _types_of(entry, "exclude_op_types") or set()
    if (types is not None and site.types[-1] not in types) or site.types[-1] in excluded or named("exclude_"):
        return False
    by_name = "op_names" in entry or "op_names_re" in entry
    return named("") if by_name else types is not None


def _targets_3(where: str, entry: Mapping[str, Any]) -> dict[str, Target]:
    shared = {key: entry[key] for key in ("quant_dtype", "quant_scheme", "granularity") if key in entry}
    settings = entry.get("target_settings", {})
    names = entry.get("target_names") or list(settings) or ["_input_", "weight", "_output_"]
    targets = {}
    for name in names:
        _one_of(f"{where}, target_names", name, TARGETS_3)
        setting = {**shared, **settings.get(name, {})}
        text = str(setting.get("quant_dtype") or "int8")
        match = re.fullmatch(r"(u?int)(\d+)", text)
        if match is None or not 0 < len(match[2]) < 3 or not 0 < int(match[2]) < 32:
            raise ConfigError(
                f"{where}: quant_dtype must be intN or uintN with N from 1 to 31, such as 'int8', got {shown(text)}"
            )
        scheme, granularity = setting.get("quant_scheme") or "symmetric", setting.get("granularity") or "default"
        _one_of(f"{where}, quant_scheme", scheme, ("affine", "symmetric"))
        if granularity not in GRANULARITIES:
            raise ConfigError(
                f"{where}: granularity must be one of {', '.join(GRANULARITIES)}, got {shown(granularity)}"
            )
        wanted = {"weight": "out_channel", "bias": "out_channel"}.get(name, "per_channel")
        is_channel = granularity != "default"
        if is_channel and granularity not in (
            wanted,
            "per_channel",
            "in_channel" if wanted == "per_channel" else wanted,
        ):
            raise ConfigError(f"{where}: granularity of {name} must be default or {wanted}, got {shown(granularity)}")
        targets[TARGETS_3[name]] = Target(int(match[2]), match[1], scheme == "symmetric", is_channel)
    return targets
