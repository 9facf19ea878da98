"""The state machine: when a QModule observes and when it quantizes."""

from __future__ import annotations

from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from torchquant._shown import shown
from torchquant.errors import ConfigError, UnobservedRangeError
from torchquant.qmodule.patterns import activation_clamp
from torchquant.quantizers import Quantizer


class QModuleState(Enum):
    """Truth table: observe weight, observe activations, quantize weight, quantize activations."""

    # fmt: off
    BYPASSED                      = (False, False, False, False)
    CALIBRATION                   = (True,  True,  False, False)
    CALIBRATION_WEIGHT_ONLY       = (True,  False, False, False)
    CALIBRATION_ACT_ONLY          = (False, True,  False, False)
    QUANT_AWARE_TRAIN             = (True,  True,  True,  True)
    QUANT_AWARE_TRAIN_WEIGHT_ONLY = (True,  False, True,  False)
    QUANT_AWARE_TRAIN_ACT_ONLY    = (False, True,  False, True)
    QUANT_EVAL                    = (False, False, True,  True)
    QUANT_EVAL_WEIGHT_ONLY        = (False, False, True,  False)
    QUANT_EVAL_ACT_ONLY           = (False, False, False, True)
    # fmt: on

    def __init__(self, observe_w: bool, observe_a: bool, quantize_w: bool, quantize_a: bool) -> None:
        self.is_weight_observed = observe_w
        self.is_act_observed = observe_a
        self.is_weight_quantized = quantize_w
        self.is_act_quantized = quantize_a


_STATES = list(QModuleState)


def is_real(value: Any) -> bool:
    """Whether a value is a tensor of real numbers."""
    return isinstance(value, Tensor) and value.is_floating_point()


class QModule(nn.Module):
    """A module with a state. `.train()` and `.eval()` never change it; `set_qmodule_state` does.

    The state is saved in the `state_dict`, as a tensor, beside everything else.
    """

    def __init__(self) -> None:
        super().__init__()
        self._state = QModuleState.BYPASSED
        self._seen: list[tuple[Tensor, int]] = []
        """The tensors behind the weight observed last, and their versions."""
        self.path = ""
        """Where the module sits in its model; written by `set_qmodule_state`, read by messages."""

    @property
    def state(self) -> QModuleState:
        """What the module does. Entering a state, also the same one, observes an unchanged weight anew."""
        return self._state

    @state.setter
    def state(self, state: QModuleState) -> None:
        if not isinstance(state, QModuleState):
            raise ConfigError(f"state must be a QModuleState, such as QModuleState.QUANT_EVAL; got {shown(state)}")
        self._state = state
        self._seen = []

    def __getattr__(self, name: str) -> Any:
        """What a wrapper of a `layer` has not is the layer's: `weight`, `in_channels`, ..."""
        modules = self.__dict__.get("_modules", {})
        if name in modules or "layer" not in modules or name.startswith("_"):
            return super().__getattr__(name)
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(modules["layer"], name)

    def quantizers(self) -> dict[str, Quantizer]:
        """Site name ("weight", "bias", "input", "output") -> quantizer, for the sites that have one."""
        sites = {
            "weight": "weight_quantizer",
            "bias": "bias_quantizer",
            "input": "input_quantizer",
            "output": "acts_quantizer",
        }
        found = {site: getattr(self, name, None) for site, name in sites.items()}
        return {site: quantizer for site, quantizer in found.items() if quantizer is not None}

    def weights(self) -> list[tuple[str, Tensor, Quantizer | None]]:
        """(name, real weight, its quantizer or None) of every weight the module holds itself."""
        return []

    def observe_weight(self) -> None:
        """Show each weight quantizer its weight as it is now. Needs no data."""

    def _quantize_site(self, site: str, quantizer: Quantizer, x: Tensor, **kwargs: Any) -> Tensor:
        if not quantizer.is_ready:
            raise UnobservedRangeError(
                f"{self.path or type(self).__name__}: the {site} quantizer ({type(quantizer).__name__}) has seen no "
                "data. Run a batch in QModuleState.CALIBRATION (or QUANT_AWARE_TRAIN), or set its range by hand "
                "with force_ranges(min, max)"
            )
        quantized = quantizer(x, **kwargs)
        quantizer.post_observe(quantized)
        return quantized

    def _run_acts_quantizer(
        self, site: str, quantizer: Quantizer | None, x: Tensor, activation: nn.Module | None = None
    ) -> Tensor:
        """Apply `activation`, then observe and quantize as the state says; in one pass where it can be."""
        # an operator may also work on sizes
        if quantizer is None or not is_real(x) or not (self.state.is_act_observed or self.state.is_act_quantized):
            return x if activation is None else activation(x)
        clamp = None
        if activation is not None:
            if self.state.is_act_quantized and quantizer.fuses_clamp:
                clamp = activation_clamp(activation)
            x = activation(x) if clamp is None else x
        kwargs = {} if clamp is None else {"clamp": clamp}
        if self.state.is_act_observed:
            quantizer.pre_observe(x, **kwargs)
        return self._quantize_site(site, quantizer, x, **kwargs) if self.state.is_act_quantized else x

    def get_extra_state(self) -> Tensor:
        return torch.tensor(_STATES.index(self.state), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        index = int(state)
        if not 0 <= index < len(_STATES):
            raise ConfigError(f"a saved QModule state must be 0..{len(_STATES) - 1}, got {index}")
        self.state = _STATES[index]
