"""AutoQNN's uL2Q."""

from __future__ import annotations

from torchquant.compat.autoqnn.quantizers._scheme import Activation, OwnSteps
from torchquant.compat.autoqnn.quantizers.quantization import Quantization
from torchquant.quantizers import UL2QQuantizer


class uL2Q(OwnSteps, UL2QQuantizer, Quantization):  # noqa: N801 - published name
    """Mid-rise around the mean, Gaussian step."""

    spec = "ul2q:{n}"


class uL2QAct(Activation, uL2Q):  # noqa: N801 - published name
    """uL2Q for activations."""
