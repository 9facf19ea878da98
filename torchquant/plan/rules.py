"""Rules: the quantizers that a user wants for the sites of a model, and the rule sets of the package."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from torchquant._registry import did_you_mean
from torchquant._shown import shown
from torchquant.errors import ConfigError
from torchquant.graph.operators import OPERATORS
from torchquant.graph.rewrite import SHARE
from torchquant.graph.sites import SLOTS, Captured, Site, make_for_slot
from torchquant.qmodule.patterns import PATTERNS
from torchquant.qmodule.weighted import EXPERTS, WEIGHTED, class_name
from torchquant.quantizers import QuantSpec

Rules = str | Sequence[Mapping[str, Any]]
SELECTORS = ("types", "names", "position", "where")
SETTINGS = (*SLOTS, "fold_bn", "skip", "unread")
POSITIONS = ("first", "last")

_INT8 = {"weight": "affine:8,symmetric=narrow/channel", "input": "affine:8", "output": "affine:8"}
_INT8_SIGNED = {**_INT8, "input": "affine:8,symmetric=narrow", "output": "affine:8,symmetric=narrow"}
_TABLES = {"types": ["Embedding"], "weight": _INT8["weight"]}  # runtimes look up the codes of embeddings
_ENDS = {"position": ["first", "last"]}
_CONVS = ["Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"]
_LAYERS = [*_CONVS, "Linear"]
_TOKEN_LAYERS = ["Linear", "Conv1D", EXPERTS, *map(class_name, WEIGHTED)]
"""Layers whose sums run along the last axis of their input."""
_RECURRENT = {"types": ["LSTM", "LSTMCell", "GRU", "GRUCell", "RNN", "RNNCell"]}
_FLOAT_INPUTS = {**_RECURRENT, "input": None}
"""No runtime multiplies what a recurrent layer reads in integers, so a grid there would only cost."""
_GROUPED_8 = "affine:8/group=8"
"""A row of a recurrent layer may pick few of its inputs, with weights a thousand times those of the others, and add up
the others over many steps; one scale a row rounds these weights to 0. Every runtime multiplies them as floats."""
_GROUPED = {**_RECURRENT, "weight": _GROUPED_8}


def _ends_in_8_bits(weight: str) -> list[dict[str, Any]]:
    return [{**_INT8, "weight": weight, "fold_bn": True}, {**_ENDS, **_INT8}, {**_ENDS, **_GROUPED}, _FLOAT_INPUTS]


def _products(weight: str, recurrent: str, rows: str, others: str) -> list[dict[str, Any]]:
    """What layers and matrix products multiply, and no more: all that flows between them stays float.

    weight: of layers whose sums run along the last axis. recurrent: of those that are recurrent. rows: what the others
    of them read. others: what convolutions and matrix products read.
    """
    return [
        {"types": _TOKEN_LAYERS, "weight": weight, "input": rows},
        {"types": ["Embedding", "EmbeddingBag"], "weight": "affine:8/channel"},
        {**_FLOAT_INPUTS, "weight": recurrent},
        {"types": _CONVS, "weight": _INT8["weight"], "input": others, "fold_bn": True},
        {"types": ["matmul", "attention"], "input": others},
    ]


def _transformer(weight: str, recurrent: str) -> list[dict[str, Any]]:
    return _products(weight, recurrent, "affine:8,symmetric=narrow/token", "affine:8")


RULE_SETS: dict[str, list[dict[str, Any]]] = {
    "w8a8": [{**_INT8, "fold_bn": True}, _GROUPED, _FLOAT_INPUTS],
    "w4a8": _ends_in_8_bits("affine:4,symmetric=narrow,observer=mse/channel"),
    "w4a8-minmax": _ends_in_8_bits("affine:4,symmetric=narrow/channel"),
    "w4a4-lsq": [
        {"weight": "lsq:4/channel", "input": "lsq:4", "output": "lsq:4"},
        {**_ENDS, "weight": "lsq:8/channel", "input": "lsq:8", "output": "lsq:8"},
    ],
    "w2a2-lsq": [
        {"weight": "lsq:2/channel", "input": "lsq:2", "output": "lsq:2"},
        {**_ENDS, "weight": "lsq:8/channel", "input": "lsq:8", "output": "lsq:8"},
    ],
    "ternary": [
        {**_INT8, "weight": "twn/channel"},
        {**_ENDS, "weight": _INT8["weight"]},
        {**_ENDS, **_GROUPED},
        _FLOAT_INPUTS,
    ],
    "w8a8-products": _products(_INT8["weight"], _GROUPED_8, "affine:8,observer=mse", "affine:8,observer=mse"),
    "w8a8-transformer": _transformer(_INT8["weight"], _GROUPED_8),
    "w4a8-transformer": _transformer(*["affine:4,symmetric=narrow/group=32"] * 2),
    "int8-ort": [
        {"types": _CONVS, **_INT8, "preactivation": "affine:8", "fold_bn": True, "unread": True},
        {"types": ["Linear", "add", "mul", "matmul", "avg_pool", "cat"], **_INT8, "fold_bn": True},
        _TABLES,
    ],
    "int8-openvino": [
        {"types": [*_LAYERS, "add", "mul", "matmul", "avg_pool", "cat", "interpolate"], **_INT8, "fold_bn": True},
        {"types": ["cat"], "output": SHARE},
        _TABLES,
    ],
    "int8-tensorrt": [
        {"types": [*_LAYERS, "add", "matmul", "avg_pool"], **_INT8_SIGNED, "fold_bn": True},
    ],
}
"""Rule sets by name. The last three quantize operators that have integer kernels in a runtime.

