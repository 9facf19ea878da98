"""The published address of `torchquant.runs.compare`; pickles of 0.1 name `torchquant.compare.tasks`."""

import sys

from torchquant.runs import networks
from torchquant.runs.compare import *  # noqa: F403
from torchquant.runs.compare import __all__ as __all__

sys.modules[f"{__name__}.tasks"] = networks
