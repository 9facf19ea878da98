"""The settings of NNI's `config_list`, and how its 2.x spelling is read (docs/algorithms.md D4).

`op_types`, `op_names` (both: intersection), `quant_types`, `quant_bits`, `quant_dtype`, `quant_scheme`,
`quant_start_step`, `exclude`; the last entry that matches a module replaces all before it.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torchquant._registry import did_you_mean
from torchquant._shown import shown
from torchquant.errors import ConfigError
from torchquant.graph import Site

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
LISTS = (
    *("op_types", "op_names", "op_names_re", "exclude_op_types", "exclude_op_names", "exclude_op_names_re"),
    *("quant_types", "target_names"),
)
"""Keys that take a list of strings."""

_defaults: dict[str, tuple[str, str]] = {}


def set_quant_scheme_dtype(quant_type: str, quant_scheme: str | None = None, quant_dtype: str | None = None) -> None:
    """Set the default scheme and dtype of "input", "weight" or "output" for config lists that are read from now on.

    The initial defaults are per_tensor_affine and uint; `reset_quant_scheme_dtype` restores them. Raises ConfigError.
    """
    one_of("quant_type", quant_type, QUANT_TYPES)
    scheme, dtype = _defaults.get(quant_type, (SCHEMES[0], "uint"))
    scheme, dtype = quant_scheme or scheme, quant_dtype or dtype
    one_of("quant_scheme", scheme, SCHEMES)
    one_of("quant_dtype", dtype, DTYPES)
    _defaults[quant_type] = (scheme, dtype)


def reset_quant_scheme_dtype() -> None:
    """Restore the initial defaults of `set_quant_scheme_dtype`."""
    _defaults.clear()


@dataclass(frozen=True)
class Target:
    """The settings for one tensor of a module.

    `ending`: the granularity in a spec string, "" for the whole tensor. `gradient`: "ste" or "clipped", "" for the one
    of the quantizer. `text`: the quant_dtype as it is written in the spelling of 3.0, "" in that of 2.x.
    """

    n_bits: int
    dtype: str = "uint"
    symmetric: bool = False
    ending: str = ""
    gradient: str = ""
    text: str = field(default="", compare=False)

    @property
    def grid(self) -> str:
        """The value of `symmetric` of the affine quantizer with these codes."""
        if self.dtype == "int":
            return "narrow" if self.symmetric else "asymmetric-narrow"
        return "torch" if self.symmetric else "false"


@dataclass(frozen=True)
class LayerConfig:
    """The settings of a config list for one module: slot, or name of another target -> Target."""

    targets: Mapping[str, Target]
    start_step: int = 0


def check_lists(where: str, entry: Mapping[str, Any]) -> None:
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


def one_of(name: str, value: Any, allowed: Iterable[str]) -> None:
    """Raise ConfigError for a value that is not allowed."""
    allowed = list(allowed)
    if value not in allowed:
        hint = did_you_mean(str(value), allowed)
        raise ConfigError(f"{name}: got {shown(value)};{hint} Allowed: {', '.join(allowed)}")


def check_known(where: str, key: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Warn of each name that the model does not have."""
    known = sorted(set(known))
    for name in names:
        if name not in known:
            hint = did_you_mean(name, known)
            warnings.warn(f"{where}: {key} '{name}' is not in the model{hint and ';' + hint}", stacklevel=4)


def types_of(entry: Mapping[str, Any], key: str = "op_types") -> set[str] | None:
    """Return the classes that an entry lists, None if it lists none."""
    if key not in entry:
        return None
    return {kind for name in entry[key] for kind in (DEFAULT_OP_TYPES if name == "default" else (name,))}


def read_2(config_list: list[dict[str, Any]], sites: Sequence[Site]) -> dict[str, LayerConfig]:
    """Read a config list of 2.x: path -> settings. Raises ConfigError that names the entry."""
    checked = []
    for i, entry in enumerate(config_list):
        where = f"config_list[{i}]"
        for key in entry:
            one_of(f"{where}, key", key, KEYS)
        if "op_types" not in entry and "op_names" not in entry:
            raise ConfigError(f"{where} needs op_types, op_names or both")
        check_known(where, "op_names", entry.get("op_names", ()), [site.path for site in sites])
        written = [t for t in entry.get("op_types", ()) if t != "default"]
        check_known(where, "op_types", written, [*(s.types[-1] for s in sites), *DEFAULT_OP_TYPES])
        checked.append((types_of(entry), entry.get("op_names"), _layer_2(where, entry)))
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
        one_of(f"{where}, quant_types", name, QUANT_TYPES)
    start = entry.get("quant_start_step", 0)
    if type(start) is not int or start < 0:
        raise ConfigError(f"{where}: quant_start_step must be a whole number of at least 0, got {shown(start)}")
    targets = {}
    for name in entry["quant_types"]:
        scheme, dtype = _defaults.get(name, (SCHEMES[0], "uint"))
        scheme = _per_type(where, entry, "quant_scheme", name, scheme)
        dtype = _per_type(where, entry, "quant_dtype", name, dtype)
        bits = _per_type(where, entry, "quant_bits", name, None)
        one_of(f"{where}, quant_scheme", scheme, SCHEMES)
        one_of(f"{where}, quant_dtype", dtype, DTYPES)
        if type(bits) is not int or not 0 < bits < 32:
            raise ConfigError(f"{where}: quant_bits of {name} must be a whole number from 1 to 31, got {shown(bits)}")
        targets[name] = Target(bits, dtype, scheme.endswith("symmetric"), "/channel" if "channel" in scheme else "")
    return LayerConfig(targets, start)


def _per_type(where: str, entry: Mapping[str, Any], key: str, name: str, default: Any) -> Any:
    value = entry.get(key, default)
    if not isinstance(value, Mapping):
        return value
    if name not in value and default is None:
        raise ConfigError(f"{where}: {key} must have a value for '{name}', which is in quant_types")
    return value.get(name, default)
