"""The settings of a search run, and the candidates that they name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from torchquant.errors import ConfigError
from torchquant.plan import QuantPlan
from torchquant.quantizers import QUANTIZERS, catalogue, find_scheme, weight_spec
from torchquant.runs.settings import (
    argument,
    check_above_zero,
    check_at_least,
    check_one_of,
    check_seed,
    check_start,
    check_types,
    checkpoint_option,
    data_option,
    model_argument,
    option,
    read_rules,
    seed_option,
    split_list,
    weights_option,
    widths,
)
from torchquant.search import (
    Budget,
    Candidates,
    PrecisionLearning,
    SchemeSearch,
    SearchSettings,
    search_rules,
)
from torchquant.search.allocation.assignment import SOLVERS
from torchquant.search.allocation.sensitivities import METHODS
from torchquant.search.learning.engine import SCOPES, Search
from torchquant.search.learning.width_gradient import FORMS
from torchquant.search.space import DEFAULT_SCHEMES, WIDTH, searched_slots

KINDS: dict[str, type[Search] | None] = {"qss": SchemeSearch, "qpl": PrecisionLearning, "allocate": None}
KINDS_OF = "kinds"
"""Key in the metadata of a setting for the kinds of search that have it, if not all."""
LEARNED, MEASURED = ("qss", "qpl"), ("allocate",)
BITS = {"qss": "4", "qpl": "2-8", "allocate": "2-8"}
DEFAULT = {"qss": (*DEFAULT_SCHEMES, "ternary", "binary"), "qpl": ("clipq",), "allocate": ("clipq",)}
"""Default schemes, as far as they have the width."""
COOLING = 0.1
"""Ratio of the last temperature to the first."""
REACH = 5.0
"""How far a scheme search can move a logit from its beginning to its end."""


@dataclass(frozen=True)
class SearchConfig:
    """The settings of `torchquant search`. `model`, `data`, `checkpoint`, `float_epochs`: as in `JobConfig`.

    `kind`: "qss" searches schemes, "qpl" learns widths, "allocate" allocates widths by sensitivity. `budget`: bounds on
    the cost of the plan, such as "bytes<=40kB" (`Budget`). `schemes`: names separated by commas (at every width of
    `bits`), or specs. `bits`: "4", "2,3,4" or "2-8"; qpl learns between the smallest and the largest. `acts`: one spec,
    or several separated by commas, which are searched too; `{n}` in one stands for the widths `act_bits`. `fold_bn`:
    quantize weights with their batch norm folded in. `rules`: a YAML file with rules whose slots may be lists, in place
    of `schemes`, `acts` and `fold_bn`; `{n}` in them stands for `bits`. `epochs`: length of the search;
    `retrain_epochs`: length of the training under its plan; both train at a third of `learning_rate`. `arch_rate`: None
    chooses a rate that decides schemes, or crosses the range of widths, within the epochs. `temperature`: the first
    one; the last is a tenth of it. `temperature`, `penalty`: None as in `SearchSettings`. `method`, `solver`: for
    "allocate"; see `sensitivity` and `allocate`. `latency`: a table that `write_latency` wrote, for a budget of
    latency. `contents`: as in `JobConfig`. Raises ConfigError.
    """

    kind: str = argument("qss or qpl.")
    model: str = model_argument()
    budget: str = option("", "Budget of the plan, in quotes: 'bytes<=40kB', 'bits<=4,bitops<=2G'.")
    data: str = data_option()
    schemes: str | None = option(
        None, "Weight schemes or specs, separated by commas. Default: AutoQNN's for qss, otherwise clipq."
    )
    bits: str | None = option(None, "Weight bits, such as 4, 2,3,4 or 2-8. Default: 4 for qss, otherwise 2-8.")
    acts: str = option("affine:8", "A spec for activations; several specs, or one with {n}, are searched.")
    act_bits: str = option("2-8", "Widths that {n} in --acts stands for.")
    fold_bn: bool = option(False, "Quantize weights with their batch norm folded in.")
    rules: str | None = option(None, "A YAML file with rules whose slots may be lists; replaces schemes and acts.")
    per: str = option("layer", "layer: one choice per layer; model: one choice for all.", kinds=LEARNED)
    form: str = option("interp", "The gradient of a width: interp, secant, step or stat.", kinds=LEARNED)
    method: str = option("kl", "Measure of sensitivity: mse, kl, loss, hessian or fisher.", kinds=MEASURED)
    solver: str = option("ilp", "Solver: ilp, dp or greedy.", kinds=MEASURED)
    latency: str | None = option(None, "A latency table in JSON, for a budget of latency.")
    checkpoint: str | None = checkpoint_option()
    float_epochs: int = option(30, "Epochs of float training; 0: none.")
    epochs: int = option(10, "Epochs of the search.", kinds=LEARNED)
    retrain_epochs: int = option(10, "Epochs of training under the plan; 0: calibrate only.")
    learning_rate: float = option(
        1e-3, "Learning rate of float training; the search and the retraining use a third of it."
    )
    arch_rate: float | None = option(
        None, "Learning rate of shares and widths; default: by the number of steps.", kinds=LEARNED
    )
    temperature: float | None = option(
        None, "First temperature of the Gumbel softmax; the last is a tenth of it.", kinds=LEARNED
    )
    penalty: float | None = option(
        None, "Weight of the penalty for exceeding a budget during the search.", kinds=LEARNED
    )
    calibration_batches: int = option(8, "Batches for calibration and for measuring sensitivity.")
    seed: int = seed_option()
    weights: str | None = weights_option()
    contents: dict[str, str] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_types(self)
        check_start(self)
        allowed: dict[str, Iterable[str]] = {
            "kind": KINDS,
            "per": SCOPES,
            "form": FORMS,
            "method": METHODS,
            "solver": SOLVERS,
        }
        check_one_of(self, **allowed)
        check_at_least(self, float_epochs=0, epochs=1, retrain_epochs=0, calibration_batches=1)
        check_above_zero(self, "learning_rate", "arch_rate", "temperature", "penalty")
        check_seed(self.seed)
        if not self.budgets and self.kind != "qss":
            raise ConfigError(f"{self.kind} needs a budget, such as 'bits<=4' or 'bytes<=40kB'")
        if self.rules is not None and self.schemes is not None:
            raise ConfigError("rules and schemes were both given, but rules name the candidates; leave out schemes")
        self.candidate_rules()
        self.settings()

    @property
    def budgets(self) -> list[Budget]:
        """Return the budgets that `budget` names."""
        return Budget.parse(self.budget)

    def settings(self, steps: int = 1000) -> SearchSettings:
        """Return the settings of the search engine; the search has `steps` steps for logits and widths."""
        searched = KINDS[self.kind]
        given: dict[str, Any] = {"arch_rate": self.arch_rate, "penalty": self.penalty}
        given = {name: value for name, value in given.items() if value is not None}
        if self.kind == "qss":
            given.setdefault("arch_rate", max(1e-2, REACH / steps))
        if self.temperature is not None:
            given["temperature"] = (self.temperature, COOLING * self.temperature)
        defaults = SearchSettings() if searched is None else searched.defaults
        return replace(defaults, epochs=self.epochs, weight_rate=self.learning_rate / 3.0, **given)

    def candidate_rules(self) -> Any:
        """Return the rules of a plan with `Candidates`. Raises ConfigError."""
        if self.rules is not None:
            rules = read_rules(self.rules)
            if isinstance(rules, QuantPlan):
                raise ConfigError(f"{self.rules} holds a plan, which leaves nothing to choose; give a list of rules")
            return search_rules(rules, *ends("bits", self.bits or "2-8"), self.form)
        weight = self._weights()
        specs, (low, high) = split_specs(self.acts), ends("act_bits", self.act_bits)
        fields: dict[str, Any] = {"weight": weight}
        for name in ("input", "output"):
            space = Candidates(tuple(specs), low, high, name, self.form)
            fields[name] = specs[0] if len(space.options()) == 1 else space
        if isinstance(weight, str) and isinstance(fields["output"], str):
            raise ConfigError(f"there is only one candidate, {weight!r}; give more schemes or bits to choose from")
        return [fields | {"fold_bn": self.fold_bn}, {"position": "last", "output": None}]

    def _weights(self) -> Candidates | str:
        """Return the candidates that `schemes` and `bits` name; a spec string if there is only one."""
        bits = widths("bits", self.bits or BITS[self.kind])
        if self.kind == "qpl":
            ends("bits", self.bits or BITS[self.kind])
        specs: list[str] = []
        for word in split_specs(self.schemes) if self.schemes is not None else DEFAULT[self.kind]:
            if re.search("[:/@,]", word):
                specs.append(word)
            elif self.kind == "qpl":
                specs.append(find_scheme(word)[0].typical.format(name=word, n=WIDTH, k="{k}"))
            else:
                specs += [spec for n in bits if (spec := weight_spec(word, n)) is not None]
        if not specs:
            raise ConfigError(f"none of the schemes {self.schemes} has a width in {self.bits}; see: torchquant schemes")
        space = Candidates(tuple(dict.fromkeys(specs)), bits[0], bits[-1], "weight", self.form)
        options = space.options()
        return space if len(options) > 1 else options[0]

    def space(self, net: Any, example_inputs: Any) -> QuantPlan:
        """Return the plan with candidates. Raises ConfigError, also where there is nothing to choose."""
        plan = QuantPlan.from_rules(self.candidate_rules(), net, example_inputs)
        if not searched_slots(plan):
            raise ConfigError("the rules leave nothing to choose: give a slot a list of specs, or a spec with {n}")
        return plan


def split_specs(text: str) -> list[str]:
    """Split specs that are separated by commas; a comma inside a spec stays.

    >>> split_specs("affine:8,observer=mse, lsq:4")
    ['affine:8,observer=mse', 'lsq:4']
    """
    names = {*QUANTIZERS, *(preset for entry in catalogue() for preset in entry.presets)}
    found: list[str] = []
    for part in split_list(text):
        is_argument = found and ("=" in part or re.search("[:,]", found[-1]))
        if is_argument and re.split("[:/@]", part)[0] not in names:
            found[-1] += f",{part}"
        else:
            found.append(part)
    if not found:
        raise ConfigError("there must be at least one spec, such as 'affine:8'")
    return found


def ends(name: str, text: str) -> tuple[int, int]:
    """Return the first and the last of `widths`, which must not have gaps. Raises ConfigError."""
    numbers = widths(name, text)
    if numbers != list(range(numbers[0], numbers[-1] + 1)):
        raise ConfigError(f"{name} must be a range of widths without gaps, such as '2-8'; got {text!r}")
    return numbers[0], numbers[-1]
