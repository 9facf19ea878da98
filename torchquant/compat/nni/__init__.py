"""The API of NNI: its quantizers, by its names and at its addresses.

`import nni` becomes `from torchquant.compat import nni`, and `from nni.compression.quantization import QATQuantizer`
becomes `from torchquant.compat.nni.compression.quantization import QATQuantizer`, or, in short,
`from torchquant.compat.nni import QATQuantizer`.
"""

from torchquant.compat.nni.addresses import add_addresses as _add_addresses
from torchquant.compat.nni.base import Quantizer as Quantizer
from torchquant.compat.nni.config import reset_quant_scheme_dtype as reset_quant_scheme_dtype
from torchquant.compat.nni.config import set_quant_scheme_dtype as set_quant_scheme_dtype
from torchquant.compat.nni.evaluators import Evaluator as Evaluator
from torchquant.compat.nni.evaluators import TorchEvaluator as TorchEvaluator
from torchquant.compat.nni.quantizers import BNNQuantizer as BNNQuantizer
from torchquant.compat.nni.quantizers import DoReFaQuantizer as DoReFaQuantizer
from torchquant.compat.nni.quantizers import LsqPlusQuantizer as LsqPlusQuantizer
from torchquant.compat.nni.quantizers import LsqQuantizer as LsqQuantizer
from torchquant.compat.nni.quantizers import NaiveQuantizer as NaiveQuantizer
from torchquant.compat.nni.quantizers import ObserverQuantizer as ObserverQuantizer
from torchquant.compat.nni.quantizers import PtqQuantizer as PtqQuantizer
from torchquant.compat.nni.quantizers import QAT_Quantizer as QAT_Quantizer
from torchquant.compat.nni.quantizers import QATQuantizer as QATQuantizer
from torchquant.compat.nni.tracing import trace as trace
from torchquant.compat.nni.trainer_evaluators import DeepspeedTorchEvaluator as DeepspeedTorchEvaluator
from torchquant.compat.nni.trainer_evaluators import LightningEvaluator as LightningEvaluator
from torchquant.compat.nni.trainer_evaluators import TransformersEvaluator as TransformersEvaluator

__all__ = [
    "BNNQuantizer",
    "DeepspeedTorchEvaluator",
    "DoReFaQuantizer",
    "Evaluator",
    "LightningEvaluator",
    "LsqPlusQuantizer",
    "LsqQuantizer",
    "NaiveQuantizer",
    "ObserverQuantizer",
    "PtqQuantizer",
    "QATQuantizer",
    "QAT_Quantizer",
    "Quantizer",
    "TorchEvaluator",
    "TransformersEvaluator",
    "reset_quant_scheme_dtype",
    "set_quant_scheme_dtype",
    "trace",
]

_add_addresses(__name__, {name: globals()[name] for name in __all__})


def __getattr__(name: str) -> object:
    raise AttributeError(f"nni.{name} is not here: torchquant.compat.nni has what of NNI quantizes, and nni.trace")
