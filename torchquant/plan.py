"""QuantPlan: which quantizer sits at which site of a model. Rules make it, a model carries it out.

`quantize(model, rules, example_inputs)` does all of it in one call.
"""

from __future__ import annotations

import copy
import difflib
import fnmatch
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchquant._files import write_whole
from torchquant._tables import text_table
from torchquant.errors import ConfigError, require
from torchquant.graph.capture import Captured, call_with, capture, tensors_in
from torchquant.graph.cost import PlanCost, plan_cost
from torchquant.graph.ops import COMPUTING
from torchquant.graph.rewrite import SHARE, revert, rewrite
from torchquant.graph.sites import FIELDS, LeftFloat, Site, SitePlan
from torchquant.qmodule.patterns import PATTERNS
from torchquant.qmodule.weights import WEIGHTED
from torchquant.quantizers import QuantSpec, make_quantizer

__all__ = ["RULE_SETS", "PlanChange", "QuantPlan", "Rules", "quantize"]

Rules = str | Sequence[Mapping[str, Any]]
SELECTORS = ("types", "names", "position", "where")
SETTINGS = (*FIELDS, "fold_bn", "skip")
POSITIONS = ("first", "last")
FORMAT = 1

_INT8 = {"weight": "affine:8,symmetric=narrow/channel", "input": "affine:8", "output": "affine:8"}
_ENDS = {"position": ["first", "last"]}
_LAYERS = ["Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d", "Linear"]

RULE_SETS: dict[str, list[dict[str, Any]]] = {
    "w8a8": [{**_INT8, "fold_bn": True}],
    "w4a8": [{**_INT8, "weight": "affine:4,symmetric=narrow/channel", "fold_bn": True}, {**_ENDS, **_INT8}],
    "w4a4-lsq": [
        {"weight": "lsq:4/channel", "input": "lsq:4", "output": "lsq:4"},
        {**_ENDS, "weight": "lsq:8/channel", "input": "lsq:8", "output": "lsq:8"},
    ],
    "w2a2-lsq": [
        {"weight": "lsq:2/channel", "input": "lsq:2", "output": "lsq:2"},
        {**_ENDS, "weight": "lsq:8/channel", "input": "lsq:8", "output": "lsq:8"},
    ],
    "ternary": [{**_INT8, "weight": "twn/channel"}, {**_ENDS, "weight": _INT8["weight"]}],
    "int8-ort": [
        {"types": [*_LAYERS, "add", "mul", "matmul", "avg_pool", "cat"], **_INT8, "fold_bn": True},
    ],
    "int8-openvino": [
        {"types": [*_LAYERS, "add", "mul", "matmul", "avg_pool", "cat", "interpolate"], **_INT8, "fold_bn": True},
        {"types": ["cat"], "output": SHARE},
    ],
}
"""Ready rules by name. The last two quantize what ONNX Runtime and OpenVINO have integer kernels for."""


@dataclass(frozen=True)
class PlanChange:
    """One field of one site that two plans see differently."""

    path: str
    field: str
    before: str
    after: str


class _Changes(list[PlanChange]):
    def __str__(self) -> str:
        if not self:
            return "the plans are the same"
        return text_table(["path", "field", "before", "after"], ([c.path, c.field, c.before, c.after] for c in self))