TensorRT takes signed codes with zero points of 0 only; export such a model with `keep_signed=True`.

A convolution of ONNX Runtime gives codes or computes in float32, so it has an output quantizer whoever reads it.
In sets with 8-bit weights recurrent layers have a scale for each 8 weights (docs/decisions/0032).
"""


@dataclass(frozen=True)
class Rule:
    """A checked rule. `name` is its name in messages."""

    name: str
    types: tuple[str, ...] | None
    names: tuple[str, ...] | None
    position: tuple[str, ...] | None
    where: Callable[[Site], bool] | None
    skip: bool
    unread: bool
    fields: Mapping[str, Any]

    def set_slots(
        self, chosen: dict[str, dict[str, Any]], captured: Captured, skipped: dict[str, str] | None = None
    ) -> set[str]:
        """Write the slots of the rule into `chosen`, site by site, and the sites that it skips into `skipped`.

        Returns the sites whose outputs it leaves float, since no operator that can compute with integers reads them.
        """
        skipped = {} if skipped is None else skipped
        ends = [site.path for site in captured.sites if site.is_layer]
        at_ends = {"first": ends[:1], "last": ends[-1:]}
        wanted = {path for position in self.position or () for path in at_ends[position]}
        unread: set[str] = set()
        hit = applied = False
        reached: Site | None = None
        for site in captured.sites:
            allowed = self._reach(site)
            if not allowed or (self.position is not None and site.path not in wanted):
                continue
            if self.where is not None and not self.where(site):
                continue
            hit, reached = True, site
            if self.skip:
                chosen[site.path].clear()
                skipped[site.path] = f"{self.name} skips it"
            given = {name: value for name, value in self.fields.items() if name in allowed}
            applied = applied or bool(given) or self.skip
            if not (site.is_read or self.unread) and given.pop("output", None) is not None:
                unread.add(site.path)
            if given:
                skipped.pop(site.path, None)
            chosen[site.path].update(given)
        if not hit and (self.names is not None or self.where is not None):
            known = [path for site in captured.sites for path in (site.path, *(p for p, _ in site.fused))]
            asked = (self.names or ("",))[0]
            raise ConfigError(f"{self.name} selects no site;{did_you_mean(asked, known)} Known: {', '.join(known)}")
        if hit and not applied and reached is not None:
            raise ConfigError(
                f"{self.name} sets {', '.join(self.fields)}, but site '{reached.path}' ({reached.types[-1]}) takes "
                f"{', '.join(self._reach(reached))}"
            )
        return unread

    def _reach(self, site: Site) -> tuple[str, ...]:
        """Return the slots of the site that the rule may set, () if it does not select the site."""
        if self._selects(site.path, site.types):
            return (*site.fields, *(("fold_bn",) if site.is_layer else ()))
        if any(self._selects(path, (kind,)) for path, kind in site.fused) and not self.skip:
            return ("output",)
        return ()

    def _selects(self, path: str, types: Sequence[str]) -> bool:
        if self.types is not None and not set(types) & set(self.types):
            return False
        return self.names is None or any(_matches(pattern, path) for pattern in self.names)


def _matches(pattern: str, path: str) -> bool:
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], path) is not None
    return fnmatch.fnmatchcase(path, pattern)


def read_rules(rules: Rules, captured: Captured) -> list[Rule]:
    """Check the rules of a rule set or a list. Raises ConfigError that names the rule."""
    if isinstance(rules, str):
        if rules not in RULE_SETS:
            raise ConfigError(
                f"there is no rule set '{rules}';{did_you_mean(rules, RULE_SETS)} Known: {', '.join(RULE_SETS)}. "
                "Or give a list of rules"
            )
        return [_read_rule(f"rule {i + 1} of '{rules}'", r, captured) for i, r in enumerate(RULE_SETS[rules])]
    return [_read_rule(f"rule {i + 1}", rule, captured) for i, rule in enumerate(rules)]


def _read_rule(name: str, rule: Any, captured: Captured) -> Rule:
    if not isinstance(rule, Mapping):
        raise ConfigError(f"{name} must be a dictionary, got {shown(rule)}")
    check_keys(name, rule, (*SELECTORS, *SETTINGS))
    skip = rule.get("skip", False)
    if not isinstance(skip, bool):
        raise ConfigError(f"{name}: skip must be True or False, got {shown(skip)}")
    given = [key for key in SETTINGS if key in rule and key not in ("skip", "unread")]
    if skip and given:
        raise ConfigError(f"{name} contradicts itself: skip leaves the site float, but it also sets {', '.join(given)}")
    if not skip and not given:
        raise ConfigError(f"{name} sets nothing; it must set one of {', '.join(SETTINGS)}")
    types, names, position = (_words(name, rule, key) for key in ("types", "names", "position"))
    known = _known_types(captured)
    for kind in types or ():
        if kind not in known:
            raise ConfigError(
                f"{name}: no type {shown(kind)};{did_you_mean(kind, known)} Known: {', '.join(sorted(known))}"
            )
    for place in position or ():
        if place not in POSITIONS:
            raise ConfigError(f"{name}: position must be one of {', '.join(POSITIONS)}, got '{place}'")
    for pattern in names or ():
        if pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except re.error as error:
                raise ConfigError(f"{name}: '{pattern}' is not a regular expression: {error}") from error
    where = rule.get("where")
    if where is not None and not callable(where):
        raise ConfigError(f"{name}: where must be a function of a Site, got {shown(where)}")
    unread = rule.get("unread", names is not None or where is not None)
    if not isinstance(unread, bool):
        raise ConfigError(f"{name}: unread must be True or False, got {shown(unread)}")
    fields = {key: choice(rule[key], name, key) for key in given}
    return Rule(name, types, names, position, where, skip, unread, fields)


def _words(name: str, rule: Mapping[str, Any], key: str) -> tuple[str, ...] | None:
    value = rule.get(key)
    if value is None:
        return None
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, list | tuple) or not words or not all(isinstance(word, str) for word in words):
        raise ConfigError(f"{name}: {key} must be a string or a list of strings, got {shown(value)}")
    return tuple(words)


def _known_types(captured: Captured) -> set[str]:
    own = {kind for site in captured.sites for kind in (*site.types, *(k for _, k in site.fused))}
    rows = {EXPERTS, *(class_name(kind) for kind in (*PATTERNS, *WEIGHTED))}
    operators = {name for row in OPERATORS.values() if row.role == "computes" for name in row.types}
    return own | rows | operators


def choice(value: Any, where: str, name: str) -> Any:
    """Check the value of a slot and turn a dictionary into a spec string. Raises ConfigError."""
    if name == "fold_bn":
        if not isinstance(value, bool | str):
            raise ConfigError(f"{where}: fold_bn must be True, False or the name of a mode, got {shown(value)}")
        return value
    if isinstance(value, Mapping):
        value = _spec_of(value, where, name)
    if value is None or (value == SHARE and name == "output"):
        return value
    if isinstance(value, str):
        try:
            make_for_slot(value, name)
        except ConfigError as error:
            raise ConfigError(f"{where}, {name}: {error}") from error
        return value
    if isinstance(value, nn.Module) or not callable(value):
        raise ConfigError(
            f"{where}, {name}: expected a spec string such as 'affine:8', a dictionary with 'scheme', a function of "
            f"the layer, or None; got {shown(value)}"
        )
    return value


def _spec_of(value: Mapping[str, Any], where: str, name: str) -> str:
    parts = dict(value)
    scheme = parts.pop("scheme", None)
    if not isinstance(scheme, str):
        raise ConfigError(f"{where}, {name}: a dictionary needs 'scheme', such as 'affine'; got {shown(dict(value))}")
    if large := [key for key, part in parts.items() if isinstance(part, Mapping | list | tuple)]:
        raise ConfigError(f"{where}, {name}: {shown(large[0])} takes one value, got {shown(parts[large[0]])}")
    n_bits, granularity = parts.pop("n_bits", None), parts.pop("granularity", "")
    group, gradient = parts.pop("group", None), parts.pop("gradient", None)
    for key, part in parts.items():
        if not isinstance(part, str | int | float):
            raise ConfigError(f"{where}, {name}: '{key}' must be a string, a number, True or False; got {shown(part)}")
    options = tuple((k, None if v is True else str(v)) for k, v in parts.items())
    return str(QuantSpec(scheme, n_bits, options, granularity or ("group" if group else ""), group, gradient))


def check_keys(where: str, given: Mapping[str, Any], allowed: Iterable[str]) -> None:
    """Raise ConfigError for a key that is not allowed, and suggest the nearest allowed one."""
    allowed = list(allowed)
    for key in given:
        if key not in allowed:
            raise ConfigError(
                f"{where}: no key {shown(key)};{did_you_mean(str(key), allowed)} Allowed: {', '.join(allowed)}"
            )
