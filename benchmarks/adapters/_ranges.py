"""Track ranges for libraries that have an operator but no observer, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from torchquant.quantizers import Quantizer

_SMALLEST_STEP = 1e-12


class EmaRangeQuantizer(Quantizer):
    """Tracks minimum and maximum with an exponential average. A subclass writes `quantize`."""

    n_bits = 8

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("range", torch.zeros(2))
        self.has_range = False

    @property
    def is_ready(self) -> bool:
        return self.has_range

    @torch.no_grad()
    def pre_observe(self, x: Tensor) -> None:
        batch_range = torch.stack(torch.aminmax(x))
        self.range.lerp_(batch_range, 0.1 if self.has_range else 1.0)
        self.has_range = True

    def params(self) -> tuple[Tensor, Tensor]:
        """Return (delta, zero point) for codes 0..255, () each."""
        low, high = self.range[0].clamp_max(0.0), self.range[1].clamp_min(0.0)
        delta = ((high - low) / 255).clamp_min(_SMALLEST_STEP)
        return delta, torch.round(-low / delta)


class ChannelAbsmaxQuantizer(Quantizer):
    """Takes the largest magnitude of each slice of axis 0. A subclass writes `quantize`."""

    n_bits = 8
    axis = 0

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("delta", torch.ones(1))
        self.has_range = False

    def allocate(self, n_channels: int) -> None:
        self.delta = torch.ones(n_channels)

    @property
    def is_ready(self) -> bool:
        return self.has_range

    @torch.no_grad()
    def pre_observe(self, x: Tensor) -> None:
        self.delta.copy_((x.abs().flatten(1).amax(1) / 127).clamp_min(_SMALLEST_STEP))
        self.has_range = True
