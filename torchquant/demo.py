"""The address of `torchquant.runs.demo` in version 0.1; pickles name its `network` and `mobilenet`."""

import sys

from torchquant.runs import small_mobilenet, small_resnet
from torchquant.runs.data import Digits as Digits
from torchquant.runs.data import load_digits as load_digits
from torchquant.runs.demo import *  # noqa: F403
from torchquant.runs.demo import __all__ as __all__
from torchquant.runs.small_resnet import QuantSmallResNet as QuantSmallResNet
from torchquant.runs.small_resnet import SmallResNet as SmallResNet

sys.modules[f"{__name__}.network"] = small_resnet
sys.modules[f"{__name__}.mobilenet"] = small_mobilenet
