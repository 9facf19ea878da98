"""AutoQNN's linear layers."""

from __future__ import annotations

from torch import nn

from torchquant.compat.autoqnn.modules._layer import Weighted, Wrapped


class Linear(Wrapped):
    """nn.Linear, quantized."""

    kind = nn.Linear


class Bilinear(Weighted):
    """nn.Bilinear, quantized; the bias stays float."""

    kind = nn.Bilinear
