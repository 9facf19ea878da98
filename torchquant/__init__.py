"""torchquant: a quantization development kit for PyTorch researchers."""

from typing import TYPE_CHECKING

from torchquant._lazy import lazy_names
from torchquant.qmodule import QModule as QModule
from torchquant.qmodule import QModuleState as QModuleState
from torchquant.qmodule import QOp as QOp
from torchquant.qmodule import QWrapper as QWrapper
from torchquant.qmodule import register_pattern as register_pattern
from torchquant.qmodule.lean import set_lean as set_lean
from torchquant.quantizers import QUANTIZERS as QUANTIZERS
from torchquant.quantizers import AffineQuantizer as AffineQuantizer
from torchquant.quantizers import ESBQuantizer as ESBQuantizer
from torchquant.quantizers import QfmtQuantizer as QfmtQuantizer
from torchquant.quantizers import Quantizer as Quantizer
from torchquant.quantizers import QuantSpec as QuantSpec
from torchquant.quantizers import TernaryQuantizer as TernaryQuantizer
from torchquant.quantizers import make_quantizer as make_quantizer
from torchquant.range_observers import BatchMinMax as BatchMinMax
from torchquant.range_observers import ExpAvgMinMax as ExpAvgMinMax
from torchquant.range_observers import RangeObserver as RangeObserver
from torchquant.utils import freeze_bn as freeze_bn
from torchquant.utils import observe_weights as observe_weights
from torchquant.utils import qmodule_state as qmodule_state
from torchquant.utils import quantizer_parameters as quantizer_parameters
from torchquant.utils import set_qmodule_state as set_qmodule_state
from torchquant.utils import state_report as state_report

if TYPE_CHECKING:
    from torchquant.graph import capture as capture
    from torchquant.graph import register_operator as register_operator
    from torchquant.plan import QuantPlan as QuantPlan
    from torchquant.plan import quantize as quantize
    from torchquant.quantizers import check_quantizer as check_quantizer
    from torchquant.training import calibrate as calibrate
    from torchquant.training import evaluate as evaluate
    from torchquant.training import fit as fit

__version__ = "0.1.0"

__all__ = [
    "QUANTIZERS",
    "AffineQuantizer",
    "BatchMinMax",
    "ESBQuantizer",
    "ExpAvgMinMax",
    "QModule",
    "QModuleState",
    "QOp",
    "QWrapper",
    "QfmtQuantizer",
    "QuantPlan",
    "QuantSpec",
    "Quantizer",
    "RangeObserver",
    "TernaryQuantizer",
    "calibrate",
    "capture",
    "check_quantizer",
    "evaluate",
    "fit",
    "freeze_bn",
    "make_quantizer",
    "observe_weights",
    "qmodule_state",
    "quantize",
    "quantizer_parameters",
    "register_operator",
    "register_pattern",
    "set_lean",
    "set_qmodule_state",
    "state_report",
]

_LATER = {
    "check_quantizer": "torchquant.quantizers",
    **dict.fromkeys(("capture", "register_operator"), "torchquant.graph"),
    **dict.fromkeys(("QuantPlan", "quantize"), "torchquant.plan"),
    **dict.fromkeys(("calibrate", "evaluate", "fit"), "torchquant.training"),
}
_PACKAGES = ("graph", "models", "plan", "ptq", "training")
__getattr__ = lazy_names(__name__, _LATER, _PACKAGES)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER, *_PACKAGES})
