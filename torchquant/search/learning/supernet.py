"""Build the model of a search, in which every search point holds a mixture of its candidates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import nn

from torchquant.plan.quant_plan import QuantPlan
from torchquant.search.cost import SearchPoint
from torchquant.search.learning.mixture import MixtureQuantizer
from torchquant.search.space import Candidates, searched_slots


def build_supernet(
    net: nn.Module, plan: QuantPlan, share: bool = False
) -> tuple[nn.Module, dict[SearchPoint, list[MixtureQuantizer]]]:
    """Copy the float model with the plan's quantizers, mixtures for candidates; return it, and the mixtures by point.

    A layer with several weights has a mixture for each of them, with the same logits and width. With `share`, all
    points with the same candidates share them too, so that one choice is made for the whole model.
    """
    made: dict[SearchPoint, list[MixtureQuantizer]] = {}

    def factory(point: SearchPoint, space: Candidates) -> Callable[[nn.Module], MixtureQuantizer]:
        def make(layer: nn.Module) -> MixtureQuantizer:
            mixture = space(layer)
            made.setdefault(point, []).append(mixture)
            return mixture

        return make

    spaces = searched_slots(plan)
    fields: dict[str, dict[str, Callable[[nn.Module], MixtureQuantizer]]] = {}
    for point, space in spaces.items():
        fields.setdefault(point[0], {})[point[1]] = factory(point, space)
    sites = tuple(replace(site, **fields.get(site.path, {})) for site in plan.sites)  # type: ignore[arg-type]
    model = replace(plan, sites=sites).apply(net)
    leaders: dict[object, MixtureQuantizer] = {}
    for point, mixtures in made.items():
        leader = leaders.setdefault(spaces[point] if share else point, mixtures[0])
        for mixture in mixtures:
            mixture.theta, mixture.float_bitwidth = leader.theta, leader.float_bitwidth
    return model, made
