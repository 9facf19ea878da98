"""Grids of weights and activations that are stretched by learned ratios, in units of the grid as it is."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from torchquant.ptq.block import ActivationInTraining, Block, BlockData, FixedWeight, WeightInTraining, optimize
from torchquant.ptq.layer import Layer
from torchquant.quantizers_functional._gradient import pass_through

BEYOND = 1e30
"""A value beyond the last level of every grid."""
NEAR = 1e-4
"""A share of the range of a grid that is less than a gap at its ends."""


class StretchedWeight(WeightInTraining):
    """A weight whose grid has a learned ratio for each channel or group, or one for all.

    For schemes whose numbers are in the units of the weight. `ratios`: (C, 1), (C, groups), or (1, 1). Raises
    ConfigError for other schemes.
    """

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        self.full, self.size = layer.numbers_by_row(), layer.group_size
        n_channels, n_columns = layer.weight.shape[:2].numel(), layer.weight.shape[2]
        n_groups = 1 if self.size is None else -(-n_columns // self.size)
        is_one = self.size is None and not any(n.numel() == n_channels > 1 for n in self.full.values())
        self.shape = (1, 1) if is_one else (n_channels, n_groups)
        self.low, self.high = _ends(layer)

    def ratios(self) -> Tensor:
        """Return the ratio of each channel and group, with gradients."""
        raise NotImplementedError

    def spread(self, ratios: Tensor) -> Tensor:
        """Return the ratio of each weight, as the weight."""
        layer = self.layer
        if self.size is not None:
            ratios = ratios.repeat_interleave(self.size, 1)[:, : layer.weight.shape[-1]]
        return ratios if len(ratios) == 1 else ratios.view(*layer.weight.shape[:2], -1)

    def on_grid(self, weight: Tensor) -> Tensor:
        """Quantize a weight on the stretched grid; the gradient reaches the weight, and the ratio, as in LSQ."""
        ratio = self.spread(self.ratios())
        x = weight / ratio
        value = self.layer.quantized(x.detach())
        inside = ((x >= self.low) & (x <= self.high)).to(x.dtype)
        return pass_through(x, value, inside) * ratio

    def numbers(self) -> dict[str, Tensor]:
        """Return the numbers of the quantizer on the stretched grid."""
        return stretched(self.full, self.ratios().detach(), self.layer.weight.shape[-1], self.size)


class LearnedRatio(StretchedWeight):
    """Has the ratios as parameters, 1 at first. `fixed`: levels that are stretched as they are, if given."""

    def __init__(self, layer: Layer, fixed: Tensor | None = None) -> None:
        super().__init__(layer)
        self.fixed = fixed
        self.ratio = nn.Parameter(layer.weight.new_ones(self.shape))

    def ratios(self) -> Tensor:
        return self.ratio.clamp_min(1e-3)

    def value(self) -> Tensor:
        if self.fixed is not None:
            return self.fixed * self.spread(self.ratios())
        return self.on_grid(self.layer.weight)


def _ends(layer: Layer) -> tuple[Tensor, Tensor]:
    """Return, for each weight, the points half a gap below the lowest level and above the highest."""
    low, high = (layer.quantized(torch.full_like(layer.weight, sign * BEYOND)) for sign in (-1, 1))
    (lowest, second), (last_but_one, highest) = (
        layer.neighbours(end + NEAR * (other - end)) for end, other in ((low, high), (high, low))
    )
    return low - (second - lowest) / 2, high + (highest - last_but_one) / 2


def stretched(full: Mapping[str, Tensor], ratios: Tensor, n_columns: int, size: int | None) -> dict[str, Tensor]:
    """Multiply numbers by a ratio for each channel, (C, 1), or group, (C, groups); one number for all by the median.

    A shorter last group has numbers of its own, `last_NAME`.
    """
    if size is not None:
        own = {"whole": ratios[:, : n_columns // size].flatten(), "last": ratios[:, -1]}
        return {name: number * own[name.partition("_")[0]].to(number) for name, number in full.items()}
    one, each = ratios.median(), ratios.flatten()
    return {n: number * (each.to(number) if number.numel() == len(each) > 1 else one) for n, number in full.items()}


def stretch_activations(
    block: Block, data: BlockData, weights: Mapping[str, Tensor], steps: int, rate: float, drop: float
) -> None:
    """Learn the ranges of a block's activations, as ratios to what they are, with its weights fixed.

    They are kept where the error falls. Quantizers without numbers, such as a scale for each token, stay.
    """
    learned = {
        key: ActivationInTraining(q, drop, data.generator) for key, q in block.activations().items() if q.numbers()
    }
    former = {key: {name: n.clone() for name, n in a.quantizer.numbers().items()} for key, a in learned.items()}
    fixed = {path: FixedWeight(block.layers[path], weight) for path, weight in weights.items()}
    with block.replaced(fixed):
        before = data.error()
    with block.replaced(fixed, learned):
        optimize(data, [([a.ratio for a in learned.values()], rate)], steps, drop)
    for key, a in learned.items():
        ratio = a.ratio.detach().clamp_min(1e-3)
        a.quantizer.set_numbers(**{name: number * ratio for name, number in former[key].items()})
    with block.replaced(fixed):
        after = data.error()
    if not after <= before:
        for key, a in learned.items():
            a.quantizer.set_numbers(**former[key])
