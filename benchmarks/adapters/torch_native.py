"""torch's own operators `fake_quantize_per_tensor_affine` and `fake_quantize_per_channel_affine`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.adapters._ranges import ChannelAbsmaxQuantizer, EmaRangeQuantizer
from benchmarks.adapters.base import Adapter
from torchquant.quantizers import Quantizer


class _NativeActs(EmaRangeQuantizer):
    def quantize(self, x: Tensor) -> Tensor:
        delta, zero_point = self.params()
        return torch.fake_quantize_per_tensor_affine(x, delta, zero_point.to(torch.int32), 0, 255)


class _NativeWeight(ChannelAbsmaxQuantizer):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("zero_point", torch.zeros(1, dtype=torch.int32))

    def allocate(self, n_channels: int) -> None:
        super().allocate(n_channels)
        self.zero_point = torch.zeros(n_channels, dtype=torch.int32)

    def quantize(self, x: Tensor) -> Tensor:
        return torch.fake_quantize_per_channel_affine(x, self.delta, self.zero_point, 0, -127, 127)


class TorchNativeAdapter(Adapter):
    name = "torch.fake_quantize"

    def weight_quantizer(self, layer: nn.Module) -> Quantizer:
        return _NativeWeight()

    def acts_quantizer(self, layer: nn.Module) -> Quantizer:
        return _NativeActs()
