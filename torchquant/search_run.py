"""The published address of `torchquant.runs.search`."""

from torchquant.runs.search import *  # noqa: F403
from torchquant.runs.search import __all__ as __all__
