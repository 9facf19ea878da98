"""The address of `torchquant.runs.quantize` in version 0.1."""

from torchquant.runs.quantize import *  # noqa: F403
from torchquant.runs.quantize import __all__ as __all__
