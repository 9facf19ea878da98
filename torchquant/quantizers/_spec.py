"""Spec strings: one line of text that names a quantizer everywhere.

    scheme[:n_bits][,key=value|,flag ...][/tensor|/channel|/in_channel|/group=G|/block=AxB|/token][@gradient]

`QuantSpec` is the parsed form, `make_quantizer` builds the quantizer. Neither knows any scheme:
arguments are found by name in the signatures of the scheme and of its range observer.
"""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

from torchquant._arguments import checked
from torchquant._registry import did_you_mean
from torchquant._shown import shown
from torchquant.errors import ConfigError, UnknownNameError
from torchquant.quantizers._base import QUANTIZERS, SLOTS, GridQuantizer, Quantizer
from torchquant.quantizers._group import BlockwiseQuantizer, GroupQuantizer
from torchquant.quantizers._scaled import ScaledQuantizer
from torchquant.quantizers._token import TokenQuantizer
from torchquant.quantizers_functional._gradient import GRADIENTS, Gradient
from torchquant.quantizers_functional.block_grid import WHOLE
from torchquant.range_observers import OBSERVERS, RangeObserver

GRAMMAR = "scheme[:n_bits][,key=value|,flag ...][/tensor|/channel|/in_channel|/group=G|/block=AxB|/token][@gradient]"
_OF_ACTIVATIONS = {
    "momentum": 0.9,
    "per_sample": True,
    "signed": None,
    "offset": True,
    "normalize": False,
    "activation": True,
    "block_axis": 1,
    "decay": 1.0,
}
_OF_WEIGHTS = {
    "group": "groups are for weights; activations have block formats such as mxfp4",
    "block": "blocks of given sizes are for weights; activations have block formats such as mxfp4",
    "in_channel": "in_channel is for weights; /channel gives each channel of an activation its own numbers",
}
LONGEST = 200
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@checked
@dataclass(frozen=True)
class QuantSpec:
    """A parsed spec string. `str(spec)` gives the text back, `QuantSpec.parse` reads it.

    `options` keeps the values as they were written; they get their types from the scheme. `granularity` is "tensor",
    "channel", "in_channel", "group", "block", "token" or "" (the scheme's default: per tensor); `group` is the group
    size, `block` the sizes of a block along the axes of a weight, output channel first, -1 for a whole axis.

    >>> spec = QuantSpec.parse("esb:4,k=1/channel@clipped")
    >>> spec.scheme, spec.n_bits, spec.options, spec.granularity, spec.gradient
    ('esb', 4, (('k', '1'),), 'channel', 'clipped')
    >>> str(spec)
    'esb:4,k=1/channel@clipped'
    """

    scheme: str
    n_bits: int | None = None
    options: tuple[tuple[str, str | None], ...] = ()
    granularity: str = ""
    group: int | None = None
    gradient: str | None = None
    block: tuple[int, ...] | None = None

    @classmethod
    def parse(cls, text: str) -> QuantSpec:
        """Read a spec string. Raises ConfigError, which says which part is wrong and what is allowed there."""
        if not isinstance(text, str):
            raise ConfigError(f"a spec must be a string {GRAMMAR}, got {_kind_of(text)}")
        if len(text) > LONGEST:
            raise ConfigError(f"a spec has at most {LONGEST} characters, got {len(text)}: {shown(text)}; {GRAMMAR}")
        rest, at, gradient = text.strip().partition("@")
        head, slash, granularity = rest.partition("/")
        scheme, *items = head.split(",")
        scheme, colon, bits = scheme.partition(":")
        _require(_NAME.fullmatch(scheme), text, f"the scheme {shown(scheme)} is not a name")
        _require(not at or _NAME.fullmatch(gradient), text, f"the gradient {shown(gradient)} is not a name")
        kind, _, size = granularity.partition("=")
        _require(
            not slash or _is_granularity(granularity),
            text,
            f"the granularity {shown(granularity)} is not tensor, channel or group=G with a whole G > 0, nor "
            "in_channel, token or block=AxB with whole sizes > 0 along the axes of a weight, -1 for a whole axis",
        )
        _require(not colon or _is_count(bits), text, f"the width {shown(bits)} is not a whole number")
        n_bits = int(bits) if colon else None
        options: dict[str, str | None] = {}
        for item in items:
            key, has_value, value = item.partition("=")
            well_formed = _NAME.fullmatch(key) and bool(value) == bool(has_value)
            _require(well_formed, text, f"the argument {shown(item)} is neither key=value nor a flag")
            _require(key not in options, text, f"the argument {shown(key)} is given twice")
            options[key] = value if has_value else None
        group = int(size) if kind == "group" else None
        block = tuple(map(int, size.split("x"))) if kind == "block" else None
        return cls(scheme, n_bits, tuple(options.items()), kind, group, gradient or None, block)

    def __str__(self) -> str:
        text = self.scheme + ("" if self.n_bits is None else f":{self.n_bits}")
        text += "".join(f",{key}" if value is None else f",{key}={value}" for key, value in self.options)
        text += f"/{self.granularity}" if self.granularity else ""
        text += f"={self.group}" if self.group is not None else ""
        text += f"={'x'.join(map(str, self.block))}" if self.block is not None else ""
        return text + (f"@{self.gradient}" if self.gradient else "")