@dataclass(frozen=True)
class QuantPlan:
    """Site by site, the quantizers of a model. Frozen; prints, compares, is saved and loaded.

    `sites`: those with a quantizer, in the order they run. `floats`: what stays float, and why. `trace`,
    `fuse`: how the sites are found, as in `capture`.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> plan = QuantPlan.from_rules([{"types": ["Linear"], "weight": "affine:4/channel"}], net)
    >>> [site.path for site in plan.sites]
    ['0', '2']
    >>> model = plan.apply(net)
    >>> float_model = plan.revert(model)
    """

    sites: tuple[SitePlan, ...]
    floats: tuple[LeftFloat, ...] = ()
    trace: bool | str = True
    fuse: bool | str = True
    types: Mapping[str, str] = field(default_factory=dict, compare=False)
    """Site path -> what is there, for people."""

    @classmethod
    def from_rules(
        cls,
        rules: Rules,
        model: nn.Module | Captured,
        example_inputs: Any = None,
        trace: bool | str = True,
        fuse: bool | str = True,
    ) -> QuantPlan:
        """The plan that rules make for a model.

        `rules`: the name of a ready set (`RULE_SETS`) or a list of dictionaries. Each selects sites by `types`
        (a class or an operator: "Conv2d", "add"), `names` (exact, a glob, or "re:" and a regular expression),
        `position` ("first", "last" among the layers), `where` (a function of the Site); all that are given must
        hold, none selects all. It sets `weight`, `input`, `output`, `bias` (a spec string, a dictionary with
        "scheme", or a function of the layer; None: float), `fold_bn`, or `skip: True`. Later rules win, site by
        site and field by field. A batch norm or activation that is fused into a layer can be selected too, and
        sets the layer's output. `input` counts where nothing has quantized the value yet.

        Raises ConfigError that names the rule, the site and what is allowed.
        """
        captured = model if isinstance(model, Captured) else capture(model, example_inputs, trace, fuse)
        chosen: dict[str, dict[str, Any]] = {site.path: {} for site in captured.sites}
        for rule in _read_rules(rules, captured):
            rule.set_fields(chosen, captured)
        plans = [SitePlan(path, **fields) for path, fields in chosen.items()]
        for plan, site in zip(plans, captured.sites, strict=True):
            _check_buildable(plan, site)
        kept = tuple(plan for plan in plans if not plan.is_float)
        unset = [
            LeftFloat(site.path, site.types[-1], "no rule gives it a quantizer")
            for plan, site in zip(plans, captured.sites, strict=True)
            if plan.is_float
        ]
        types = {site.path: " + ".join([site.types[-1], *(kind for _, kind in site.fused)]) for site in captured.sites}
        return cls(kept, (*captured.floats, *unset), captured.trace, captured.fuse, types)

    def apply(self, model: nn.Module, inplace: bool = False) -> nn.Module:
        """A copy of the float model (or itself) with the quantizers in place, in QModuleState.BYPASSED.

        It computes what the float model computes, bit for bit, until a state is set. It keeps its class, its
        modules and their paths, but for what is wrapped. Float checkpoints load.
        Raises ConfigError if the model has not the sites of the plan.
        """
        model = model if inplace else copy.deepcopy(model)
        captured = capture(model, trace=self.trace, fuse=self.fuse)
        known = [site.path for site in captured.sites]
        for plan in self.sites:
            if plan.path not in known:
                raise ConfigError(
                    f"the plan has the site '{plan.path}', {type(model).__name__} has not;{_nearest(plan.path, known)} "
                    "It was made for another model"
                )
        return rewrite(captured, {plan.path: plan for plan in self.sites})

    def revert(self, model: nn.Module, inplace: bool = False) -> nn.Module:
        """The float model that `apply` was given, with the weights as they are now. Raises ConfigError."""
        return revert(model if inplace else copy.deepcopy(model))

    def cost(self, model: nn.Module, example_inputs: Any) -> PlanCost:
        """Weight bytes, activation bytes, multiply-adds and bit operations of the float model under this plan."""
        return plan_cost(capture(model, example_inputs, self.trace, self.fuse), self.sites, example_inputs)

    def replace(self, path: str, **fields: Any) -> QuantPlan:
        """A plan with other fields at one site. Raises ConfigError for a site it has not.

        >>> net = nn.Sequential(nn.Linear(4, 8))
        >>> plan = QuantPlan.from_rules([{"weight": "affine:8"}], net)
        >>> plan.replace("0", weight="affine:4").sites[0].weight
        'affine:4'
        """
        known = [site.path for site in self.sites]
        if path not in known:
            raise ConfigError(f"the plan has no site '{path}';{_nearest(path, known)}")
        unknown = set(fields) - {*FIELDS, "fold_bn"}
        if unknown:
            raise ConfigError(f"a site has {', '.join(FIELDS)}, fold_bn; got {', '.join(sorted(unknown))}")
        values = {name: _choice(value, f"site '{path}'", name) for name, value in fields.items()}
        return replace(self, sites=tuple(replace(s, **values) if s.path == path else s for s in self.sites))

    def diff(self, other: QuantPlan) -> list[PlanChange]:
        """What `other` changes of this plan; prints as a table."""
        ours, theirs = ({site.path: site.words() for site in plan.sites} for plan in (self, other))
        found = _Changes()
        for path in dict.fromkeys([*ours, *theirs]):
            before, after = ours.get(path, {}), theirs.get(path, {})
            for name in (*FIELDS, "fold_bn"):
                if before.get(name) != after.get(name):
                    found.append(PlanChange(path, name, str(before.get(name, "-")), str(after.get(name, "-"))))
        return found

    def describe(self) -> str:
        """Every site with its quantizers, then what stays float and why."""
        header = ["site", "what", "weight", "input", "output", "bias"]
        rows = []
        for site in self.sites:
            words = site.words()
            rows.append([site.path or "(root)", self.types.get(site.path, "")] + [words.get(n, "-") for n in FIELDS])
        text = text_table(header, rows)
        if self.floats:
            floats = ([left.path or "(root)", left.type, left.why] for left in self.floats)
            text += "\n\nleft float\n" + text_table(["path", "what", "why"], floats)
        return text

    def __str__(self) -> str:
        return self.describe()

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the plan as YAML. Raises ConfigError if a quantizer is a function, which has no text."""
        yaml = require("yaml", "cli")
        sites = []
        for site in self.sites:
            for name in FIELDS:
                if callable(getattr(site, name)):
                    raise ConfigError(
                        f"site '{site.path}', {name}: a function cannot be saved; use a spec string such as 'affine:8'"
                    )
            sites.append({"path": site.path, "what": self.types.get(site.path, ""), **site.words()})
        floats = [{"path": left.path, "type": left.type, "why": left.why} for left in self.floats]
        data = {"torchquant_plan": FORMAT, "trace": self.trace, "fuse": self.fuse, "sites": sites, "left_float": floats}
        text = yaml.safe_dump(data, sort_keys=False, width=200)
        return write_whole(Path(path), lambda temporary: temporary.write_text(text, encoding="utf-8"))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> QuantPlan:
        """Read a plan that `save` wrote, or that somebody wrote by hand. Raises ConfigError."""
        data = read_yaml(path)
        if not isinstance(data, dict) or data.get("torchquant_plan") != FORMAT:
            raise ConfigError(f"{path} is not a plan: it must begin with 'torchquant_plan: {FORMAT}'")
        _check_keys(f"{path}", data, ("torchquant_plan", "trace", "fuse", "sites", "left_float"))
        sites, types = [], {}
        for i, entry in enumerate(data.get("sites") or []):
            where = f"{path}, site {i + 1}"
            if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
                raise ConfigError(f"{where}: expected a mapping with a path, got {entry!r}")
            _check_keys(where, entry, ("path", "what", *FIELDS, "fold_bn"))
            where = f"{path}, site '{entry['path']}'"
            fields = {n: _choice(entry[n], where, n) for n in (*FIELDS, "fold_bn") if n in entry}
            sites.append(SitePlan(entry["path"], **fields))
            types[entry["path"]] = entry.get("what", "")
        floats = tuple(LeftFloat(**entry) for entry in data.get("left_float") or [])
        return cls(tuple(sites), floats, data.get("trace", True), data.get("fuse", True), types)


def quantize(
    model: nn.Module, rules: Rules | QuantPlan, example_inputs: Any = None, inplace: bool = False
) -> nn.Module:
    """A copy of a float model with quantizers where the rules say, ready to calibrate.

    `rules`: a ready set by name ("w8a8", "w4a8", "w4a4-lsq", "w2a2-lsq", "ternary", "int8-ort",
    "int8-openvino"), a list of rules, or a QuantPlan; see `QuantPlan.from_rules`. `example_inputs`: a tensor, a
    tuple or a dictionary of arguments; with it the result is checked to compute what the float model does, and
    where a traced forward does not, layers are wrapped one by one instead. The plan is `model.plan`.

    Raises ConfigError.

    >>> from torchquant import QModuleState, qmodule_state, set_qmodule_state
    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    >>> x = torch.randn(2, 1, 8, 8)
    >>> model = quantize(net.eval(), "w8a8", x)
    >>> bool((model(x) == net(x)).all())
    True
    >>> with qmodule_state(model, QModuleState.CALIBRATION):
    ...     y = model(x)
    >>> set_qmodule_state(model, QModuleState.QUANT_EVAL)
    """
    if isinstance(rules, QuantPlan):
        plan = rules
        quantized = plan.apply(model, inplace)
    else:
        plan = QuantPlan.from_rules(rules, model, example_inputs)
        quantized = plan.apply(model, inplace=False)
        if example_inputs is not None and plan.trace and not _same(model, quantized, example_inputs):
            why = "as followed by torch.fx it computed something else on the example, so layers are wrapped one by one"
            plan = QuantPlan.from_rules(rules, model, example_inputs, trace=False, fuse=False)
            plan = replace(plan, floats=(LeftFloat("", type(model).__name__, why), *plan.floats))
            quantized = plan.apply(model, inplace)
        elif inplace:
            quantized = plan.apply(model, inplace=True)
    quantized.plan = plan  # type: ignore[assignment]
    return quantized


@torch.no_grad()
def _same(model: nn.Module, quantized: nn.Module, example_inputs: Any) -> bool:
    """Whether both give the same on the example, in evaluation mode, bit for bit."""
    modes = [(m, m.training) for part in (model, quantized) for m in part.modules()]
    try:
        for m, _ in modes:
            m.training = False
        expected = list(tensors_in(call_with(model, example_inputs)))
        try:
            found = list(tensors_in(call_with(quantized, example_inputs)))
        except Exception:  # whatever goes wrong in a graph that follows the model wrongly
            return False
    finally:
        for m, mode in modes:
            m.training = mode
    return len(found) == len(expected) and all(
        a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
        if a.is_floating_point()
        else torch.equal(a, b)
        for a, b in zip(expected, found, strict=True)
    )


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """What a YAML (or JSON) file holds, by the safe loader. Raises ConfigError."""
    yaml = require("yaml", "cli")
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error


@dataclass(frozen=True)
class _Rule:
    """A rule that was found valid. `name` is what messages call it."""

    name: str
    types: tuple[str, ...] | None
    names: tuple[str, ...] | None
    position: tuple[str, ...] | None
    where: Callable[[Site], bool] | None
    skip: bool
    fields: Mapping[str, Any]

    def set_fields(self, chosen: dict[str, dict[str, Any]], captured: Captured) -> None:
        ends = [site.path for site in captured.sites if site.is_layer]
        at_ends = {"first": ends[:1], "last": ends[-1:]}
        wanted = {path for position in self.position or () for path in at_ends[position]}
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
            given = {name: value for name, value in self.fields.items() if name in allowed}
            applied = applied or bool(given) or self.skip
            chosen[site.path].update(given)
        if not hit and (self.names is not None or self.where is not None):
            known = [path for site in captured.sites for path in (site.path, *(p for p, _ in site.fused))]
            asked = (self.names or ("",))[0]
            raise ConfigError(f"{self.name} selects no site;{_nearest(asked, known)} Known: {', '.join(known)}")
        if hit and not applied and reached is not None:
            raise ConfigError(
                f"{self.name} sets {', '.join(self.fields)}, but site '{reached.path}' ({reached.types[-1]}) takes "
                f"{', '.join(self._reach(reached))}"
            )

    def _reach(self, site: Site) -> tuple[str, ...]:
        """The fields of the site that the rule may set, () if it does not select it."""
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


def _read_rules(rules: Rules, captured: Captured) -> list[_Rule]:
    if isinstance(rules, str):
        if rules not in RULE_SETS:
            raise ConfigError(
                f"no rules are called '{rules}';{_nearest(rules, RULE_SETS)} Known: {', '.join(RULE_SETS)}. "
                "Or give a list of rules"
            )
        return [_read_rule(f"rule {i + 1} of '{rules}'", r, captured) for i, r in enumerate(RULE_SETS[rules])]
    if not isinstance(rules, Sequence):
        raise ConfigError(f"rules must be the name of a ready set or a list of dictionaries, got {rules!r}")
    return [_read_rule(f"rule {i + 1}", rule, captured) for i, rule in enumerate(rules)]


def _read_rule(name: str, rule: Any, captured: Captured) -> _Rule:
    if not isinstance(rule, Mapping):
        raise ConfigError(f"{name} must be a dictionary, got {rule!r}")
    _check_keys(name, rule, (*SELECTORS, *SETTINGS))
    skip = rule.get("skip", False)
    if not isinstance(skip, bool):
        raise ConfigError(f"{name}: skip must be True or False, got {skip!r}")
    given = [key for key in SETTINGS if key in rule and key != "skip"]
    if skip and given:
        raise ConfigError(
            f"{name} clashes with itself: skip leaves the site float, but it also sets {', '.join(given)}"
        )
    if not skip and not given:
        raise ConfigError(f"{name} sets nothing; it may set {', '.join(SETTINGS)}")
    types, names, position = (_words(name, rule, key) for key in ("types", "names", "position"))
    known = _known_types(captured)
    for kind in types or ():
        if kind not in known:
            raise ConfigError(f"{name}: no type '{kind}';{_nearest(kind, known)} Known: {', '.join(sorted(known))}")
    for place in position or ():
        if place not in POSITIONS:
            raise ConfigError(f"{name}: position must be of {', '.join(POSITIONS)}, got '{place}'")
    for pattern in names or ():
        if pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except re.error as error:
                raise ConfigError(f"{name}: '{pattern}' is no regular expression: {error}") from error
    where = rule.get("where")
    if where is not None and not callable(where):
        raise ConfigError(f"{name}: where must be a function of a Site, got {where!r}")
    fields = {key: _choice(rule[key], name, key) for key in given}
    return _Rule(name, types, names, position, where, skip, fields)


def _words(name: str, rule: Mapping[str, Any], key: str) -> tuple[str, ...] | None:
    value = rule.get(key)
    if value is None:
        return None
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, list | tuple) or not words or not all(isinstance(word, str) for word in words):
        raise ConfigError(f"{name}: {key} must be a string or a list of strings, got {value!r}")
    return tuple(words)


def _known_types(captured: Captured) -> set[str]:
    own = {kind for site in captured.sites for kind in (*site.types, *(k for _, k in site.fused))}
    rows = {kind.rpartition(".")[2] if isinstance(kind, str) else kind.__name__ for kind in PATTERNS}
    return own | rows | set(COMPUTING) | {kind.__name__ for kind in WEIGHTED}


def _choice(value: Any, where: str, name: str) -> Any:
    """The value of a field, dictionaries as spec strings. Raises ConfigError."""
    if name == "fold_bn":
        if not isinstance(value, bool | str):
            raise ConfigError(f"{where}: fold_bn must be True, False or the name of a mode, got {value!r}")
        return value
    if isinstance(value, Mapping):
        value = _spec_of(value, where, name)
    if value is None or (value == SHARE and name == "output"):
        return value
    if isinstance(value, str):
        try:
            make_quantizer(value, {"bias": "weight"}.get(name, name))
        except ConfigError as error:
            raise ConfigError(f"{where}, {name}: {error}") from error
        return value
    if isinstance(value, nn.Module) or not callable(value):
        raise ConfigError(
            f"{where}, {name}: expected a spec string such as 'affine:8', a dictionary with 'scheme', a function of "
            f"the layer, or None; got {value!r}"
        )
    return value


def _spec_of(value: Mapping[str, Any], where: str, name: str) -> str:
    parts = dict(value)
    scheme = parts.pop("scheme", None)
    if not isinstance(scheme, str):
        raise ConfigError(f"{where}, {name}: a dictionary needs 'scheme', such as 'affine'; got {dict(value)!r}")
    n_bits, granularity = parts.pop("n_bits", None), parts.pop("granularity", "")
    group, gradient = parts.pop("group", None), parts.pop("gradient", None)
    options = tuple((k, None if v is True else str(v)) for k, v in parts.items())
    return str(QuantSpec(scheme, n_bits, options, granularity or ("group" if group else ""), group, gradient))


def _check_keys(where: str, given: Mapping[str, Any], allowed: Iterable[str]) -> None:
    allowed = list(allowed)
    for key in given:
        if key not in allowed:
            raise ConfigError(f"{where}: no key '{key}';{_nearest(str(key), allowed)} Allowed: {', '.join(allowed)}")


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" did you mean '{close[0]}'?" if close else ""


def _check_buildable(plan: SitePlan, site: Site) -> None:
    """Raise ConfigError, naming the site, for what only shows when a quantizer is made."""
    if plan.bias is not None and plan.weight is None:
        raise ConfigError(f"site '{site.path}': a bias is quantized together with the weight; give it a weight too")
    if plan.output == SHARE and "cat" not in site.types:
        raise ConfigError(
            f"site '{site.path}', output: 'share' is for concatenations ('cat'), not for {site.types[-1]}"
        )
