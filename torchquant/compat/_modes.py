"""Let a model quantize as its train and eval modes say, without setting states; for both dialects."""

from __future__ import annotations

from typing import Any

from torch import nn

from torchquant.qmodule import QModule, QModuleState
from torchquant.utils import qmodules


def state_for(module: QModule) -> QModuleState:
    """Return the state for the mode: observe and quantize in training, else quantize. Unobserved quantizers observe."""
    ready = all(quantizer.is_ready for quantizer in module.quantizers().values())
    return QModuleState.QUANT_EVAL if ready and not module.training else QModuleState.QUANT_AWARE_TRAIN


class FollowMode:
    """Forward pre-hook of a model that sets the state of each of its QModules before every call.

    A state that somebody else has set stays until it is set back, so `qmodule_state`, post-training algorithms and
    analysis work on such a model.
    """

    followed: dict[str, QModuleState] | None = None
    """Path of a QModule -> the state it was given last."""

    def __call__(self, model: nn.Module, args: Any) -> None:
        """Set the states."""
        self.set_states(model)

    def set_states(self, model: nn.Module) -> None:
        """Set the state of each QModule of the model for the calls that follow."""
        followed = {} if self.followed is None else self.followed
        self.followed = followed
        for path, module in qmodules(model):
            if module.state is not followed.setdefault(path, module.state):
                continue
            state = self.state_of(path, module)
            if module.state is not state:
                module.state = state
            followed[path] = state

    def state_of(self, path: str, module: QModule) -> QModuleState:
        """Return the state of one QModule for this call."""
        return state_for(module)