def _kind_of(value: object) -> str:
    if value is None:
        return "None"
    made = ", a quantizer that is made already" if isinstance(value, Quantizer) else ""
    return f"{type(value).__name__} {getattr(value, '__name__', '')}".rstrip() + made


def _is_granularity(text: str) -> bool:
    kind, equals, size = text.partition("=")
    if kind in ("group", "block"):
        sizes = size.split("x") if kind == "block" else [size]
        return all(_is_count(n) and int(n) > 0 or (n == "-1" and kind == "block") for n in sizes)
    return kind in ("tensor", "channel", "in_channel", "token") and not equals


def _is_count(text: str) -> bool:
    """Whether a text is an integer that torch can represent as a count."""
    return text.isdecimal() and len(text) < 19


def _require(condition: object, text: str, what: str) -> None:
    if not condition:
        raise ConfigError(f"spec {shown(text)}: {what}. A spec is {GRAMMAR}")


@checked
def find_scheme(name: str) -> tuple[type[Quantizer], Mapping[str, Any]]:
    """Return the class that a spec's scheme names, and the arguments that the name fixes. Raises UnknownNameError."""
    known = {preset: (cls, fixed) for _, cls in schemes() for preset, fixed in cls.presets.items()}
    if name in known and name not in QUANTIZERS:
        return known[name]
    try:
        return QUANTIZERS[name], {}
    except UnknownNameError as error:
        near = did_you_mean(name, known) if "did you mean" not in str(error) else ""
        raise UnknownNameError(f"{error}; presets: {', '.join(sorted(known))}{near and ';'}{near}") from None


def schemes() -> list[tuple[str, type[Quantizer]]]:
    """List every registered scheme, by name."""
    return [(name, QUANTIZERS[name]) for name in QUANTIZERS]


def make_quantizer(spec: str | QuantSpec, site: str = "weight") -> Quantizer:
    """Make the quantizer that a spec string names.

    `site` "weight", "input" or "output" sets the defaults: a weight is measured again each
    time (observer `minmax`, momentum 0) and has its channels on axis 0; an activation is averaged over
    batches (observer `ema`, momentum 0.9) and has its channels on axis 1. `observer=NAME` selects another
    observer, whose own arguments may follow. Raises ConfigError, UnknownNameError.

    >>> make_quantizer("affine:8,symmetric=narrow/channel")
    AffineQuantizer(
      n_bits=8, symmetric='narrow', gradient='ste'
      (observer): BatchMinMax(axis=0, no data yet)
    )
    >>> make_quantizer("affine:8,observer=ema,momentum=0.99@clipped", site="output").observer.momentum
    0.99
    """
    spec = spec if isinstance(spec, QuantSpec) else QuantSpec.parse(spec)
    if not isinstance(site, str) or site not in SLOTS:
        raise ConfigError(f"site must be one of {', '.join(SLOTS)}, got {shown(site)}")
    if spec.granularity in _OF_WEIGHTS and site != "weight":
        raise ConfigError(f"spec {str(spec)!r}: {_OF_WEIGHTS[spec.granularity]}")
    scheme, fixed = find_scheme(spec.scheme)
    if spec.granularity == "token":
        return _of_tokens(spec, site)
    if site not in scheme.sites:
        raise ConfigError(f"spec {str(spec)!r}: {spec.scheme} is for {' and '.join(scheme.sites)}, not for {site}")
    axis, blocks = _axis_of(spec, site)
    quantizer = _Builder(spec, scheme, fixed, axis, site).build()
    if blocks is not None:
        return BlockwiseQuantizer(quantizer, blocks)
    return quantizer if spec.group is None else GroupQuantizer(quantizer, spec.group)


