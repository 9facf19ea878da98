"""Sites: the layers and operators of a model that can have quantizers, and the plan for one site."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from torchquant._renamed import renamed_names
from torchquant.errors import ConfigError
from torchquant.graph.called import CalledProduct
from torchquant.graph.tracer import Traced
from torchquant.qmodule.own_forward import base_of
from torchquant.qmodule.patterns import InputFirstPattern, LayerPattern, plain_type, row_of, stock_type, why_no_layer
from torchquant.qmodule.weight_slots import n_values, weights_pattern
from torchquant.qmodule.weighted import EXPERTS
from torchquant.qmodule.weights import weight_names
from torchquant.quantizers import Quantizer, UniformQuantizer, make_quantizer

NORM_WHY = "a normalization stays float"
ONLY_FLOAT = "only float operators read its result"
SLOTS = ("weight", "input", "output", "bias", "preactivation", "probabilities")
SpecChoice = str | Callable[[nn.Module], Quantizer | None] | None
"""A spec string, a function of the layer, or None for float."""


@dataclass(frozen=True)
class SiteInput:
    """A real value that a site reads.

    `sources`: the sites whose output it is, through operators that only pass values on; () if it comes from an input of
    the model or a float operator. `node`: its name in the graph. `softmax`: the node of the softmax that made it, ""
    for any other value.
    """

    node: str
    sources: tuple[str, ...]
    softmax: str = ""


@dataclass(frozen=True)
class Site:
    """A layer, or an operator that computes new values, with what is fused into it.

    `path`: path of its module, or of the module that an operator gets. `types`: its names in rules. `fields`: the slots
    that can have quantizers. `fused`: (path, type) of batch norm and activation; the path is "" for a function.
    """

    path: str
    types: tuple[str, ...]
    fields: tuple[str, ...]
    module: nn.Module | None = field(repr=False)
    fused: tuple[tuple[str, str], ...] = ()
    reads: tuple[SiteInput, ...] = ()
    region: str = ""
    nodes: tuple[str, ...] = ()
    """Names of its nodes in the graph of its region: its own, batch norm's, activation's; () without a graph."""
    is_read: bool = True
    """Whether an operator that can compute with integers, or the caller of the model, reads its output directly."""
    called: int | None = None
    """The place of a product among the calls of a forward that is not traced; None for any other site."""

    @property
    def is_layer(self) -> bool:
        """Whether the site has weights."""
        return "weight" in self.fields

    @property
    def batch_norm(self) -> tuple[str, str] | None:
        """(path, type) of the fused batch norm, if any."""
        row = None if self.module is None else row_of(self.module)
        norm = row.batch_norm if isinstance(row, LayerPattern) else None
        return self.fused[0] if self.fused and norm is not None and self.fused[0][1] == norm.__name__ else None

    @property
    def activation(self) -> tuple[str, str] | None:
        """(path, type) of the fused activation, if any."""
        return self.fused[-1] if self.fused and self.fused[-1] != self.batch_norm else None


@dataclass(frozen=True)
class Unquantized:
    """A part of the model that no quantizer reaches, and the reason."""

    path: str
    type: str
    why: str


@dataclass(frozen=True)
class Way:
    """One path through a forward: its graph, the guards it depends on, and its sites."""

    traced: Traced
    sites: tuple[Site, ...] = ()

    @property
    def graph(self) -> fx.Graph:
        """The graph; its nodes have the same names in all ways of a region."""
        return self.traced.graph


@dataclass(frozen=True)
class Region:
    """A module whose forward is traced, in one or more ways; or one that runs its own forward, for the given reason.

    `pattern`: how it is called, as in `graph/calls.py`. `op_paths`: name of a node -> path of the operator there.
    """

    path: str
    module: nn.Module
    ways: tuple[Way, ...] = ()
    reason: str = ""
    pattern: tuple[Any, ...] = ()
    node_names: dict[Any, str] = field(default_factory=dict, repr=False)
    op_paths: dict[str, str] = field(default_factory=dict, repr=False)


@dataclass
class Found:
    """The findings in a model so far. `seen`: modules that are sites, or that were searched."""

    sites: dict[str, Site] = field(default_factory=dict)
    floats: list[Unquantized] = field(default_factory=list)
    regions: dict[str, Region] = field(default_factory=dict)
    seen: set[nn.Module] = field(default_factory=set)


LookInto = Callable[[str, nn.Module, bool], None]
"""Finds the sites of a module that a graph calls as a whole: its path, itself, whether its result is read."""


@dataclass(frozen=True)
class Captured:
    """The sites of a model in the order they run, what stays float, and the graphs behind them."""

    model: nn.Module = field(repr=False)
    sites: tuple[Site, ...]
    floats: tuple[Unquantized, ...]
    regions: Mapping[str, Region] = field(repr=False)
    trace: bool | str = True
    fuse: bool | str = True
    products: Mapping[str, tuple[CalledProduct, ...]] = field(default_factory=dict, repr=False)
    """Path of a module whose forward is not traced -> the products and softmaxes that it calls."""
    counts: Mapping[str, int] = field(default_factory=dict, repr=False)
    """Path of a module -> how often the example calls it, if more than once."""

    @property
    def patterns(self) -> dict[str, tuple[Any, ...]]:
        """Return path of a traced module -> how it is called."""
        return {path: region.pattern for path, region in self.regions.items() if region.ways}


def make_for_slot(spec: str, name: str) -> Quantizer:
    """Make the quantizer that a spec names for a slot. Raises ConfigError.

    A bias is observed like a weight, a preactivation like an output. Probabilities are observed by nothing: a uniform
    quantizer covers [0, 1] and keeps this range.

    >>> make_for_slot("affine:8", "probabilities").is_ready
    True
    """
    like = {"bias": "weight", "preactivation": "output", "probabilities": "input"}
    made = make_quantizer(spec, like.get(name, name))
    if name == "probabilities":
        _cover_probabilities(made, spec)
    return made


def _cover_probabilities(quantizer: Quantizer, spec: str) -> None:
    if not isinstance(quantizer, UniformQuantizer):
        return
    if quantizer.axis is not None:
        raise ConfigError(f"spec {spec!r}: probabilities have one range, from 0 to 1; leave the granularity out")
    quantizer.observer.force_ranges(0.0, 1.0)
    quantizer.pin(torch.zeros(0), observe=False)


@contextmanager
def naming(path: str, slot: str = "") -> Iterator[None]:
    """Name a site, and a slot of it if given, in a ConfigError that is raised inside."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"site '{path}'{slot and ', '}{slot}: {error}") from error


