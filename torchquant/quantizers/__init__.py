"""Quantizers with state: when they observe, and which numbers they keep. One file per scheme."""

from typing import TYPE_CHECKING

from torchquant._lazy import lazy_names
from torchquant.quantizers._base import QUANTIZERS as QUANTIZERS
from torchquant.quantizers._base import About as About
from torchquant.quantizers._base import FittedQuantizer as FittedQuantizer
from torchquant.quantizers._base import GridQuantizer as GridQuantizer
from torchquant.quantizers._base import Quantizer as Quantizer
from torchquant.quantizers._base import QuantizerFactory as QuantizerFactory
from torchquant.quantizers._base import UniformQuantizer as UniformQuantizer
from torchquant.quantizers._catalogue import SchemeEntry as SchemeEntry
from torchquant.quantizers._catalogue import catalogue as catalogue
from torchquant.quantizers._catalogue import scheme_entry as scheme_entry
from torchquant.quantizers._catalogue import weight_spec as weight_spec
from torchquant.quantizers._group import BlockwiseQuantizer as BlockwiseQuantizer
from torchquant.quantizers._group import GroupQuantizer as GroupQuantizer
from torchquant.quantizers._learned import LearnedQuantizer as LearnedQuantizer
from torchquant.quantizers._learned import LearnedUniform as LearnedUniform
from torchquant.quantizers._level_list import LevelList as LevelList
from torchquant.quantizers._spec import QuantSpec as QuantSpec
from torchquant.quantizers._spec import find_scheme as find_scheme
from torchquant.quantizers._spec import make_quantizer as make_quantizer
from torchquant.quantizers.absmean import AbsMeanQuantizer as AbsMeanQuantizer
from torchquant.quantizers.adabin import AdaBinActQuantizer as AdaBinActQuantizer
from torchquant.quantizers.adabin import AdaBinQuantizer as AdaBinQuantizer
from torchquant.quantizers.affine import AffineQuantizer as AffineQuantizer
from torchquant.quantizers.apot import APoTQuantizer as APoTQuantizer
from torchquant.quantizers.binary import BinaryQuantizer as BinaryQuantizer
from torchquant.quantizers.blocks import MXQuantizer as MXQuantizer
from torchquant.quantizers.blocks import NVFP4Quantizer as NVFP4Quantizer
from torchquant.quantizers.codebook import CodebookQuantizer as CodebookQuantizer
from torchquant.quantizers.dorefa import DoReFaQuantizer as DoReFaQuantizer
from torchquant.quantizers.esb import ESBQuantizer as ESBQuantizer
from torchquant.quantizers.irnet import IRNetQuantizer as IRNetQuantizer
from torchquant.quantizers.lsq import EWGSQuantizer as EWGSQuantizer
from torchquant.quantizers.lsq import LSQPlusQuantizer as LSQPlusQuantizer
from torchquant.quantizers.lsq import LSQQuantizer as LSQQuantizer
from torchquant.quantizers.midrise import ClipQQuantizer as ClipQQuantizer
from torchquant.quantizers.midrise import UL2QQuantizer as UL2QQuantizer
from torchquant.quantizers.midrise import VecQQuantizer as VecQQuantizer
from torchquant.quantizers.midrise import ZoomQQuantizer as ZoomQQuantizer
from torchquant.quantizers.minifloat import MinifloatQuantizer as MinifloatQuantizer
from torchquant.quantizers.n2uq import N2UQActQuantizer as N2UQActQuantizer
from torchquant.quantizers.n2uq import N2UQQuantizer as N2UQQuantizer
from torchquant.quantizers.nf4 import NF4Quantizer as NF4Quantizer
from torchquant.quantizers.pact import PACTQuantizer as PACTQuantizer
from torchquant.quantizers.pact import pact_penalty as pact_penalty
from torchquant.quantizers.pot import PotQuantizer as PotQuantizer
from torchquant.quantizers.qfmt import QfmtQuantizer as QfmtQuantizer
from torchquant.quantizers.qil import QILQuantizer as QILQuantizer
from torchquant.quantizers.residual import ResidualQuantizer as ResidualQuantizer
from torchquant.quantizers.rsign import RSignQuantizer as RSignQuantizer
from torchquant.quantizers.seq import SEQQuantizer as SEQQuantizer
from torchquant.quantizers.ternary import TernaryQuantizer as TernaryQuantizer
from torchquant.quantizers.tqt import TQTQuantizer as TQTQuantizer
from torchquant.quantizers.ttq import TTQQuantizer as TTQQuantizer

if TYPE_CHECKING:
    from torchquant.quantizers._laws import LAWS as LAWS
    from torchquant.quantizers._laws import LawReport as LawReport
    from torchquant.quantizers._laws import check_quantizer as check_quantizer

__all__ = [
    "LAWS",
    "QUANTIZERS",
    "APoTQuantizer",
    "About",
    "AbsMeanQuantizer",
    "AdaBinActQuantizer",
    "AdaBinQuantizer",
    "AffineQuantizer",
    "BinaryQuantizer",
    "BlockwiseQuantizer",
    "ClipQQuantizer",
    "CodebookQuantizer",
    "DoReFaQuantizer",
    "ESBQuantizer",
    "EWGSQuantizer",
    "FittedQuantizer",
    "GridQuantizer",
    "GroupQuantizer",
    "IRNetQuantizer",
    "LSQPlusQuantizer",
    "LSQQuantizer",
    "LawReport",
    "LearnedQuantizer",
    "LearnedUniform",
    "LevelList",
    "MXQuantizer",
    "MinifloatQuantizer",
    "N2UQActQuantizer",
    "N2UQQuantizer",
    "NF4Quantizer",
    "NVFP4Quantizer",
    "PACTQuantizer",
    "PotQuantizer",
    "QILQuantizer",
    "QfmtQuantizer",
    "QuantSpec",
    "Quantizer",
    "QuantizerFactory",
    "RSignQuantizer",
    "ResidualQuantizer",
    "SEQQuantizer",
    "SchemeEntry",
    "TQTQuantizer",
    "TTQQuantizer",
    "TernaryQuantizer",
    "UL2QQuantizer",
    "UniformQuantizer",
    "VecQQuantizer",
    "ZoomQQuantizer",
    "catalogue",
    "check_quantizer",
    "find_scheme",
    "make_quantizer",
    "pact_penalty",
    "scheme_entry",
    "weight_spec",
]

__getattr__ = lazy_names(__name__, dict.fromkeys(("LAWS", "LawReport", "check_quantizer"), f"{__name__}._laws"))