def _axis_of(spec: QuantSpec, site: str) -> tuple[int | None, tuple[int, ...] | None]:
    """Return the axis of the scheme's numbers, and the sizes of blocks that are more than the slices of an axis."""
    if spec.block is None:
        channel = 0 if site == "weight" else 1
        axes = {"": None, "tensor": None, "channel": channel, "in_channel": 1, "group": 0}
        return axes[spec.granularity], None
    parted = [axis for axis, size in enumerate(spec.block) if size != WHOLE]
    if not parted:
        return None, None
    is_slice = len(parted) == 1 and spec.block[parted[0]] == 1
    return (parted[0], None) if is_slice else (0, spec.block)


def construct_as(quantizer: Quantizer, spec: str, site: str, axis: int | None) -> None:
    """Run the constructor of the scheme that a spec names, on an object of a subclass of it. axis: of the channels."""
    parsed = QuantSpec.parse(spec)
    _Builder(parsed, *find_scheme(parsed.scheme), axis, site).build(quantizer)


def _of_tokens(spec: QuantSpec, site: str) -> Quantizer:
    if site == "weight":
        raise ConfigError(f"spec {str(spec)!r}: /token is for inputs and outputs; weights take /channel or /group")
    is_symmetric = spec.scheme == "affine" and spec.options == (("symmetric", "narrow"),)
    if not is_symmetric or spec.n_bits is None or spec.gradient not in (None, "ste"):
        raise ConfigError(
            f"spec {str(spec)!r}: the grid of a token is symmetric around 0 and covers it, so that it needs no zero "
            "point and clips nothing; write affine:8,symmetric=narrow/token, with 2 to 8 bits"
        )
    return TokenQuantizer(spec.n_bits)


def takes_observer(scheme: type[Quantizer]) -> bool:
    """Whether the range of an observer determines, or can determine, the scale of a scheme."""
    return "range_observer" in inspect.signature(scheme).parameters or issubclass(scheme, ScaledQuantizer)


