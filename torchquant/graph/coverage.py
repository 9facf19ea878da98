"""Compute how much of a model is quantized under a plan: shares of its weights and of its multiply-adds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from torchquant._shown import shown, some
from torchquant._tables import ShownAsTables, text_table
from torchquant.errors import ConfigError
from torchquant.graph.cost import samples_in, slot_of
from torchquant.graph.macs import function_macs, site_macs
from torchquant.graph.operators import OPERATORS
from torchquant.graph.recording import watch_products
from torchquant.graph.sites import Captured, Site, SitePlan, Unquantized, joined

ENOUGH = 0.95
"""Share of weights and of multiply-adds below which the parts that stay float are reported."""
SHOWN = 5
INSIDE = "products of values that it computes inside, which no quantizer sees"
UNSET = "no rule quantizes its weight, or its input"
ELSEWHERE = "a product in a forward that could not be traced, or of values that are no site"
SitePart = tuple[str, str]
"""Path of a part, and its type."""


@dataclass(frozen=True)
class FloatPart:
    """A part of a model that stays float: its weights, multiply-adds of one sample (None: unknown), and the reason.

    `is_wanted`: whether the user's rules leave it float, by skipping or not selecting it.
    """

    path: str
    what: str
    weights: int
    macs: int | None
    why: str
    is_wanted: bool = False


@dataclass(frozen=True)
class Coverage(ShownAsTables):
    """Weights and multiply-adds of a model (of one sample of the example; None without one), and the quantized ones.

    Weights are the elements of all parameters with more than one dimension, each counted once. A multiply-add is
    quantized if its weight and input are, or both multiplied values. `parts`: the float parts, the largest first.

    >>> from torchquant import quantize
    >>> print(quantize(torch.nn.Linear(4, 3), "w8a8", torch.zeros(1, 4)).plan.coverage)
    quantized: 100.0 % of 12 weights, 100.0 % of 12 multiply-adds
    """

    weights: int
    quantized_weights: int
    macs: int | None
    quantized_macs: int | None
    parts: tuple[FloatPart, ...] = ()

    @property
    def weight_share(self) -> float:
        """The quantized share of the weights; 1 for a model without weights."""
        return self.quantized_weights / self.weights if self.weights else 1.0

    @property
    def mac_share(self) -> float | None:
        """The quantized share of the multiply-adds; 1 without any, None where they are not known."""
        if self.macs is None or self.quantized_macs is None:
            return None
        return self.quantized_macs / self.macs if self.macs else 1.0

    def lacks(self) -> str:
        """A text on shares that are too low and the largest unwanted float parts; "" if coverage is high enough."""
        unwanted = [part for part in self.parts if not part.is_wanted]
        shares = {
            "weights": sum(part.weights for part in unwanted) / max(self.weights, 1),
            "multiply-adds": sum(part.macs or 0 for part in unwanted) / max(self.macs or 0, 1),
        }
        if all(share <= 1 - ENOUGH for share in shares.values()):
            return ""
        said = " and ".join(
            f"{100 * share:.1f} % of the {name}" for name, share in shares.items() if share > 1 - ENOUGH
        )
        unwanted = [part for part in unwanted if part.weights or part.macs]
        named = [f"{part.path or '(root)'} ({part.what}{self._of(part)}): {part.why}" for part in unwanted]
        return f"{said}: {some(named, SHOWN, '; ')}"

    def _of(self, part: FloatPart) -> str:
        weights = f", {100 * part.weights / self.weights:.1f} % of the weights" if part.weights else ""
        return weights + (
            f", {100 * part.macs / self.macs:.1f} % of the multiply-adds" if part.macs and self.macs else ""
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the coverage as plain data, for YAML or JSON."""
        return {**asdict(self), "parts": [asdict(part) for part in self.parts]}

    @classmethod
    def from_dict(cls, data: Any, where: str) -> Coverage:
        """Read the result of `to_dict`; `where` names it in messages. Raises ConfigError."""
        try:
            return cls(**{**data, "parts": tuple(FloatPart(**part) for part in data["parts"])})
        except (KeyError, TypeError) as error:
            raise ConfigError(f"{where} must be the coverage as a saved plan holds it, got {shown(data)}") from error

    def summary(self) -> str:
        """Return the shares in one line."""
        said = f"quantized: {100 * self.weight_share:.1f} % of {self.weights:,} weights"
        if self.mac_share is None:
            return said
        return f"{said}, {100 * self.mac_share:.1f} % of {self.macs:,} multiply-adds"

    def __str__(self) -> str:
        if not self.parts:
            return self.summary()
        rows = [[p.path or "(root)", p.what, p.weights, "-" if p.macs is None else p.macs, p.why] for p in self.parts]
        return f"{self.summary()}\n\n" + text_table(["float", "what", "weights", "multiply-adds", "why"], rows)


