"""The address of `torchquant.runs.export` in version 0.1, which stands in packed files."""

from torchquant.runs.export import *  # noqa: F403
from torchquant.runs.export import __all__ as __all__
