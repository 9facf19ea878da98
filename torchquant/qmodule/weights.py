"""QWeights: a module with weights of any number and an odd call, such as LSTM, whose weights can quantize."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from torchquant._arguments import checked
from torchquant.errors import ConfigError, UnsupportedPatternError
from torchquant.qmodule.state import QModule
from torchquant.quantizers import Quantizer

WEIGHTED: tuple[type[nn.Module], ...] = (
    nn.Bilinear,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.LSTM,
    nn.GRU,
    nn.RNN,
    nn.LSTMCell,
    nn.GRUCell,
    nn.RNNCell,
    nn.MultiheadAttention,
)
"""What QWeights wraps: exactly these classes, subclasses may run otherwise."""


def weight_names(module: nn.Module) -> list[str]:
    """Names of the parameters of the module that are weights; [] for a class that is not in `WEIGHTED`.

    >>> weight_names(nn.GRUCell(3, 2))
    ['weight_ih', 'weight_hh']
    >>> weight_names(nn.MultiheadAttention(4, 2))
    ['in_proj_weight', 'out_proj.weight']
    """
    if type(module) not in WEIGHTED:
        return []
    return [name for name, _ in module.named_parameters() if "weight" in name.rpartition(".")[2]]


@checked
class QWeights(QModule):
    """Wraps one of Bilinear, Embedding, EmbeddingBag, LSTM, GRU, RNN, their cells, MultiheadAttention.

    `weight_quantizers`: name of a weight (`weight_names`) -> its quantizer; a weight that is not named stays
    float. `acts_quantizer` sees the output, the first one where there are several; `input_quantizer` the first
    input, if it is real. What such a module computes inside, between its weights, stays float.

    The call is that of the module; in BYPASSED it is the module. Raises UnsupportedPatternError, ConfigError.

    >>> from torchquant.quantizers import AffineQuantizer
    >>> from torchquant.range_observers import BatchMinMax
    >>> table = QWeights(nn.Embedding(10, 4), {"weight": AffineQuantizer(8, BatchMinMax(axis=0))})
    >>> table(torch.tensor([1, 2])).shape
    torch.Size([2, 4])
    """

    def __init__(
        self,
        layer: nn.Module,
        weight_quantizers: Mapping[str, Quantizer],
        acts_quantizer: Quantizer | None = None,
        input_quantizer: Quantizer | None = None,
    ) -> None:
        super().__init__()
        names = weight_names(layer)
        if not names:
            allowed = ", ".join(kind.__name__ for kind in WEIGHTED)
            raise UnsupportedPatternError(f"QWeights wraps {allowed}; got {type(layer).__name__}")
        unknown = set(weight_quantizers) - set(names)
        if unknown:
            raise ConfigError(f"{type(layer).__name__} has the weights {', '.join(names)}; got {sorted(unknown)}")
        self.layer: Any = layer
        self.weight_quantizers = nn.ModuleDict({quantizer_key(name): q for name, q in weight_quantizers.items()})
        self._names = {quantizer_key(name): name for name in weight_quantizers}
        self.acts_quantizer = acts_quantizer
        self.input_quantizer = input_quantizer
        for name, quantizer in weight_quantizers.items():
            weight = layer.get_parameter(name)
            quantizer.allocate(weight.shape[0])
            quantizer.to(weight.device)

    def quantizers(self) -> dict[str, Quantizer]:
        weights = {self._names[key]: quantizer for key, quantizer in self.weight_quantizers.items()}
        return {**weights, **super().quantizers()}  # type: ignore[dict-item]

    def weights(self) -> list[tuple[str, Tensor, Quantizer | None]]:
        own = self.quantizers()
        return [(name, self.layer.get_parameter(name), own.get(name)) for name in weight_names(self.layer)]

    @torch.no_grad()
    def observe_weight(self) -> None:
        for _, weight, quantizer in self.weights():
            if quantizer is not None:
                quantizer.pre_observe(weight)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if args:
            args = (self._run_acts_quantizer("input", self.input_quantizer, args[0]), *args[1:])
        if self.state.is_weight_observed:
            self.observe_weight()
        if self.state.is_weight_quantized:
            quantized = {
                name: self._quantize_site(name, quantizer, weight)
                for name, weight, quantizer in self.weights()
                if quantizer is not None
            }
            y = self._run(quantized, args, kwargs)
        else:
            y = self.layer(*args, **kwargs)
        if isinstance(y, tuple):
            return (self._run_acts_quantizer("output", self.acts_quantizer, y[0]), *y[1:])
        return self._run_acts_quantizer("output", self.acts_quantizer, y)

    def _run(self, weights: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        layer = self.layer
        if not isinstance(layer, nn.RNNBase):
            return functional_call(layer, weights, args, kwargs)
        own = layer._flat_weights  # what its forward reads, whatever its parameters are
        layer._flat_weights = [weights.get(n, w) for n, w in zip(layer._flat_weights_names, own, strict=True)]
        try:
            return layer(*args, **kwargs)
        finally:
            layer._flat_weights = own


def quantizer_key(name: str) -> str:
    """The key of a weight's quantizer in `QWeights.weight_quantizers`, which takes no dots."""
    return name.replace(".", "_")
