"""Modules that quantize: when they observe, when they quantize, and what they can wrap."""

from torchquant.qmodule import other_packages as other_packages
from torchquant.qmodule.float_checkpoints import FloatCheckpoints as FloatCheckpoints
from torchquant.qmodule.float_checkpoints import float_state_dict as float_state_dict
from torchquant.qmodule.float_checkpoints import speak_float as speak_float
from torchquant.qmodule.op import QOp as QOp
from torchquant.qmodule.patterns import ActivationRow as ActivationRow
from torchquant.qmodule.patterns import InputFirstRow as InputFirstRow
from torchquant.qmodule.patterns import LayerRow as LayerRow
from torchquant.qmodule.patterns import register_pattern as register_pattern
from torchquant.qmodule.state import QModule as QModule
from torchquant.qmodule.state import QModuleState as QModuleState
from torchquant.qmodule.weights import QWeights as QWeights
from torchquant.qmodule.wrapper import QWrapper as QWrapper

__all__ = [
    "ActivationRow",
    "FloatCheckpoints",
    "InputFirstRow",
    "LayerRow",
    "QModule",
    "QModuleState",
    "QOp",
    "QWeights",
    "QWrapper",
    "float_state_dict",
    "register_pattern",
    "speak_float",
]
