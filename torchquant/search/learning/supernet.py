"""The model of a search: every place that is searched holds a mixture of its candidates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import nn

from torchquant.plan.quant_plan import QuantPlan
from torchquant.search.cost import Place
from torchquant.search.learning.mixture import MixtureQuantizer
from torchquant.search.space import Candidates, searched_fields


def build_supernet(
    net: nn.Module, plan: QuantPlan, share: bool = False
) -> tuple[nn.Module, dict[Place, list[MixtureQuantizer]]]:
    """A copy of the float model with the plan's quantizers, mixtures where it has candidates; and those, by place.

    A layer with several weights has a mixture for each of them, with the same logits and width. `share`: so have all
    places with the same candidates, and one choice is made for the whole model.
    """
    made: dict[Place, list[MixtureQuantizer]] = {}

    def factory(place: Place, space: Candidates) -> Callable[[nn.Module], MixtureQuantizer]:
        def make(layer: nn.Module) -> MixtureQuantizer:
            mixture = space(layer)
            made.setdefault(place, []).append(mixture)
            return mixture

        return make

    spaces = searched_fields(plan)
    fields: dict[str, dict[str, Callable[[nn.Module], MixtureQuantizer]]] = {}
    for place, space in spaces.items():
        fields.setdefault(place[0], {})[place[1]] = factory(place, space)
    sites = tuple(replace(site, **fields.get(site.path, {})) for site in plan.sites)  # type: ignore[arg-type]
    model = replace(plan, sites=sites).apply(net)
    leaders: dict[object, MixtureQuantizer] = {}
    for place, mixtures in made.items():
        leader = leaders.setdefault(spaces[place] if share else place, mixtures[0])
        for mixture in mixtures:
            mixture.theta, mixture.float_bitwidth = leader.theta, leader.float_bitwidth
    return model, made
