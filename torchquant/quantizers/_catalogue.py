"""The registered schemes as data, for the command line, the documentation and comparisons."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from torchquant._arguments import checked
from torchquant.errors import ConfigError
from torchquant.quantizers._base import GridQuantizer, Quantizer
from torchquant.quantizers._spec import find_scheme, make_quantizer, schemes, takes_observer

GRANULARITIES = ("tensor", "channel", "in_channel", "group", "block")
"""The granularities of schemes that take numbers for each slice of an axis."""


@dataclass(frozen=True)
class SchemeEntry:
    """One row of the catalogue. All fields are text, ready to print; `presets` are further names."""

    name: str
    presets: tuple[str, ...]
    summary: str
    formula: str
    paper: str
    bits: str
    granularity: tuple[str, ...]
    gradients: tuple[str, ...]
    arguments: tuple[str, ...]
    export: tuple[str, ...]


def catalogue() -> list[SchemeEntry]:
    """List every registered scheme, yours included, by name.

    >>> [entry.name for entry in catalogue() if "twn" in entry.presets]
    ['ternary']
    """
    return [_entry(name, cls) for name, cls in schemes()]


@checked
def scheme_entry(name: str) -> SchemeEntry:
    """Return the entry of a scheme, or of the scheme that a preset belongs to. Raises UnknownNameError."""
    cls, _ = find_scheme(name)
    return next(entry for entry in catalogue() if find_scheme(entry.name)[0] is cls)


@checked
def weight_spec(name: str, n_bits: int) -> str | None:
    """Return the typical spec string of a scheme or preset for weights of that width; None if it has none.

    Raises UnknownNameError.

    >>> weight_spec("esb", 4), weight_spec("ternary", 2), weight_spec("ternary", 3)
    ('esb:4,k=1/channel', 'ternary:2/channel', None)
    """
    cls, _ = find_scheme(name)
    text = cls.typical.format(name=name, n=n_bits, k=max(n_bits - 3, 0))
    for candidate in (text, text.partition("/")[0]):
        try:
            make_quantizer(candidate)
        except ConfigError:
            continue
        return candidate
    return None


def _entry(name: str, cls: type[Quantizer]) -> SchemeEntry:
    parameters = inspect.signature(cls).parameters
    long_names = {long: short for short, long in cls.short_names.items()}
    arguments = []
    for parameter in parameters.values():
        if parameter.name not in ("n_bits", "axis", "range_observer", "gradient_clip"):
            default = "" if parameter.default is parameter.empty else f"={parameter.default}"
            arguments.append(long_names.get(parameter.name, parameter.name) + default)
    if takes_observer(cls):
        arguments.append("observer")
    per_channel = "axis" in parameters or "range_observer" in parameters
    return SchemeEntry(
        name=name,
        presets=tuple(sorted(cls.presets)),
        summary=(inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " "),
        formula=cls.about.formula,
        paper=cls.about.paper,
        bits=cls.about.bits,
        granularity=cls.about.granularity or (GRANULARITIES if per_channel else ("tensor",)),
        gradients=cls.gradients() if issubclass(cls, GridQuantizer) else ("ste",),
        arguments=tuple(arguments),
        export=_export_forms(cls),
    )


def _export_forms(cls: type[Quantizer]) -> tuple[str, ...]:
    forms = []
    if cls.is_uniform:
        forms.append("ONNX QDQ to 8 bits")
    if cls.encode is not Quantizer.encode:
        forms.append("codes")
    return tuple(forms)
