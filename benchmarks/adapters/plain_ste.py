"""The formula as in the code of most papers: five eager operators and a bool mask. For reference.

`x_hat = (clamp(round(x / delta) + z, qmin, qmax) - z) * delta`; the gradient passes where the code did
not saturate.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.adapters._ranges import ChannelAbsmaxQuantizer, EmaRangeQuantizer
from benchmarks.adapters.base import Adapter
from torchquant.quantizers import Quantizer


class _FiveOps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor, zero_point: Tensor | int, qmin: int, qmax: int) -> Tensor:
        codes = torch.round(x / delta) + zero_point
        ctx.save_for_backward((codes >= qmin) & (codes <= qmax))
        return (torch.clamp(codes, qmin, qmax) - zero_point) * delta

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        return grads[0] * mask, None, None, None, None


class _PlainActs(EmaRangeQuantizer):
    def quantize(self, x: Tensor) -> Tensor:
        return _FiveOps.apply(x, *self.params(), 0, 255)


class _PlainWeight(ChannelAbsmaxQuantizer):
    def quantize(self, x: Tensor) -> Tensor:
        return _FiveOps.apply(x, self.delta.view(-1, *[1] * (x.ndim - 1)), 0, -127, 127)


class PlainSteAdapter(Adapter):
    name = "plain five-op STE"

    def weight_quantizer(self, layer: nn.Module) -> Quantizer:
        return _PlainWeight()

    def acts_quantizer(self, layer: nn.Module) -> Quantizer:
        return _PlainActs()
