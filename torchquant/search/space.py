"""The search space: the candidates of one search point, and rules with candidates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from torchquant._arguments import checked
from torchquant.errors import ConfigError
from torchquant.graph.sites import SLOTS, make_for_slot
from torchquant.plan.quant_plan import QuantPlan
from torchquant.plan.rules import RULE_SETS, Rules
from torchquant.quantizers import weight_spec
from torchquant.search.learning.mixture import MixtureQuantizer

WIDTH = "{n}"
WIDEST = 32
DEFAULT_SCHEMES = ("qfmt", "resq", "vecq", "ul2q", "esb", "clipq", "pot", "zoomq")
"""AutoQNN's eight: fixed, residual (greedy), VecQ, uL2Q, ESB, and its own ClipQ, PotQ, ZoomQ (docs/searching.md)."""


@checked
@dataclass(frozen=True)
class Candidates:
    """The candidate specs of one search point. A spec with `{n}` has a bit width to learn, `min_bits`..`max_bits`.

    In a template `{k}` stands for n - 3, at least 0, as ESB needs it. Widths that a scheme does not have are left out.
    The object is a function of the layer, as a plan takes it for a slot; it makes a `MixtureQuantizer`. Raises
    ConfigError.

    >>> space = Candidates(("clipq:4/channel", "esb:4,k=1/channel"))
    >>> [option for option in space.options("weight")]
    ['clipq:4/channel', 'esb:4,k=1/channel']
    >>> Candidates(("affine:{n}",), min_bits=2, max_bits=4).options("output")
    ['affine:2', 'affine:3', 'affine:4']
    """

    specs: tuple[str, ...]
    min_bits: int = 2
    max_bits: int = 8
    field: str = "weight"
    form: str = "interp"

    def __post_init__(self) -> None:
        if not self.specs:
            raise ConfigError("there must be at least one candidate")
        if len(set(self.specs)) != len(self.specs):
            raise ConfigError(f"each candidate must be given once, got {', '.join(self.specs)}")
        if not 1 <= self.min_bits <= self.max_bits <= WIDEST:
            raise ConfigError(
                f"widths must be 1 <= min_bits <= max_bits <= {WIDEST}, got {self.min_bits}..{self.max_bits}"
            )

    @property
    def learns_width(self) -> bool:
        """Whether a candidate has a width to learn."""
        return any(WIDTH in spec for spec in self.specs)

    def rows(self, field: str | None = None) -> list[dict[int | None, str]]:
        """Return one entry per candidate: width -> spec string; the width is None for a candidate with a fixed width.

        Candidates with a width to learn get the same widths: those that all of them support.
        """
        field = field or self.field
        rows: list[dict[int | None, str]] = []
        for spec in self.specs:
            if WIDTH not in spec:
                make_for_slot(spec, field)
                rows.append({None: spec})
                continue
            found = {n: spec.format(n=n, k=max(n - 3, 0)) for n in range(self.min_bits, self.max_bits + 1)}
            rows.append({n: text for n, text in found.items() if _is_spec(text, field)})
        learning = [{n for n in row if n is not None} for row in rows if None not in row]
        common: set[int] = set.intersection(*learning) if learning else set()
        if learning and not common:
            raise ConfigError(
                f"{', '.join(self.specs)} have no width from {self.min_bits} to {self.max_bits} in common; change "
                "min_bits and max_bits, or the candidates"
            )
        whole = range(min(common), max(common) + 1) if common else range(0)
        if set(whole) != common:
            raise ConfigError(f"{', '.join(self.specs)} must share widths without gaps, got {sorted(common)}")
        return [row if None in row else {n: row[n] for n in whole} for row in rows]

    def options(self, field: str | None = None) -> list[str]:
        """Return every spec string that can be chosen."""
        return [spec for row in self.rows(field) for spec in row.values()]

    def __call__(self, layer: nn.Module) -> MixtureQuantizer:
        return MixtureQuantizer(self.rows(), self.field, self.form)


def _is_spec(text: str, field: str) -> bool:
    try:
        make_for_slot(text, field)
    except ConfigError:
        return False
    return True


@checked
def default_candidates(n_bits: int, schemes: Iterable[str] = DEFAULT_SCHEMES) -> list[str]:
    """Return weight candidates with the same storage cost: the given schemes that have the width; at 1 and 2 bits also
    binary or ternary.

    >>> default_candidates(2)[:3], len(default_candidates(4))
    (['qfmt:2,signed/channel', 'resq:2/channel', 'vecq:2/channel'], 8)
    """
    schemes = list(schemes)
    if not schemes:
        raise ConfigError("default_candidates needs the name of at least one scheme, got none")
    names = [*schemes, *{1: ["binary"], 2: ["ternary"]}.get(n_bits, [])]
    found = [weight_spec(name, n_bits) if name != "binary" else "binary/channel" for name in names]
    specs = [spec for spec in dict.fromkeys(found) if spec is not None]
    if not specs:
        raise ConfigError(f"none of the schemes {', '.join(names)} has {n_bits} bits; see: torchquant schemes")
    return specs


def searched_slots(plan: QuantPlan) -> dict[tuple[str, str], Candidates]:
    """Return (site path, slot) -> candidates, for the search points of a plan, in the order they run."""
    return {
        (site.path, name): choice
        for site in plan.sites
        for name in SLOTS
        if isinstance(choice := getattr(site, name), Candidates)
    }


@checked
def search_rules(
    rules: Rules, min_bits: int = 2, max_bits: int = 8, form: str = "interp"
) -> str | list[dict[str, Any]]:
    """Replace each list of specs, and each spec with `{n}`, in the rules of a plan by `Candidates`.

    Raises ConfigError.

    >>> rule = search_rules([{"weight": ["clipq:4/channel", "pot:4/channel"], "output": "affine:{n}"}])[0]
    >>> rule["weight"].specs, rule["output"].learns_width
    (('clipq:4/channel', 'pot:4/channel'), True)
    """
    given: Sequence[Mapping[str, Any]] = RULE_SETS[rules] if isinstance(rules, str) and rules in RULE_SETS else rules  # type: ignore[assignment]
    if isinstance(given, str) or not isinstance(given, Sequence):
        return rules  # type: ignore[return-value]  # the plan says what is wrong with it
    found: list[dict[str, Any]] = []
    for rule in given:
        if not isinstance(rule, Mapping):
            return list(given)  # type: ignore[arg-type]
        made = dict(rule)
        for name in SLOTS:
            value = made.get(name)
            specs = [value] if isinstance(value, str) and WIDTH in value else value
            if isinstance(specs, list | tuple):
                space = Candidates(tuple(map(str, specs)), min_bits, max_bits, name, form)
                space.rows()
                made[name] = space
        found.append(made)
    return found
