"""The base of AutoQNN's layers: the names of their quantizers, and states that follow train and eval mode."""

from __future__ import annotations

import copy
from typing import Any, ClassVar, TypeVar

from torch import nn

from torchquant.compat._modes import state_for
from torchquant.errors import ConfigError
from torchquant.qmodule import QModule, QWeights, QWrapper
from torchquant.qmodule.weights import weight_names
from torchquant.quantizers import Quantizer

L = TypeVar("L", bound="QuantLayer")
QUANTIZERS = ("weight_quant", "bias_quant", "act_quant")


class QuantLayer(QModule):
    """The base of AutoQNN's layers. `weight_quant`, `bias_quant`, `act_quant` read and set its quantizers."""

    kind: ClassVar[type[nn.Module]] = nn.Module
    """The torch layer inside."""

    @classmethod
    def from_module(cls: type[L], mod: nn.Module) -> L:
        """Make the layer around a copy of a torch layer, without quantizers. Raises ConfigError."""
        if not isinstance(mod, cls.kind):
            raise ConfigError(f"{cls.__name__} holds a {cls.kind.__name__}, got {type(mod).__name__}")
        made = cls.__new__(cls)
        made._wrap(copy.deepcopy(mod), None, None, None, True)
        return made

    def _wrap(
        self,
        layer: nn.Module,
        weight: Quantizer | None,
        bias: Quantizer | None,
        act: Quantizer | None,
        pre_act_quant: bool,
    ) -> None:
        """Run the constructor of the QModule."""
        raise NotImplementedError

    @property
    def weight_quant(self) -> Any:
        """The quantizer of the weight, or a dictionary of those of several weights."""
        several = self._modules.get("weight_quantizers")
        return self.quantizers().get("weight") or (several if several is not None and len(several) else None)  # type: ignore[arg-type]

    @property
    def bias_quant(self) -> Quantizer | None:
        """The quantizer of the bias."""
        return self.quantizers().get("bias")

    @property
    def act_quant(self) -> Quantizer | None:
        """The quantizer of the input, or of the output with `pre_act_quant=False`."""
        own = self.quantizers()
        return own.get("input") or own.get("output")

    @property
    def pre_act_quant(self) -> bool:
        """Whether activations are quantized at the input of the layer, not at its output."""
        return "output" not in self.quantizers()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in QUANTIZERS and not isinstance(value, Quantizer):
            raise ConfigError(f"{name} must be a quantizer, got {value!r}; Quantization() quantizes nothing")
        if name == "weight_quant":
            for slot in self.weight_slots():
                quantizer = copy.deepcopy(value)
                quantizer.allocate_for(slot.seen())
                slot.replace_quantizer(quantizer.to(slot.weight.device))
        elif name == "bias_quant":
            self.bias_quantizer = value
        elif name == "act_quant":
            self.replace_quantizer("input" if self.pre_act_quant else "output", value)
        else:
            super().__setattr__(name, value)

    def _follow_mode(self) -> None:
        state = state_for(self)
        if self.state is not state:
            self.state = state


class Wrapped(QWrapper, QuantLayer):
    """A layer with one weight; of any class that `register_pattern` knows."""

    def __init__(
        self,
        *args: Any,
        weight_quant: Quantizer | None = None,
        bias_quant: Quantizer | None = None,
        act_quant: Quantizer | None = None,
        pre_act_quant: bool = True,
        **kwargs: Any,
    ) -> None:
        self._wrap(self.kind(*args, **kwargs), weight_quant, bias_quant, act_quant, pre_act_quant)

    def _wrap(
        self,
        layer: nn.Module,
        weight: Quantizer | None,
        bias: Quantizer | None,
        act: Quantizer | None,
        pre_act_quant: bool,
    ) -> None:
        places = {"input_quantizer" if pre_act_quant else "acts_quantizer": act}
        QWrapper.__init__(self, layer, weight, bias_quantizer=bias, **places)  # type: ignore[arg-type]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self._follow_mode()
        return super().forward(*args, **kwargs)


class Weighted(QWeights, QuantLayer):
    """A module with several weights, or a lookup; each weight has a quantizer of its own, biases stay float."""

    def __init__(
        self,
        *args: Any,
        weight_quant: Quantizer | None = None,
        act_quant: Quantizer | None = None,
        pre_act_quant: bool = True,
        **kwargs: Any,
    ) -> None:
        self._wrap(self.kind(*args, **kwargs), weight_quant, None, act_quant, pre_act_quant)

    def _wrap(
        self,
        layer: nn.Module,
        weight: Quantizer | None,
        bias: Quantizer | None,
        act: Quantizer | None,
        pre_act_quant: bool,
    ) -> None:
        weights = {} if weight is None else {name: copy.deepcopy(weight) for name in weight_names(layer)}
        places = {"input_quantizer" if pre_act_quant else "acts_quantizer": act}
        QWeights.__init__(self, layer, weights, **places)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self._follow_mode()
        return super().forward(*args, **kwargs)
