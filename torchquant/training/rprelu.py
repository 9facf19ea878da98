"""The activation of ReActNet: a PReLU whose corner is learned."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchquant._arguments import checked
from torchquant.errors import ConfigError
from torchquant.qmodule import ActivationPattern, register_pattern


@checked
class RPReLU(nn.Module):
    """Computes `prelu(x - gamma) + zeta` with slope beta below, all learned.

    Source: Liu et al. 2020, ReActNet, arXiv:2003.03488, eq. 4.
    `num_parameters`: 1, or the number of channels on axis 1, each with its own numbers. `init`: the slope at the start.
    Quantization keeps it in float, or fuses it behind a layer as it does nn.PReLU. Raises ConfigError.

    >>> RPReLU(3)(torch.tensor([[-1.0, 0.0, 2.0]]))
    tensor([[-0.2500,  0.0000,  2.0000]], grad_fn=<AddBackward0>)
    """

    def __init__(self, num_parameters: int = 1, init: float = 0.25) -> None:
        super().__init__()
        if num_parameters < 1:
            raise ConfigError(f"num_parameters must be at least 1, got {num_parameters}")
        if not math.isfinite(init):
            raise ConfigError(f"init must be a finite slope, got {init}")
        self.gamma = nn.Parameter(torch.zeros(num_parameters))
        self.zeta = nn.Parameter(torch.zeros(num_parameters))
        self.beta = nn.Parameter(torch.full((num_parameters,), float(init)))

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation of x, (N, channels, ...)."""
        shape = [-1] + [1] * (x.ndim - 2)
        return F.prelu(x - self.gamma.view(shape), self.beta) + self.zeta.view(shape)


register_pattern(RPReLU, ActivationPattern())
