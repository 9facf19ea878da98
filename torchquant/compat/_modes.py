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
    """Forward pre-hook of a model that sets the state of each of its QModules before every call."""

    def __call__(self, model: nn.Module, args: Any) -> None:
        """Set the states."""
        for path, module in qmodules(model):
            state = self.state_of(path, module)
            if module.state is not state:
                module.state = state

    def state_of(self, path: str, module: QModule) -> QModuleState:
        """Return the state of one QModule for this call."""
        return state_for(module)
