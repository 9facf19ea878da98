"""Modules that quantize: when they observe, when they quantize, and what they can wrap."""

from torchquant._renamed import renamed_names
from torchquant.qmodule import other_packages as other_packages
from torchquant.qmodule.float_checkpoints import FloatCheckpoints as FloatCheckpoints
from torchquant.qmodule.float_checkpoints import float_state_dict as float_state_dict
from torchquant.qmodule.float_checkpoints import link_float_state as link_float_state
from torchquant.qmodule.input_transform import ChannelScale as ChannelScale
from torchquant.qmodule.input_transform import ChannelSplit as ChannelSplit
from torchquant.qmodule.input_transform import InputTransform as InputTransform
from torchquant.qmodule.input_transform import LowRank as LowRank
from torchquant.qmodule.input_transform import Rotation as Rotation
from torchquant.qmodule.op import QOp as QOp
from torchquant.qmodule.patterns import ActivationPattern as ActivationPattern
from torchquant.qmodule.patterns import InputFirstPattern as InputFirstPattern
from torchquant.qmodule.patterns import LayerPattern as LayerPattern
from torchquant.qmodule.patterns import register_pattern as register_pattern
from torchquant.qmodule.state import QModule as QModule
from torchquant.qmodule.state import QModuleState as QModuleState
from torchquant.qmodule.weight_slots import WeightSlot as WeightSlot
from torchquant.qmodule.weighted import WeightsPattern as WeightsPattern
from torchquant.qmodule.weights import QWeights as QWeights
from torchquant.qmodule.wrapper import QWrapper as QWrapper

__all__ = [
    "ActivationPattern",
    "ChannelScale",
    "ChannelSplit",
    "FloatCheckpoints",
    "InputFirstPattern",
    "InputTransform",
    "LayerPattern",
    "LowRank",
    "QModule",
    "QModuleState",
    "QOp",
    "QWeights",
    "QWrapper",
    "Rotation",
    "WeightSlot",
    "WeightsPattern",
    "float_state_dict",
    "link_float_state",
    "register_pattern",
]

__getattr__ = renamed_names(
    __name__,
    {
        "ActivationRow": "ActivationPattern",
        "InputFirstRow": "InputFirstPattern",
        "LayerRow": "LayerPattern",
        "speak_float": "link_float_state",
    },
)