class _Builder:
    """Assigns every part of a spec to an argument of the constructors of a scheme and its observer."""

    def __init__(
        self, spec: QuantSpec, scheme: type[Quantizer], fixed: Mapping[str, Any], axis: int | None, site: str
    ) -> None:
        self.spec, self.scheme, self.axis, self.site = spec, scheme, axis, site
        self.text = str(spec)
        self.parameters = inspect.signature(scheme).parameters
        self.arguments: dict[str, Any] = dict(fixed)
        self.observer_parameters: Mapping[str, inspect.Parameter] = {}
        self.gradient: Gradient | None = None
        self.options = {scheme.short_names.get(key, key): value for key, value in spec.options}

    def build(self, made: Quantizer | None = None) -> Quantizer:
        """Make the quantizer, or run the scheme's constructor on `made`, an object of a subclass."""
        self._place_bits()
        self._place_gradient()
        self._take_options(self.scheme, self.parameters, self.arguments)
        if "range_observer" in self.parameters:
            self.arguments["range_observer"] = self._observer()
        else:
            self._place_axis()
        observer = self._observer() if "observer" in self.options and issubclass(self.scheme, ScaledQuantizer) else None
        if self.options:
            _require(False, self.text, self._not_known())
        self._fill_for_activations(self.parameters, self.arguments)
        missing = [name for name, p in self.parameters.items() if p.default is p.empty and name not in self.arguments]
        _require(not missing, self.text, f"{self.spec.scheme} needs {', '.join(missing)}")
        if made is None:
            quantizer = self.scheme(**self.arguments)
        else:
            quantizer = made
            self.scheme.__init__(quantizer, **self.arguments)
        if observer is not None:
            assert isinstance(quantizer, ScaledQuantizer)
            quantizer.set_observer(observer)
        if self.gradient is not None and isinstance(quantizer, GridQuantizer):
            quantizer.set_gradient(self.gradient)
        return quantizer

    def _place_bits(self) -> None:
        bits = self.spec.n_bits
        if bits is None:
            return
        takes_bits = "n_bits" in self.parameters
        fixed = self.arguments.setdefault("n_bits", bits) if takes_bits else self.scheme.n_bits
        _require(bits == fixed, self.text, f"{self.spec.scheme} always has {fixed} bits")

    def _place_gradient(self) -> None:
        """Check the gradient's name and make the estimator with the options it knows."""
        name = self.spec.gradient
        if name is None:
            return
        allowed = self.scheme.gradients() if issubclass(self.scheme, GridQuantizer) else ("ste",)
        _require(allowed, self.text, f"{self.spec.scheme} has its own gradient, there is none to choose")
        _require(name in allowed, self.text, f"{self.spec.scheme} takes the gradients {', '.join(allowed)}")
        kind = GRADIENTS[name]
        options: dict[str, Any] = {}
        self._take_options(kind, inspect.signature(kind).parameters, options)
        self.gradient = kind(**options)

    def _place_axis(self) -> None:
        takes_axis = "axis" in self.parameters
        if takes_axis and self.spec.granularity:
            self.arguments["axis"] = self.axis
        _require(takes_axis or self.axis is None, self.text, f"{self.spec.scheme} works per tensor only")

    def _observer(self) -> RangeObserver:
        name = self.options.pop("observer", None) or ("minmax" if self.site == "weight" else "ema")
        kind = OBSERVERS[name]
        parameters = self.observer_parameters = inspect.signature(kind).parameters
        known = {"n_bits": getattr(self.scheme, "n_bits", None), **self.arguments}
        arguments = {key: value for key, value in known.items() if key in parameters and key != "axis"}
        self._take_options(kind, parameters, arguments)
        self._fill_for_activations(parameters, arguments)
        return kind(**arguments, axis=self.axis)

    def _fill_for_activations(self, parameters: Mapping[str, inspect.Parameter], arguments: dict[str, Any]) -> None:
        for name, value in _OF_ACTIVATIONS.items() if self.site != "weight" else ():
            parameter = parameters.get(name)
            if parameter is not None and parameter.default is not parameter.empty:
                arguments.setdefault(name, value)

    def _take_options(self, owner: type, parameters: Mapping[str, Any], arguments: dict[str, Any]) -> None:
        """Move the options for which `owner` has a parameter into `arguments`, in its type or its default's."""
        hints = get_type_hints(owner.__init__)  # type: ignore[misc]
        for name in [name for name in self.options if name in parameters and name not in ("axis", "range_observer")]:
            given = self.options.pop(name)
            _require(name not in arguments, self.text, f"{name} is given twice, or fixed by {self.spec.scheme}")
            default = parameters[name].default
            undeclared = type(default) if isinstance(default, bool | int | float) else str
            arguments[name] = self._typed(name, given, hints.get(name, undeclared))

    def _typed(self, name: str, given: str | None, hint: Any) -> Any:
        """Convert the text to the first of the parameter's types that can read it."""
        kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        if given is None:
            _require(bool in kinds, self.text, f"{name} needs a value: {name}=...")
            return True
        readers: dict[type, Callable[[str], Any]] = {
            bool: {"true": True, "false": False}.__getitem__,
            int: int,
            float: float,
            str: str,
        }
        for kind, read in readers.items():
            if kind in kinds:
                try:
                    return read(given)
                except (KeyError, ValueError):
                    continue
        names = " or ".join(kind.__name__ for kind in kinds if kind in readers)
        raise ConfigError(f"spec {self.text!r}: {name} takes {names}, got {given!r}")

    def _not_known(self) -> str:
        """Say which options are unknown, and which exist."""
        long_names = {long: short for short, long in self.scheme.short_names.items()}
        hidden = ("axis", "range_observer", "n_bits", "gradient_clip")
        names = [long_names.get(name, name) for name in self.parameters if name not in hidden]
        names += ["observer"] if takes_observer(self.scheme) else []
        of_observer = [name for name in self.observer_parameters if name not in hidden]
        unknown = sorted(self.options)
        hint = did_you_mean(unknown[0], [*names, *of_observer])
        said = f"{self.spec.scheme} has no {', '.join(unknown)}" + (f" ({hint[1:]})" if hint else "")
        return f"{said}; it has {', '.join(names)}" + (
            f"; its observer has {', '.join(of_observer)}" if of_observer else ""
        )
