"""Cross-layer equalization."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchquant._arguments import Count, NotNegative, Share
from torchquant.errors import ConfigError
from torchquant.ptq.ends import Columns, End, NormInput, Rows, column_ranges, row_ranges
from torchquant.ptq.functional.equalization import equalization_factors, is_equalized
from torchquant.ptq.paths import ChannelSet, ChannelSets, channel_sets
from torchquant.ptq.ranks import total
from torchquant.ptq.stage import PTQ, ModelStage
from torchquant.ptq.structure import channel_maxima, example_for, fold_all, restart_ranges, same_function, to_relu


@PTQ.register("cle")
class CrossLayerEqualization(ModelStage):
    """Rescale channels so that a layer and its readers use the same range of weights in each; nothing is lost.

    Which layers belong together is found by following one forward; batch norms are folded for good first. Ranges of
    activations must be calibrated afterwards. `sweeps`: at most; `bias_weight`: a bias counts as so many times smaller
    a weight; 0: not at all. `activations`: the share of the largest activation, measured on the batches, in place of
    the producer's weights; `alpha`: the producer's share of the range. `relu6`: "keep", where values that end at 6 are
    not rescaled, or "replace": those ReLU6 become ReLUs, which changes the float model.
    """

    changes = "structure"
    source = "Nagel et al. 2019, arXiv:1906.04721, section 4.1"
    when = "first, where weights have one scale for the whole tensor"
    cost = "a forward pass"

    def __init__(
        self,
        sweeps: Count = 20,
        bias_weight: NotNegative = 5.0,
        activations: Share = 0.0,
        alpha: Share = 0.5,
        relu6: str = "keep",
    ) -> None:
        if relu6 not in ("keep", "replace"):
            raise ConfigError(f"relu6 must be 'keep' or 'replace', got {relu6!r}")
        self.sweeps, self.bias_weight, self.activations, self.alpha = sweeps, bias_weight or None, activations, alpha
        self.relu6 = relu6

    def run(self, model: nn.Module, batches: list[Any]) -> str:
        if self.activations and not total(len(batches)):
            raise ConfigError("cle with activations looks at inputs and needs batches, got none")
        fold_all(model)
        example = example_for(model, batches)
        found = channel_sets(model, example)
        replaced = to_relu(model, found) if self.relu6 == "replace" else 0
        sets = [one for one in found.sets if _is_pair(one) and (replaced or "bounded" not in one.notes)]
        sets = [one for one in sets if all(isinstance(each, nn.Module) for each in one.notes.get("bounded", []))]
        largest = channel_maxima(model, batches, sets) if self.activations else [None] * len(sets)
        ends = [end for one in sets for end in (*one.producers, *one.readers)]
        with same_function(model, example, ends, "cle"):
            n = self._sweep(sets, largest)
        fold_all(model)
        restart_ranges(model, ends)
        note = f"{len(sets)} sets of layers equalized in {n} sweeps"
        note += f", {replaced} ReLU6 became ReLU" if replaced else ""
        return "; ".join([note, *_left(found, sets)])

    def _sweep(self, sets: list[ChannelSet], largest: list[Any]) -> int:
        for n in range(1, self.sweeps + 1):
            every = []
            for i, one in enumerate(sets):
                factors = self._factors(one, largest[i])
                one.scale(factors)
                largest[i] = None if largest[i] is None else largest[i] / factors
                every.append(factors)
            if is_equalized(every):
                return n
        return self.sweeps

    def _factors(self, one: ChannelSet, largest: Tensor | None) -> Tensor:
        rows = [
            one.gathered(end, row_ranges(end.slot, self.bias_weight))
            for end in one.producers
            if end.slot and end.is_quantized
        ]
        columns = [one.gathered(e, column_ranges(e)) for e in one.readers if e.is_quantized and isinstance(e, Columns)]
        producer, reader = (torch.stack(each).amax(0) for each in (rows, columns))
        return equalization_factors(producer, reader, largest, self.alpha, self.activations)


def _is_pair(one: ChannelSet) -> bool:
    return all(any(end.is_quantized for end in ends) for ends in (one.producers, one.readers))


def _left(found: ChannelSets, sets: list[ChannelSet]) -> list[str]:
    """Say for each reason which layers were not equalized with their readers."""
    why: dict[str, list[str]] = {"it did not run": list(found.unseen)} if found.unseen else {}
    left = [(end, reason) for end, reason in found.left]
    left += [(end, _reason(one)) for one in found.sets if one not in sets for end in one.producers]
    for end, reason in left:
        if _is_last(end) and end.slot is not None:
            why.setdefault(reason, []).append(end.slot.label)
    return [f"left as they are, because {reason}: {', '.join(dict.fromkeys(names))}" for reason, names in why.items()]


def _reason(one: ChannelSet) -> str:
    if "bounded" in one.notes:
        return "their values end at a bound that a factor would move"
    if any(isinstance(end, NormInput) for end in one.readers):
        return "a batch norm reads them that the plan does not fold"
    return "no quantized weight reads them"


def _is_last(end: End) -> bool:
    """Tell whether an end gives what a quantized weight and its folded batch norm compute."""
    is_folded = (
        isinstance(end, Rows) and end.slot is not None and getattr(end.slot.module, "fold_mode", None) is not None
    )
    return end.is_quantized and not isinstance(end, Columns) and not is_folded
