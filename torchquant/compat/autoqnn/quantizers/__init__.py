"""AutoQNN's quantizers with their names and arguments; each is the corresponding torchquant quantizer.

Subclass `Quantization` to write one of your own. Defects of the published code are not reproduced; docs/algorithms.md I
lists them.
"""

from torchquant.compat.autoqnn.quantizers.binary import Binary as Binary
from torchquant.compat.autoqnn.quantizers.binary import BinaryAct as BinaryAct
from torchquant.compat.autoqnn.quantizers.clipq import ClipQ as ClipQ
from torchquant.compat.autoqnn.quantizers.clipq import ClipQAct as ClipQAct
from torchquant.compat.autoqnn.quantizers.diff_tricks import PWL as PWL
from torchquant.compat.autoqnn.quantizers.diff_tricks import PWL_C as PWL_C
from torchquant.compat.autoqnn.quantizers.diff_tricks import STE as STE
from torchquant.compat.autoqnn.quantizers.diff_tricks import get_diff_func as get_diff_func
from torchquant.compat.autoqnn.quantizers.esb import ESB_PerChannel as ESB_PerChannel
from torchquant.compat.autoqnn.quantizers.esb import ESBAct as ESBAct
from torchquant.compat.autoqnn.quantizers.fixedq import FixedQuant as FixedQuant
from torchquant.compat.autoqnn.quantizers.fixedq import FixedQuantAct as FixedQuantAct
from torchquant.compat.autoqnn.quantizers.potq import PotQ as PotQ
from torchquant.compat.autoqnn.quantizers.potq import PotQAct as PotQAct
from torchquant.compat.autoqnn.quantizers.quantization import Quantization as Quantization
from torchquant.compat.autoqnn.quantizers.resq import ResQ as ResQ
from torchquant.compat.autoqnn.quantizers.resq import ResQAct as ResQAct
from torchquant.compat.autoqnn.quantizers.ternary import Ternary as Ternary
from torchquant.compat.autoqnn.quantizers.ternary import TernaryAct as TernaryAct
from torchquant.compat.autoqnn.quantizers.ul2q import uL2Q as uL2Q
from torchquant.compat.autoqnn.quantizers.ul2q import uL2QAct as uL2QAct
from torchquant.compat.autoqnn.quantizers.vecq import VecQ as VecQ
from torchquant.compat.autoqnn.quantizers.vecq import VecQAct as VecQAct
from torchquant.compat.autoqnn.quantizers.zoomq import ZoomQ as ZoomQ
from torchquant.compat.autoqnn.quantizers.zoomq import ZoomQAct as ZoomQAct

__all__ = [
    "Binary",
    "BinaryAct",
    "ClipQ",
    "ClipQAct",
    "ESBAct",
    "ESB_PerChannel",
    "FixedQuant",
    "FixedQuantAct",
    "PotQ",
    "PotQAct",
    "Quantization",
    "ResQ",
    "ResQAct",
    "Ternary",
    "TernaryAct",
    "VecQ",
    "VecQAct",
    "ZoomQ",
    "ZoomQAct",
    "uL2Q",
    "uL2QAct",
]
