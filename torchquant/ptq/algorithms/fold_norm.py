"""Norms folded into what reads them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from torchquant.ptq.channel_calls import BOUNDED, FIXED, POSITIVE
from torchquant.ptq.ends import Columns, End, Scale
from torchquant.ptq.paths import ChannelSet, channel_sets
from torchquant.ptq.stage import PTQ, ModelStage
from torchquant.ptq.structure import example_for, restart_ranges, same_function


@PTQ.register("fold_norm")
class FoldNorm(ModelStage):
    """Fold the scale of each norm into the layers that read it, and the shift too where all of them have biases.

    The norm then only centers and normalizes, which rotations need. A scale that readers cannot all take stays: that
    of a norm whose output is also added to something, as in post-norm transformers. A parameter that the
    forward multiplies a value with, by itself or plus a number, is a norm's scale too. Ranges of activations must be
    calibrated afterwards.
    """

    changes = "structure"
    source = "Ashkboos et al. 2024, arXiv:2404.00456, section 4"
    when = "before rotations"
    cost = "a forward pass"

    def run(self, model: nn.Module, batches: list[Any]) -> str:
        example = example_for(model, batches)
        found = channel_sets(model, example)
        sets = [one for one in found.sets if _is_norm(one)]
        left = [f"{end.path} is left: {why}" for end, why in found.left if isinstance(end, Scale)]
        left += [
            f"{end.path} is left: other layers share its channels"
            for one in found.sets
            if one not in sets
            for end in one.producers
            if isinstance(end, Scale) and end.slot is None
        ]
        ends = [end for one in sets for end in (*one.producers, *one.readers)]
        with same_function(model, example, ends, "fold_norm"), torch.no_grad():
            for one in sets:
                _fold(one)
        restart_ranges(model, ends)
        return "; ".join([f"{len(sets)} norms", *left])


def _is_norm(one: ChannelSet) -> bool:
    """Tell whether a norm alone gives the value, and its scale can go into linear layers."""
    norm = one.producers[0]
    is_alone = len(one.producers) == 1 and isinstance(norm, Scale) and norm.slot is None
    return (
        is_alone and not {POSITIVE, BOUNDED} & set(one.notes) and all(isinstance(end, Columns) for end in one.readers)
    )


def _fold(one: ChannelSet) -> None:
    norm = one.producers[0]
    assert isinstance(norm, Scale)
    scale = norm.values()
    factors = torch.ones(one.n, dtype=torch.float64)
    known = (norm.index >= 0) & (scale != 0)
    factors[norm.index[known]] = scale[known]
    one.scale(factors)
    norm.tensors[0].copy_((torch.where(known, 1.0, scale) - norm.offset).view(norm.tensors[0].shape))
    if norm.bias is not None and FIXED not in one.notes and all(_takes_shift(end) for end in one.readers):
        shift = norm.bias.detach().double().flatten().cpu()
        own = torch.zeros(one.n, dtype=torch.float64)
        own[norm.index[norm.index >= 0]] = shift[norm.index >= 0]
        for end in one.readers:
            assert isinstance(end, Columns)
            end.absorb(torch.where(end.index < 0, 0.0, own[end.index]))
        norm.bias.copy_(torch.where(norm.index >= 0, 0.0, shift).view(norm.bias.shape))


def _takes_shift(end: End) -> bool:
    return isinstance(end, Columns) and end.has_bias and not end.is_padded
