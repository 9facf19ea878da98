"""Ends of a path, which can absorb a factor for each channel: rows and columns of a weight, norms, parameters.

`paths.py` finds which of them share their channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torchquant.errors import ConfigError
from torchquant.ptq.functional.biases import absorbed_output
from torchquant.ptq.functional.equalization import input_ranges, output_ranges
from torchquant.ptq.work import add_to_output, bias_of
from torchquant.qmodule.bn_folding import running_bias
from torchquant.qmodule.weight_slots import LayerSlot, WeightSlot


def _none() -> Tensor:
    return torch.empty(0, dtype=torch.int64)


@dataclass(eq=False)
class End(ABC):
    """One side of a layer, a norm or a parameter, whose channels can each take a factor.

    `path`: its module, or the parameter. `slot`: the weight in a QModule that it is part of, or the layer whose folded
    batch norm it is; None for others. `index`: (C,), the channel
    of the set that each of its own channels is, -1 for one that must stay as it is. `ids`: the same in the whole model.
    `family`: how its tensors are used; a tensor that is used in two ways takes no factor.
    """

    path: str
    family: str = field(repr=False)
    slot: WeightSlot | None = field(repr=False)
    tensors: tuple[Tensor, ...] = field(repr=False)
    ids: Tensor = field(default_factory=_none, repr=False)
    index: Tensor = field(default_factory=_none, repr=False)

    @abstractmethod
    def multiply(self, factors: Tensor) -> None:
        """Multiply each channel by its factor, (C,): what a producer gives, how much of it a reader takes."""

    def rotate(self, rotation: Tensor) -> None:
        """Multiply each run of d channels, as a row vector, by a matrix (d, d)."""
        raise ConfigError(f"{self.path} treats each channel by itself and cannot be rotated")

    bias: Tensor | None = field(default=None, repr=False)
    """The bias that is added to its channels, or by a reader to its output."""

    @property
    def is_quantized(self) -> bool:
        """Tell whether it is part of a quantized weight."""
        return self.slot is not None and self.slot.quantizer is not None

    def scale(self, factors: Tensor) -> None:
        """Multiply the channels by the factors of the set, (n,)."""
        own = torch.where(self.index < 0, 1.0, factors.detach().cpu()[self.index])
        if self.slot is not None and self.slot.quantizer is not None and self.slot.quantizer.is_pinned:
            raise ConfigError(f"{self.path} has been rounded already; change the structure of a model before that")
        self.multiply(own)


@dataclass(eq=False)
class _OfProduct(End):
    """A side of a product. `first`: whether its channels are the first axis of the weight, which spans all groups."""

    groups: int = 1
    first: bool = True

    def _multiply_weight(self, factors: Tensor) -> None:
        weight = self.tensors[0]
        shape = (self.groups, -1, 1) if self.first else (self.groups, 1, -1)
        view = weight.view(self.groups, -1, *weight.shape[1:])
        view.mul_(factors.to(weight).view(*shape, *[1] * (weight.ndim - 2)))

    def rotate(self, rotation: Tensor) -> None:
        weight = self.tensors[0]
        axis = 0 if self.first else 1
        weight.copy_(in_runs(weight.movedim(axis, -1), rotation).movedim(-1, axis))


class Rows(_OfProduct):
    """The output channels of a linear layer or convolution, with their biases."""

    def rotate(self, rotation: Tensor) -> None:
        super().rotate(rotation)
        if self.bias is not None:
            self.bias.copy_(in_runs(self.bias, rotation))

    def multiply(self, factors: Tensor) -> None:
        self._multiply_weight(factors)
        if self.bias is not None:
            self.bias.mul_(factors.to(self.bias))


@dataclass(eq=False)
class Columns(_OfProduct):
    """The input channels of a linear layer or convolution. `padding`: whether zeros are put around its input."""

    is_padded: bool = False

    def multiply(self, factors: Tensor) -> None:
        self._multiply_weight(factors)

    @property
    def has_bias(self) -> bool:
        """Whether its output has a bias that can be changed."""
        return (self.bias if self.slot is None else bias_of(self.slot)) is not None

    def absorb(self, shift: Tensor) -> None:
        """Add to the bias what an input larger by (C,) adds to the output. Raises ConfigError without a bias."""
        held = (self.bias, None) if self.slot is None else bias_of(self.slot)
        if held is None or held[0] is None:
            raise ConfigError(f"{self.path} has no bias that could take over that of the layer before it")
        added = absorbed_output(self._channels_first(), shift.to(held[0]), self.groups)
        add_to_output((held[0], held[1]), added)

    def _channels_first(self) -> Tensor:
        if self.slot is not None:
            return self.slot.seen()
        weight = self.tensors[0]
        return weight.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1) if self.first else weight


class Parameters(End):
    """Parameters that stand for channels themselves: scale and shift of a norm, an embedding, a summand."""

    def multiply(self, factors: Tensor) -> None:
        for tensor in self.tensors:
            tensor.mul_(factors.to(tensor).view(tensor.shape if tensor.numel() == len(factors) else (-1,)))

    def rotate(self, rotation: Tensor) -> None:
        for tensor in self.tensors:
            tensor.copy_(in_runs(tensor, rotation))


@dataclass(eq=False)
class Scale(Parameters):
    """Scale and shift of a norm, or a parameter that a value is multiplied with, plus `offset`."""

    offset: float = 0.0

    def multiply(self, factors: Tensor) -> None:
        self.tensors[0].add_(self.offset)
        super().multiply(factors)
        self.tensors[0].sub_(self.offset)

    def rotate(self, rotation: Tensor) -> None:
        """Rotate what is added behind the scale, which is the same for all channels."""
        if self.bias is not None:
            self.bias.copy_(in_runs(self.bias, rotation))

    def values(self) -> Tensor:
        """Factors of the channels, (C,) float64."""
        return self.tensors[0].detach().double().flatten().cpu() + self.offset


@dataclass(eq=False)
class NormInput(End):
    """The input of a batch norm: its running mean and variance, and its weight for what eps hides of them."""

    eps: float = 1e-5

    def multiply(self, factors: Tensor) -> None:
        mean, variance, *weight = self.tensors
        factors = factors.to(mean)
        mean.div_(factors)
        power = (variance + self.eps) / factors.square()
        variance.copy_(power - self.eps if not weight else (power - self.eps).clamp_min(0.0))
        for each in weight:
            each.mul_(((variance + self.eps) / power).sqrt())


def in_runs(x: Tensor, rotation: Tensor) -> Tensor:
    """Multiply each run of d elements of the last axis by a matrix (d, d), in its type; returns x's type.

    >>> in_runs(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))
    tensor([-2.,  1., -4.,  3.])
    """
    parts = x.to(torch.promote_types(x.dtype, rotation.dtype)).unflatten(-1, (-1, len(rotation)))
    return (parts @ rotation.to(parts)).flatten(-2).to(x.dtype)


def row_ranges(slot: WeightSlot, bias_weight: float | None = None) -> Tensor:
    """The largest weight of each output channel, batch norm folded in, (C,); see `output_ranges` for `bias_weight`."""
    bias = folded_bias(slot)
    if bias is None or bias_weight is None:
        return output_ranges(slot.seen().detach())
    return output_ranges(slot.seen().detach(), bias.detach(), bias_weight)


def folded_bias(slot: WeightSlot) -> Tensor | None:
    """The bias behind the weight as QUANT_EVAL has it, batch norm folded in, (C,); None if there is none."""
    if isinstance(slot, LayerSlot) and slot.module.fold_mode is not None:
        return running_bias(slot.module.bn, slot.module.bias_in_use)
    return slot.bias


def column_ranges(reader: Columns) -> Tensor:
    """The largest weight of each input channel, (C,)."""
    assert reader.slot is not None
    return input_ranges(reader.slot.seen().detach(), reader.groups)
