"""The imports of every scheme's file: the contract of quantizers, the registry, and the common base classes."""

from torchquant.quantizers._contract import QUANTIZERS as QUANTIZERS
from torchquant.quantizers._contract import SLOTS as SLOTS
from torchquant.quantizers._contract import About as About
from torchquant.quantizers._contract import Quantizer as Quantizer
from torchquant.quantizers._contract import QuantizerFactory as QuantizerFactory
from torchquant.quantizers._grid import FittedQuantizer as FittedQuantizer
from torchquant.quantizers._grid import GridQuantizer as GridQuantizer
from torchquant.quantizers._grid import OwnScaleQuantizer as OwnScaleQuantizer
from torchquant.quantizers._grid import UniformQuantizer as UniformQuantizer
