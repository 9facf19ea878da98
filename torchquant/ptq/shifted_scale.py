"""A scale behind a shift, which is folded into biases."""

from __future__ import annotations

from torch import Tensor

from torchquant._tensors import channel_view
from torchquant.qmodule import ChannelScale


class ShiftedScale(ChannelScale):
    """Takes a shift, (K,), off each input channel and multiplies the rest by a factor; biases make good the shift.

    It is folded into what gives the channels, and never stands before a layer.
    """

    def __init__(self, factor: Tensor, shift: Tensor, axis: int = -1) -> None:
        super().__init__(factor, axis)
        self.shift = shift.detach().clone()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - channel_view(self.shift.to(x), -self.axis, 0))
