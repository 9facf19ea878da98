"""High biases absorbed by the next layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchquant._arguments import NotNegative
from torchquant.ptq.ends import Columns, End, Rows
from torchquant.ptq.folding import set_statistics, statistics_of
from torchquant.ptq.functional.biases import absorbed_bias
from torchquant.ptq.paths import ChannelSet, channel_sets
from torchquant.ptq.stage import PTQ, ModelStage
from torchquant.ptq.structure import example_for, fold_all, measured_statistics, restart_ranges
from torchquant.qmodule.weight_slots import LayerSlot


@PTQ.register("absorb")
class BiasAbsorption(ModelStage):
    """Move the part of a bias that the activation behind it always exceeds to the biases of the next layers.

    Ranges of activations get smaller; calibrate them afterwards. What a channel always exceeds is its mean less
    `deviations` deviations, by its batch norm, or measured on the batches where there was none. Rare values below it
    change. `edges`: also before convolutions with zero padding, whose results then change at the borders.
    """

    changes = "structure"
    source = "Nagel et al. 2019, arXiv:1906.04721, section 4.1.3"
    when = "after cle, where activations have one scale for the whole tensor"
    cost = "a forward pass"

    def __init__(self, deviations: NotNegative = 3.0, edges: bool = False) -> None:
        self.deviations, self.edges = deviations, edges

    def run(self, model: nn.Module, batches: list[Any]) -> str:
        fold_all(model)
        found = channel_sets(model, example_for(model, batches))
        n, changed, left = 0, list[End](), dict[str, list[str]]()
        measured = measured_statistics(model, batches)
        for one in found.sets:
            last = [end for end in one.producers if end.slot is not None and end.is_quantized]
            if not last or "positive" not in one.notes:
                continue
            why = self._why_not(one)
            statistics = None if why else _statistics(last[0], measured)
            if why or statistics is None:
                assert last[0].slot is not None
                left.setdefault(why or "nothing is known of its values; give batches", []).append(last[0].slot.label)
                continue
            n += self._absorb(one, last[0], *statistics)
            changed += [*one.producers, *one.readers]
        fold_all(model)
        restart_ranges(model, changed)
        return "; ".join(
            [f"{n} channels", *(f"left as they are, because {why}: {', '.join(each)}" for why, each in left.items())]
        )

    def _why_not(self, one: ChannelSet) -> str:
        if len(one.producers) > 1 or one.producers[0].bias is None:
            return "several layers give the value" if len(one.producers) > 1 else "it has no bias"
        if "fixed" in one.notes or "bounded" in one.notes:
            return "an operator between them does not pass a shift on"
        for end in one.readers:
            if not isinstance(end, Columns):
                return "a batch norm reads it that the plan does not fold"
            if end.is_padded and not self.edges:
                return "a convolution with zero padding reads it; edges=True takes that for granted"
            if not end.has_bias:
                return f"{end.path} has no bias"
        return ""

    def _absorb(self, one: ChannelSet, producer: End, mean: Tensor, deviation: Tensor) -> int:
        """Move the bias of each channel; return of how many."""
        own = torch.where(producer.index >= 0, absorbed_bias(mean, deviation, self.deviations).double().cpu(), 0.0)
        bias = producer.bias
        assert bias is not None
        absorbed = one.gathered(producer, own)
        with torch.no_grad():
            bias.sub_(own.to(bias))
            for end in one.readers:
                assert isinstance(end, Columns)
                end.absorb(torch.where(end.index < 0, 0.0, absorbed[end.index]))
        if isinstance(producer.slot, LayerSlot) and producer.slot.module.bn is not None:
            set_statistics(producer.slot.module, mean - own.to(mean), deviation)
        return int((own > 0).sum())


def _statistics(end: End, measured: dict[str, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor] | None:
    assert end.slot is not None
    known = statistics_of(end.slot.module) if isinstance(end.slot, LayerSlot) and not isinstance(end, Rows) else None
    return known or measured.get(end.slot.path)
