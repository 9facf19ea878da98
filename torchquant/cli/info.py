"""`torchquant info`: what is installed, and which kernels are active."""

from torchquant.info import report
from torchquant.runs.console import Terminal


def command() -> None:
    """Show versions, which kernels are active on which device, and why not."""
    Terminal().message(report())
