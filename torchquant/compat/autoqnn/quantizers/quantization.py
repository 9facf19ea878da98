"""AutoQNN's `Quantization`: the base of all of its quantizers, and of yours."""

from __future__ import annotations

import copy
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from torchquant.compat.autoqnn.quantizers._learned_width import learned_form
from torchquant.compat.autoqnn.quantizers.diff_tricks import BACKWARDS, DiffFunction, get_diff_func
from torchquant.errors import ConfigError
from torchquant.quantizers import Quantizer
from torchquant.range_observers._statistics import StatisticTracker

Q = TypeVar("Q", bound=Quantizer)


def round_clip(input: Tensor, min_val: Any, max_val: Any) -> Tensor:
    """Round to whole numbers, then clip."""
    return input.round().clip(min_val, max_val)


def bitloss(bit: Tensor, target: float) -> Tensor:
    """Compute the loss of a width above its target, `max(0, bit - target)**2`; AutoQNN names it and leaves it empty.

    >>> bitloss(torch.tensor(6.0), 4)
    tensor(4.)
    """
    return (bit - target).clamp_min(0.0).square()


def without_data(quantizer: Q) -> Q:
    """Copy a quantizer without its observed data."""
    clone = copy.deepcopy(quantizer)
    for part in clone.modules():
        if isinstance(part, StatisticTracker):
            part.reset()
    return clone


class Quantization(Quantizer):
    """The interface for a quantizer of your own; it quantizes nothing itself.

    Write `forward`, real to quantized tensor, with `self.diff_func(input, output, self.gradient_ratio)` as its last
    line: that is the gradient `backward_type` names. `bitwidth`: the bits. `per_channel`, `channel_axis`,
    `channel_size` are for your forward; the shipped classes take the number of channels from the tensor. Write
    `encode`, `decode` and `code_range` too, and it can be exported and packed.

    `freeze_bitwidth=False`: the width is a parameter, `float_bitwidth`, learned between 2 and `max_bitwidth`;
    `shadow_bitwidth` is the whole number of bits in use. The forward mixes the two nearest widths, each computed by a
    quantizer of this class; `core.precision_loss` pulls the mean width to `target_bitwidth`. Raises ConfigError.

    >>> class Sign(Quantization):
    ...     def forward(self, input):
    ...         return self.diff_func(input, input.detach().sign(), self.gradient_ratio)
    >>> Sign(bitwidth=1)(torch.tensor([0.3, -2.0]))
    tensor([ 1., -1.])
    """

    __constants__: ClassVar[list[str]] = [
        *("bitwidth", "gradient_ratio", "freeze_bitwidth", "target_bitwidth", "max_bitwidth", "backward_type"),
        *("per_channel", "channel_axis", "channel_size"),
    ]
    __backwards__ = BACKWARDS
    learns_width: ClassVar[bool] = False
    bitwidth: int
    gradient_ratio: float
    freeze_bitwidth: bool
    target_bitwidth: float
    max_bitwidth: int
    backward_type: str
    per_channel: bool
    channel_axis: int
    channel_size: int

    def __new__(cls, *args: Any, **kwargs: Any) -> Quantization:
        return object.__new__(learned_form(cls, args, kwargs))

    def __init__(
        self,
        bitwidth: int = 8,
        gradient_ratio: float = 0.0,
        freeze_bitwidth: bool = True,
        target_bitwidth: float = 4,
        max_bitwidth: int = 8,
        backward_type: str = "ste",
        per_channel: bool = False,
        channel_axis: int = 0,
        channel_size: int = 1,
    ) -> None:
        super().__init__()
        self.extra_args: list[str] = []
        given = (bitwidth, gradient_ratio, freeze_bitwidth, target_bitwidth, max_bitwidth, backward_type)
        self.set_arguments(*given, per_channel, channel_axis, channel_size)

    def set_arguments(self, *values: Any) -> None:
        """Keep the arguments of the constructor, in their order."""
        for name, value in zip(Quantization.__constants__, values, strict=True):
            setattr(self, name, value)
        self.n_bits = self.bitwidth
        self.diff_func: DiffFunction = get_diff_func(self.backward_type)
        if self.learns_width:
            return
        if self.freeze_bitwidth:
            self.float_bitwidth = torch.tensor(float(self.bitwidth))
            self.shadow_bitwidth = self.float_bitwidth.round()
        else:
            raise ConfigError(
                f"{type(self).__name__} must be constructed with freeze_bitwidth=False to learn its width; its own "
                "constructor cannot set it"
            )

    def quantize(self, x: Tensor) -> Tensor:
        return self.forward(x)

    def forward(self, x: Tensor) -> Tensor:
        """Return x: the base quantizes nothing."""
        return x

    def clone_quantizer(self) -> Quantization:
        """Copy the quantizer, with its arguments and parameters but without what it has observed."""
        return without_data(self)