@dataclass(frozen=True)
class SitePlan:
    """The quantizers of one site, None where it stays float. `fold_bn`: as in QWrapper."""

    path: str
    weight: SpecChoice = None
    input: SpecChoice = None
    output: SpecChoice = None
    bias: SpecChoice = None
    fold_bn: bool | str = False
    preactivation: SpecChoice = None
    probabilities: SpecChoice = None

    @property
    def is_float(self) -> bool:
        """Whether the site has no quantizer."""
        return all(getattr(self, name) is None for name in SLOTS)

    def make(self, name: str, module: nn.Module | None) -> Quantizer | None:
        """Make a new quantizer for the slot `name`. Raises ConfigError that names the site."""
        choice = getattr(self, name)
        if choice is None:
            return None
        with naming(self.path, name):
            if isinstance(choice, str):
                return make_for_slot(choice, name)
            made = choice(module if module is not None else nn.Identity())
        if made is not None and not isinstance(made, Quantizer):
            raise ConfigError(f"site '{self.path}', {name}: a factory must return a Quantizer or None, got {made!r}")
        return made

    def words(self) -> dict[str, Any]:
        """Return the slots that are set; functions by their names."""
        values = {name: getattr(self, name) for name in (*SLOTS, "fold_bn")}
        return {
            name: value if isinstance(value, str | bool) else f"<{getattr(value, '__name__', 'factory')}>"
            for name, value in values.items()
            if value is not None and value is not False
        }


def joined(*parts: str) -> str:
    """Join the non-empty parts of a path."""
    return ".".join(part for part in parts if part)


def looked_after(sites: Iterable[Site], regions: Iterable[Region]) -> set[str]:
    """Return the paths of layers, and of modules whose forwards are traced: what they call belongs to no one else."""
    traced = {joined(r.path, path) for r in regions for way in r.ways for path in way.traced.inlined}
    return traced | {site.path for site in sites if site.is_layer}


def layer_slots(module: nn.Module) -> tuple[str, ...]:
    """Return the slots of a layer with weights, () for any other module."""
    if isinstance(row_of(module), LayerPattern):
        has_bias = getattr(module, "bias", None) is not None
        return ("weight", "input", "output", *(("bias",) if has_bias else ()))
    if not weight_names(module):
        return ()
    return ("weight", "output") if n_values(module) == 0 else ("weight", "input", "output")


def layer_types(module: nn.Module) -> tuple[str, ...]:
    """Return the names of a layer in rules: its torch class, the classes between, and its own class last."""
    kind, row = plain_type(module), row_of(module)
    above = [k for k in kind.__mro__ if issubclass(k, nn.Module) and k is not nn.Module]
    base = base_of(kind) if isinstance(row, LayerPattern) else stock_type(module)
    if isinstance(row, InputFirstPattern):
        base = nn.Linear
    between = above[: above.index(base)] if base in above else [kind]
    weights = weights_pattern(module)
    common = [EXPERTS] if weights is not None and weights.stacks else []
    names = [*common, *(k.__name__ for k in (base,) if k is not None), *(k.__name__ for k in reversed(between))]
    return tuple(dict.fromkeys(names))


def why_other(module: nn.Module) -> str:
    """Say for a plan why a module whose class derives from a torch layer is no layer; "" for any other module."""
    reason = why_no_layer(module)
    return f"a layer by its class, but not by its forward: {reason}" if reason else ""


def has_layers(module: nn.Module) -> bool:
    """Tell whether the module is, or contains, a layer with weights."""
    return any(layer_slots(m) for m in module.modules())


__getattr__ = renamed_names(__name__, {"LeftFloat": "Unquantized", "Read": "SiteInput"})