@torch.no_grad()
def coverage_of(
    captured: Captured,
    plans: Iterable[SitePlan],
    floats: Iterable[Unquantized],
    wanted: Collection[str] = (),
    example_inputs: Any = None,
) -> Coverage:
    """Compute the coverage of the captured float model under plans.

    `floats`: parts that stay float, with reasons; `wanted`: paths of the sites that rules leave float on purpose.
    """
    chosen = {plan.path: plan for plan in plans}
    known = example_inputs is not None
    weights, n_weights = _float_weights(captured, chosen)
    macs, n_macs = _float_macs(captured, chosen, example_inputs) if known else (Counter[SitePart](), 0)
    whys = {left.path: left.why for left in floats} | {(left.path, left.type): left.why for left in floats}
    at = {site.path: site for site in captured.sites}

    def part(place: SitePart) -> FloatPart:
        path, what = place
        site = at.get(path)
        otherwise = ELSEWHERE if site is None else INSIDE if _has_weight(site, chosen) else UNSET
        why = whys.get(place) or whys.get(path) or otherwise
        return FloatPart(path, what, weights[place], macs[place] if known else None, why, path in wanted)

    def size(part: FloatPart) -> float:
        return max(part.weights / max(n_weights, 1), (part.macs or 0) / max(n_macs, 1))

    parts = sorted(map(part, {**weights, **macs}), key=size, reverse=True)
    quantized = n_weights - weights.total()
    if not known:
        return Coverage(n_weights, quantized, None, None, tuple(parts))
    return Coverage(n_weights, quantized, n_macs, n_macs - macs.total(), tuple(parts))


def _float_weights(captured: Captured, chosen: Mapping[str, SitePlan]) -> tuple[Counter[SitePart], int]:
    """Count the float weights of each part, and all weights. A weight is float if any float operator reads it."""
    places: dict[int, tuple[SitePart, bool]] = {}
    for site in captured.sites:
        is_quantized = _has_weight(site, chosen)
        for weight in site.module.parameters() if site.is_layer and site.module is not None else ():
            if not is_quantized or id(weight) not in places:
                places[id(weight)] = (site.path, site.types[-1]), is_quantized
    found = Counter[SitePart]()
    total, seen = 0, set[int]()
    for path, module in captured.model.named_modules():
        for name, weight in module.named_parameters(recurse=False):
            if weight.ndim > 1 and id(weight) not in seen:
                seen.add(id(weight))
                total += weight.numel()
                raw = joined(path, name), f"{type(module).__name__}.{name}"
                place, is_quantized = places.get(id(weight), (raw, False))
                found[place] += 0 if is_quantized else weight.numel()
    return +found, total


def _float_macs(
    captured: Captured, chosen: Mapping[str, SitePlan], example_inputs: Any
) -> tuple[Counter[SitePart], int]:
    """Count the unquantized multiply-adds of one sample for each part, and all multiply-adds."""
    found, total = Counter[SitePart](), 0
    operators = _operators(captured, chosen)

    def of_layer(site: Site, arguments: Sequence[Any], output: Any) -> None:
        nonlocal total
        macs = site_macs(site, arguments, output)
        total += macs.total
        found[site.path, site.types[-1]] += macs.floats if _has_weight(site, chosen) else macs.total

    def of_function(path: str, function: Any, arguments: Sequence[Any], output: Any) -> None:
        nonlocal total
        operator = OPERATORS.of(function)
        if operator is None or operator.macs is None:
            return
        macs = function_macs(function, arguments, output)
        total += macs
        quantized, place = operators.get((path, operator.family), (0.0, (path, function.__name__)))
        found[place] += round(macs * (1 - quantized))

    watch_products(captured, example_inputs, of_layer, of_function)
    samples = samples_in(example_inputs)
    return +Counter({place: -(-macs // samples) for place, macs in found.items()}), -(-total // samples)


def _operators(captured: Captured, chosen: Mapping[str, SitePlan]) -> dict[tuple[str, str], tuple[float, SitePart]]:
    """Find (path of a module, family of products) -> quantized share of its sites, and its first float site."""
    outputs = {path for path, plan in chosen.items() if plan.output is not None}
    groups: dict[tuple[str, str], list[tuple[bool, SitePart]]] = {}
    for site in captured.sites:
        operator = OPERATORS.get(site.types[0])
        if operator is not None and operator.macs is not None:
            plan = chosen.get(site.path)
            reads = [
                bool(outputs & {*read.sources}) or (plan is not None and slot_of(read, plan) is not None)
                for read in site.reads
            ]
            owner = site.path.rpartition(".")[0]
            groups.setdefault((owner, operator.family), []).append((all(reads), (site.path, site.types[-1])))
    return {
        key: (sum(q for q, _ in group) / len(group), next((place for q, place in group if not q), group[0][1]))
        for key, group in groups.items()
    }


def _has_weight(site: Site, chosen: Mapping[str, SitePlan]) -> bool:
    plan = chosen.get(site.path)
    return plan is not None and plan.make("weight", site.module) is not None
