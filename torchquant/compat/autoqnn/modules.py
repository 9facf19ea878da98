"""AutoQNN's layers: `Conv2d(3, 8, 3, weight_quant=..., act_quant=...)`.

Each is a QWrapper (Bilinear a QWeights) with its activation quantizer at the input; it quantizes as its train and eval
modes say: in training it observes and quantizes, in evaluation it quantizes. `layer` is the torch layer inside.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from torchquant.compat._modes import state_for
from torchquant.qmodule import QModule, QWeights, QWrapper
from torchquant.quantizers import Quantizer


class QuantLayer(QModule):
    """The base of AutoQNN's layers: the names of their quantizers."""

    kind: ClassVar[type[nn.Module]]
    """The torch layer inside."""

    @property
    def weight_quant(self) -> Quantizer | None:
        """The quantizer of the weight."""
        return self.quantizers().get("weight")

    @property
    def bias_quant(self) -> Quantizer | None:
        """The quantizer of the bias."""
        return self.quantizers().get("bias")

    @property
    def act_quant(self) -> Quantizer | None:
        """The quantizer of the input."""
        return self.quantizers().get("input")

    def _follow_mode(self) -> None:
        state = state_for(self)
        if self.state is not state:
            self.state = state


class _Wrapped(QWrapper, QuantLayer):
    def __init__(
        self,
        *args: Any,
        weight_quant: Quantizer | None = None,
        bias_quant: Quantizer | None = None,
        act_quant: Quantizer | None = None,
        **kwargs: Any,
    ) -> None:
        layer = self.kind(*args, **kwargs)
        super().__init__(layer, weight_quant, None, input_quantizer=act_quant, bias_quantizer=bias_quant)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self._follow_mode()
        return super().forward(*args, **kwargs)


class Conv1d(_Wrapped):
    """nn.Conv1d, quantized."""

    kind = nn.Conv1d


class Conv2d(_Wrapped):
    """nn.Conv2d, quantized.

    >>> import torch
    >>> from torchquant.compat.autoqnn.quantizers import FixedQuant, FixedQuantAct
    >>> layer = Conv2d(3, 4, 3, weight_quant=FixedQuant(4), act_quant=FixedQuantAct(4))
    >>> layer(torch.randn(1, 3, 8, 8)).shape
    torch.Size([1, 4, 6, 6])
    """

    kind = nn.Conv2d


class Conv3d(_Wrapped):
    """nn.Conv3d, quantized."""

    kind = nn.Conv3d


class ConvTranspose1d(_Wrapped):
    """nn.ConvTranspose1d, quantized."""

    kind = nn.ConvTranspose1d


class ConvTranspose2d(_Wrapped):
    """nn.ConvTranspose2d, quantized."""

    kind = nn.ConvTranspose2d


class ConvTranspose3d(_Wrapped):
    """nn.ConvTranspose3d, quantized."""

    kind = nn.ConvTranspose3d


class Linear(_Wrapped):
    """nn.Linear, quantized."""

    kind = nn.Linear


class Bilinear(QWeights, QuantLayer):
    """nn.Bilinear, quantized; the bias and the second input stay float."""

    kind = nn.Bilinear

    def __init__(
        self, *args: Any, weight_quant: Quantizer | None = None, act_quant: Quantizer | None = None, **kwargs: Any
    ) -> None:
        weights = {} if weight_quant is None else {"weight": weight_quant}
        super().__init__(nn.Bilinear(*args, **kwargs), weights, None, act_quant)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self._follow_mode()
        return super().forward(*args, **kwargs)


LAYERS: tuple[type[Any], ...] = (
    *(Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d),
    *(Linear, Bilinear),
)
