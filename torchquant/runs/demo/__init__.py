"""The main job, end to end on real data. `torchquant demo` runs it; needs the extra `demo`."""

from torchquant.demo.data import Digits as Digits
from torchquant.demo.data import load_digits as load_digits
from torchquant.demo.job import DemoConfig as DemoConfig
from torchquant.demo.job import run_demo as run_demo
from torchquant.demo.network import QuantSmallResNet as QuantSmallResNet
from torchquant.demo.network import SmallResNet as SmallResNet
from torchquant.demo.progress import Silent as Silent
from torchquant.demo.progress import Terminal as Terminal
from torchquant.demo.results import DemoResult as DemoResult
from torchquant.demo.results import OnnxResult as OnnxResult
from torchquant.demo.results import SchemeResult as SchemeResult
from torchquant.demo.schemes import SCHEMES as SCHEMES
from torchquant.demo.schemes import Scheme as Scheme

__all__ = [
    "SCHEMES",
    "DemoConfig",
    "DemoResult",
    "Digits",
    "OnnxResult",
    "QuantSmallResNet",
    "Scheme",
    "SchemeResult",
    "Silent",
    "SmallResNet",
    "Terminal",
    "load_digits",
    "run_demo",
]
