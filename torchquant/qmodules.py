"""The published second name of `torchquant.qmodule`."""

import sys

from torchquant import qmodule

sys.modules[__name__] = qmodule
