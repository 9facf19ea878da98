"""AutoQNN's convolutions."""

from __future__ import annotations

from torch import nn

from torchquant.compat.autoqnn.modules._layer import Wrapped


class Conv1d(Wrapped):
    """nn.Conv1d, quantized."""

    kind = nn.Conv1d


class Conv2d(Wrapped):
    """nn.Conv2d, quantized.

    >>> import torch
    >>> from torchquant.compat.autoqnn.quantizers import FixedQuant, FixedQuantAct
    >>> layer = Conv2d(3, 4, 3, weight_quant=FixedQuant(4), act_quant=FixedQuantAct(4))
    >>> layer(torch.randn(1, 3, 8, 8)).shape
    torch.Size([1, 4, 6, 6])
    """

    kind = nn.Conv2d


class Conv3d(Wrapped):
    """nn.Conv3d, quantized."""

    kind = nn.Conv3d


class ConvTranspose1d(Wrapped):
    """nn.ConvTranspose1d, quantized."""

    kind = nn.ConvTranspose1d


class ConvTranspose2d(Wrapped):
    """nn.ConvTranspose2d, quantized."""

    kind = nn.ConvTranspose2d


class ConvTranspose3d(Wrapped):
    """nn.ConvTranspose3d, quantized."""

    kind = nn.ConvTranspose3d
