"""AutoQNN's VecQ."""

from __future__ import annotations

from torchquant.compat.autoqnn.quantizers._scheme import Activation, OwnSteps
from torchquant.compat.autoqnn.quantizers.quantization import Quantization
from torchquant.quantizers import VecQQuantizer


class VecQ(OwnSteps, VecQQuantizer, Quantization):
    """Gaussian thresholds, least-squares values. `lambdas`: steps of your own, in units of the deviation."""

    spec = "vecq:{n}"


class VecQAct(Activation, VecQ):
    """VecQ for activations."""
