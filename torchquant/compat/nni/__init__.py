"""The API of NNI: its quantizers, by its names and at its addresses.

`from nni.algorithms.compression.pytorch.quantization import QAT_Quantizer` becomes
`from torchquant.compat.nni.algorithms.compression.pytorch.quantization import QAT_Quantizer`, or, in short,
`from torchquant.compat.nni import QAT_Quantizer`.
"""

import sys
from types import ModuleType

from torchquant.compat.nni.config import reset_quant_scheme_dtype as reset_quant_scheme_dtype
from torchquant.compat.nni.config import set_quant_scheme_dtype as set_quant_scheme_dtype
from torchquant.compat.nni.quantizers import BNNQuantizer as BNNQuantizer
from torchquant.compat.nni.quantizers import DoReFaQuantizer as DoReFaQuantizer
from torchquant.compat.nni.quantizers import LsqPlusQuantizer as LsqPlusQuantizer
from torchquant.compat.nni.quantizers import LsqQuantizer as LsqQuantizer
from torchquant.compat.nni.quantizers import NaiveQuantizer as NaiveQuantizer
from torchquant.compat.nni.quantizers import ObserverQuantizer as ObserverQuantizer
from torchquant.compat.nni.quantizers import PtqQuantizer as PtqQuantizer
from torchquant.compat.nni.quantizers import QAT_Quantizer as QAT_Quantizer
from torchquant.compat.nni.quantizers import QATQuantizer as QATQuantizer
from torchquant.compat.nni.quantizers import Quantizer as Quantizer
from torchquant.compat.nni.quantizers import TorchEvaluator as TorchEvaluator

__all__ = [
    "BNNQuantizer",
    "DoReFaQuantizer",
    "LsqPlusQuantizer",
    "LsqQuantizer",
    "NaiveQuantizer",
    "ObserverQuantizer",
    "PtqQuantizer",
    "QATQuantizer",
    "QAT_Quantizer",
    "Quantizer",
    "TorchEvaluator",
    "reset_quant_scheme_dtype",
    "set_quant_scheme_dtype",
]

ADDRESSES = (
    "algorithms.compression.pytorch.quantization",
    "compression.pytorch.quantization",
    "compression.pytorch.quantization.settings",
    "compression.quantization",
    "compression.utils",
)
"""Modules of NNI that hold these names, below its root."""


def _add_addresses() -> None:
    for address in ADDRESSES:
        owner = sys.modules[__name__]
        for part in address.split("."):
            path = f"{owner.__name__}.{part}"
            module = sys.modules.setdefault(path, ModuleType(path, "An address of NNI."))
            module.__path__ = []  # lets Python look for what is below it
            setattr(owner, part, module)
            owner = module
        for name in __all__:
            setattr(owner, name, globals()[name])


_add_addresses()
