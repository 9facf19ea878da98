"""QuantPlan: which quantizer is at which site of a model. Rules make a plan, and `apply` puts it into a model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from torchquant._arguments import checked
from torchquant._files import check_format, read_text, write_whole
from torchquant._registry import did_you_mean
from torchquant._shown import shown
from torchquant._tables import ShownAsTables, text_table
from torchquant.errors import ConfigError, one_line, require
from torchquant.graph.called import CalledProduct, called_from_data
from torchquant.graph.calls import calls_from_data, calls_to_data, is_default_call
from torchquant.graph.copies import copy_model
from torchquant.graph.cost import PlanCost, plan_cost
from torchquant.graph.coverage import Coverage, coverage_of
from torchquant.graph.finder import BETWEEN, capture
from torchquant.graph.rewrite import SHARE, revert, rewrite
from torchquant.graph.sites import SLOTS, Captured, Site, SitePlan, Unquantized
from torchquant.plan.rules import Rules, check_keys, choice, read_rules

FORMAT = 1
UNREAD = "its output only: no operator that can compute with integers reads it directly"
MOST_NODES, MOST_REPEATS = 10_000, 10
"""Limits on the values of a YAML file with aliases expanded: in total, and relative to the values in the file."""


@dataclass(frozen=True)
class PlanChange:
    """One slot of one site in which two plans differ."""

    path: str
    field: str
    before: str
    after: str


class _Changes(ShownAsTables, list[PlanChange]):
    def __str__(self) -> str:
        if not self:
            return "the plans are the same"
        return text_table(["path", "slot", "before", "after"], ([c.path, c.field, c.before, c.after] for c in self))


@dataclass(frozen=True)
class QuantPlan(ShownAsTables):
    """The quantizers of a model, site by site. Frozen; can be printed, compared, saved and loaded.

    `sites`: the sites with a quantizer, in the order they run. `floats`: the parts that stay float, and why. `trace`,
    `fuse`: how the sites are found, as in `capture`.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> plan = QuantPlan.from_rules([{"types": ["Linear"], "weight": "affine:4/channel"}], net)
    >>> [site.path for site in plan.sites]
    ['0', '2']
    >>> model = plan.apply(net)
    >>> float_model = plan.revert(model)
    """

    sites: tuple[SitePlan, ...]
    floats: tuple[Unquantized, ...] = ()
    trace: bool | str = True
    fuse: bool | str = True
    types: Mapping[str, str] = field(default_factory=dict, compare=False)
    """Site path -> a description of the site."""
    patterns: Mapping[str, tuple[Any, ...]] = field(default_factory=dict, compare=False, repr=False)
    """Path of a module -> how the example calls it, if that differs from its default call; see `graph/calls.py`."""
    coverage: Coverage | None = field(default=None, compare=False, repr=False)
    """How much of the model the rules quantize; None for a plan that was changed, or written by hand."""
    products: Mapping[str, tuple[CalledProduct, ...]] = field(default_factory=dict, compare=False, repr=False)
    """Path of a module whose forward is not traced -> the products that it calls on the example."""

    @classmethod
    @checked
    def from_rules(
        cls,
        rules: Rules,
        model: nn.Module | Captured,
        example_inputs: Any = None,
        trace: bool | str = True,
        fuse: bool | str = True,
    ) -> QuantPlan:
        """Make a plan for a model from rules.

        `rules`: the name of a rule set (`RULE_SETS`) or a list of dictionaries. Each rule selects sites by `types`
        (a class, or an operator of `torchquant operators`: "Conv2d", "add"), `names` (exact, a glob, or "re:" and a
        regular expression), `position` ("first", "last" among the layers) and `where` (a function of the Site); all
        must hold, and a rule with none of them selects all sites. A rule sets `weight`, `input`, `output`, `bias`,
        `preactivation` (the input of a fused activation that is not a clamp), `probabilities` (what a softmax gives to
        a product, also inside `F.scaled_dot_product_attention`), each to a spec string, a dictionary with
        "scheme", or a function of the layer; None means float. It may set `fold_bn`, or `skip: True`. Later rules win,
        site by site and slot by slot. A rule may also select a batch norm or activation that is fused into a layer;
        it then sets the layer's output. `input` applies where nothing has quantized the value yet; `output` applies
        where an operator that can compute with integers reads the result, unless the rule has `names`, `where` or
        `unread: True`.

        The `coverage` of the plan says how much of the model is quantized; with an example, also of its multiply-adds.
        Raises ConfigError that names the rule, the site and what is allowed.
        """
        captured = model if isinstance(model, Captured) else capture(model, example_inputs, trace, fuse)
        chosen: dict[str, dict[str, Any]] = {site.path: {} for site in captured.sites}
        skipped: dict[str, str] = {}
        unread: set[str] = set()
        for rule in read_rules(rules, captured):
            unread |= rule.set_slots(chosen, captured, skipped)
        plans = [SitePlan(path, **fields) for path, fields in chosen.items()]
        plans, unfolded = _without_impossible_folding(plans, captured)
        for plan, site in zip(plans, captured.sites, strict=True):
            _check_buildable(plan, site)
        kept = tuple(plan for plan in plans if not plan.is_float)
        unset = [
            Unquantized(site.path, site.types[-1], skipped.get(site.path, "no rule gives it a quantizer"))
            for plan, site in zip(plans, captured.sites, strict=True)
            if plan.is_float
        ]
        unset += [
            Unquantized(site.path, what_is_at(site), UNREAD)
            for plan, site in zip(plans, captured.sites, strict=True)
            if site.nodes and site.path in unread and plan.output is None and not plan.is_float
        ]
        types = {site.path: what_is_at(site) for site in captured.sites}
        floats = (*captured.floats, *unset, *unfolded)
        wanted = () if isinstance(rules, str) else _unset(plans, captured)
        coverage = coverage_of(captured, kept, floats, wanted, example_inputs)
        calls = captured.patterns.items()
        shown = {path: call for path, call in calls if not is_default_call(captured.model.get_submodule(path), call)}
        return cls(kept, floats, captured.trace, captured.fuse, types, shown, coverage, captured.products)

    @checked
    def apply(self, model: nn.Module, inplace: bool = False) -> nn.Module:
        """Put the quantizers into a copy of the float model, or into the model itself, in QModuleState.BYPASSED.

        The result computes what the float model computes, bit for bit, until a state is set. It keeps its class, its
        modules and their paths; only wrapped layers are replaced. Float checkpoints load. Raises ConfigError if the
        model does not have the sites of the plan.
        """
        target = model if inplace else copy_model(model)
        patterns, products = (getattr(self, name, {}) for name in ("patterns", "products"))  # not in old pickles
        untraced = {left.path: left.why.removeprefix(BETWEEN) for left in self.floats if left.why.startswith(BETWEEN)}
        return self.apply_to(capture(target, None, self.trace, self.fuse, {**patterns, **untraced}, products))

    def apply_to(self, captured: Captured) -> nn.Module:
        """Do the same as `apply` for a model that was captured before, in place."""
        known = {site.path: what_is_at(site) for site in captured.sites}
        for plan in self.sites:
            planned = self.types.get(plan.path, "")
            if plan.path in known and planned and planned != known[plan.path]:
                raise ConfigError(
                    f"the plan has '{planned}' at the site '{plan.path}', but {type(captured.model).__name__} has "
                    f"'{known[plan.path]}'. It was made for another model; make one for this with QuantPlan.from_rules"
                )
            if plan.path not in known:
                hint = did_you_mean(plan.path, known)
                raise ConfigError(
                    f"the plan has the site '{plan.path}', but {type(captured.model).__name__} does not have it;{hint} "
                    "It was made for another model, or for calls with arguments that are not in the plan: make one "
                    "with an example of them, QuantPlan.from_rules(rules, model, example_inputs)"
                )
        return rewrite(captured, {plan.path: plan for plan in self.sites})

    @checked
    def revert(self, model: nn.Module, inplace: bool = False) -> nn.Module:
        """Return the float model that `apply` was given, with the current weights. Raises ConfigError."""
        return revert(model if inplace else copy_model(model))

    @checked
    def cost(self, model: nn.Module, example_inputs: Any) -> PlanCost:
        """Compute weight bytes, activation bytes, multiply-adds and bit operations of a float model under this plan."""
        return plan_cost(capture(model, example_inputs, self.trace, self.fuse), self.sites, example_inputs)

    @checked
    def replace(self, path: str, **fields: Any) -> QuantPlan:
        """Return a plan with other values of slots at one site. Raises ConfigError for a site that it does not have.

        >>> net = nn.Sequential(nn.Linear(4, 8))
        >>> plan = QuantPlan.from_rules([{"weight": "affine:8"}], net)
        >>> plan.replace("0", weight="affine:4").sites[0].weight
        'affine:4'
        """
        known = [site.path for site in self.sites]
        if path not in known:
            raise ConfigError(f"the plan has no site '{path}';{did_you_mean(path, known)}")
        unknown = set(fields) - {*SLOTS, "fold_bn"}
        if unknown:
            raise ConfigError(f"a site has the slots {', '.join(SLOTS)}, and fold_bn; got {', '.join(sorted(unknown))}")
        values = {name: choice(value, f"site '{path}'", name) for name, value in fields.items()}
        sites = tuple(replace(s, **values) if s.path == path else s for s in self.sites)
        return replace(self, sites=sites, coverage=None)

    @checked
    def diff(self, other: QuantPlan) -> list[PlanChange]:
        """List the changes from this plan to `other`; the list prints as a table."""
        ours, theirs = ({site.path: site.words() for site in plan.sites} for plan in (self, other))
        found = _Changes()
        for path in dict.fromkeys([*ours, *theirs]):
            before, after = ours.get(path, {}), theirs.get(path, {})
            for name in (*SLOTS, "fold_bn"):
                if before.get(name) != after.get(name):
                    found.append(PlanChange(path, name, str(before.get(name, "-")), str(after.get(name, "-"))))
        return found

    def describe(self) -> str:
        """Describe every site with its quantizers, then the parts that stay float and why."""
        rare = ("preactivation", "probabilities")
        fields = [name for name in SLOTS if name not in rare or any(getattr(s, name, None) for s in self.sites)]
        header = ["site", "what", *fields]
        rows = []
        for site in self.sites:
            words = site.words()
            rows.append([site.path or "(root)", self.types.get(site.path, "")] + [words.get(n, "-") for n in fields])
        text = text_table(header, rows)
        if self.floats:
            floats = ([left.path or "(root)", left.type, left.why] for left in self.floats)
            text += "\n\nleft float\n" + text_table(["path", "what", "why"], floats)
        coverage = getattr(self, "coverage", None)  # old pickles do not have it
        return text if coverage is None else f"{text}\n\n{coverage.summary()}"

    def __str__(self) -> str:
        return self.describe()

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain data, as `save` writes it.

        Raises ConfigError if a quantizer is a function, which has no text.
        """
        sites = []
        for site in self.sites:
            for name in SLOTS:
                if callable(getattr(site, name)):
                    raise ConfigError(
                        f"site '{site.path}', {name}: a function cannot be saved; use a spec string such as 'affine:8'"
                    )
            sites.append({"path": site.path, "what": self.types.get(site.path, ""), **site.words()})
        floats = [{"path": left.path, "type": left.type, "why": left.why} for left in self.floats]
        head = {"torchquant_plan": FORMAT, "trace": self.trace, "fuse": self.fuse}
        calls = calls_to_data(getattr(self, "patterns", {}))  # old pickles do not have it
        coverage = getattr(self, "coverage", None)
        more: dict[str, Any] = {"calls": calls} if calls else {}
        products = getattr(self, "products", {})
        more |= (
            {"products": {path: [c.to_data() for c in called] for path, called in products.items()}} if products else {}
        )
        more |= {} if coverage is None else {"coverage": coverage.to_dict()}
        return {**head, **more, "sites": sites, "left_float": floats}

    @classmethod
    def from_dict(cls, data: Any, where: str = "the data") -> QuantPlan:
        """Make a plan from the result of `to_dict`; `where` names it in messages. Raises ConfigError.

        >>> net = nn.Sequential(nn.Linear(4, 8))
        >>> plan = QuantPlan.from_rules([{"weight": "affine:8"}], net)
        >>> QuantPlan.from_dict(plan.to_dict()) == plan
        True
        """
        check_format(where, data, "torchquant_plan", FORMAT, "a plan")
        check_keys(
            where, data, ("torchquant_plan", "trace", "fuse", "calls", "products", "coverage", "sites", "left_float")
        )
        sites, types = [], {}
        for name in ("sites", "left_float"):
            if not isinstance(data.get(name) or [], list):
                raise ConfigError(f"{where}: {name} must be a list, got {shown(data[name])}")
        for name in ("trace", "fuse"):
            if not isinstance(data.get(name, True), bool | str):
                raise ConfigError(f"{where}: {name} must be True, False or a string, got {shown(data[name])}")
        for i, entry in enumerate(data.get("sites") or []):
            place = f"{where}, site {i + 1}"
            if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
                raise ConfigError(f"{place}: expected a mapping with a path, got {shown(entry)}")
            check_keys(place, entry, ("path", "what", *SLOTS, "fold_bn"))
            place = f"{where}, site '{entry['path']}'"
            fields = {n: choice(entry[n], place, n) for n in (*SLOTS, "fold_bn") if n in entry}
            sites.append(SitePlan(entry["path"], **fields))
            types[entry["path"]] = entry.get("what", "")
        if any(types.values()) and "left_float" not in data:
            raise ConfigError(
                f"{where} seems to be truncated: every saved plan ends with left_float, but it has none. Use the whole "
                "file, or write 'left_float: []' at its end"
            )
        floats = []
        for i, entry in enumerate(data.get("left_float") or []):
            if not isinstance(entry, dict) or set(entry) != {"path", "type", "why"}:
                raise ConfigError(f"{where}, left_float {i + 1}: expected path, type and why, got {shown(entry)}")
            floats.append(Unquantized(**entry))
        patterns = calls_from_data(data.get("calls") or {}, f"{where}, calls")
        told = data.get("coverage")
        coverage = None if told is None else Coverage.from_dict(told, f"{where}, coverage")
        trace, fuse = data.get("trace", True), data.get("fuse", True)
        products = called_from_data(data.get("products") or {}, f"{where}, products")
        return cls(tuple(sites), tuple(floats), trace, fuse, types, patterns, coverage, products)

    @checked
    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the plan as YAML. Raises ConfigError if a quantizer is a function, which has no text."""
        text = require("yaml", "cli").safe_dump(self.to_dict(), sort_keys=False, width=200)
        return write_whole(Path(path), lambda temporary: temporary.write_text(text, encoding="utf-8"))

    @classmethod
    @checked
    def load(cls, path: str | os.PathLike[str]) -> QuantPlan:
        """Read a plan that `save` wrote, or one written by hand. Raises ConfigError."""
        return cls.from_dict(read_yaml(path), f"{path}")


def what_is_at(site: Site) -> str:
    """Describe the layer or operator of a site and the parts fused into it."""
    return " + ".join([site.types[-1], *(kind for _, kind in site.fused)])


def _without_impossible_folding(plans: list[SitePlan], captured: Captured) -> tuple[list[SitePlan], list[Unquantized]]:
    """Do not fold batch norms without running statistics; return the plans, and these batch norms as float parts."""
    kept, told = [], []
    for plan, site in zip(plans, captured.sites, strict=True):
        if plan.fold_bn and site.batch_norm is not None:
            norm, _ = site.batch_norm
            module = captured.model.get_submodule(norm)
            if getattr(module, "running_mean", None) is None:
                plan = replace(plan, fold_bn=False)
                why = "it has no running statistics, so it is not folded into the layer before it and runs in float"
                told.append(Unquantized(norm, type(module).__name__, why))
        kept.append(plan)
    return kept, told


@checked
def read_yaml(path: str | os.PathLike[str]) -> Any:
    """Read a YAML (or JSON) file with the safe loader. Raises ConfigError, also if its aliases expand too far."""
    yaml = require("yaml", "cli")
    loader = yaml.SafeLoader(read_text(path))
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        known: dict[int, int] = {}
        if (size := _written_out(node, known)) > MOST_NODES + MOST_REPEATS * len(known):
            raise ConfigError(
                f"{path} has {len(known):,} values, but {size:,} with its aliases expanded; use fewer aliases"
            )
        return loader.construct_document(node)
    except RecursionError as error:
        raise ConfigError(f"{path} is nested too deeply, or holds an alias of itself") from error
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} is not YAML: {one_line(error)}") from error
    finally:
        loader.dispose()


def _written_out(node: Any, known: dict[int, int]) -> int:
    """Count the values of a YAML node with aliases expanded. Raises RecursionError."""
    if id(node) not in known:
        parts = node.value if isinstance(node.value, list) else ()
        inside = (part for pair in parts for part in (pair if isinstance(pair, tuple) else (pair,)))
        known[id(node)] = 1 + sum(_written_out(part, known) for part in inside)
    return known[id(node)]


def _unset(plans: list[SitePlan], captured: Captured) -> list[str]:
    """Return the paths of sites whose products the rules leave float; a user's own list does so on purpose."""
    pairs = zip(plans, captured.sites, strict=True)
    return [site.path for plan, site in pairs if (plan.weight if site.is_layer else plan.input) is None]


def _check_buildable(plan: SitePlan, site: Site) -> None:
    """Raise ConfigError that names the site for errors that only show when a quantizer is made."""
    if plan.bias is not None and plan.weight is None:
        raise ConfigError(f"site '{site.path}': a bias is quantized together with the weight; give it a weight too")
    if plan.output == SHARE and "cat" not in site.types:
        raise ConfigError(
            f"site '{site.path}', output: 'share' is for concatenations ('cat'), not for {site.types[-1]}"
        )
