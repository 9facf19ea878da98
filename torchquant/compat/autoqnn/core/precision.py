"""The loss that pulls learned bit widths to their targets."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchquant.compat.autoqnn.quantizers._learned_width import LearnedWidth
from torchquant.compat.autoqnn.quantizers.quantization import bitloss
from torchquant.utils import weight_slots


def learned_widths(model: nn.Module) -> dict[str, LearnedWidth]:
    """Return path -> quantizer, for each quantizer of the model whose width is learned."""
    return {path: part for path, part in model.named_modules() if isinstance(part, LearnedWidth)}


def precision_loss(model: nn.Module) -> Tensor:
    """Compute the loss of learned widths above their targets, 0 for a model without any.

    It is the sum of `bitloss` of two means: over weights, by their numbers of elements, and over activations. So the
    layers share a budget: one may keep more bits than its `target_bitwidth` if another has fewer.

    >>> from torchquant.compat import autoqnn
    >>> quantizer = autoqnn.quantizers.VecQ(bitwidth=6, freeze_bitwidth=False, target_bitwidth=4)
    >>> model = autoqnn.core.convert(nn.Linear(4, 4), quantize_config_dict={"weight_quant": quantizer})
    >>> precision_loss(model)
    tensor(4., grad_fn=<AddBackward0>)
    """
    sizes = {id(slot.quantizer): slot.weight.numel() for slot in weight_slots(model)}
    weights: list[tuple[int, LearnedWidth]] = []
    activations: list[tuple[int, LearnedWidth]] = []
    for quantizer in learned_widths(model).values():
        n = sizes.get(id(quantizer))
        (activations if n is None else weights).append((n or 1, quantizer))
    return _mean_loss(weights) + _mean_loss(activations)


def freeze_bitwidths(model: nn.Module) -> dict[str, int]:
    """Replace each quantizer that learns its width by that of the rounded width, in place; return path -> bits.

    What evaluation computes does not change.

    >>> from torchquant.compat import autoqnn
    >>> quantizer = autoqnn.quantizers.VecQ(bitwidth=6, freeze_bitwidth=False)
    >>> model = autoqnn.core.convert(nn.Linear(4, 4), quantize_config_dict={"weight_quant": quantizer})
    >>> freeze_bitwidths(model)
    {'weight_quantizer': 6}
    >>> model.weight_quant.learns_width
    False
    """
    found = learned_widths(model)
    for path, quantizer in found.items():
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, quantizer.chosen)
    return {path: quantizer.n_bits for path, quantizer in found.items()}


def _mean_loss(found: list[tuple[int, LearnedWidth]]) -> Tensor:
    total = sum(n for n, _ in found)
    if not total:
        return torch.zeros(())
    width = torch.stack([q.float_bitwidth * (n / total) for n, q in found]).sum()
    return bitloss(width, sum(q.target_bitwidth * (n / total) for n, q in found))
