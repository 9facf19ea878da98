"""AutoQNN's VecQ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from torchquant.compat.autoqnn.quantizers._scheme import Activation, Scheme
from torchquant.compat.autoqnn.quantizers.quantization import Quantization
from torchquant.quantizers import VecQQuantizer


class VecQ(Scheme, VecQQuantizer, Quantization):
    """Gaussian thresholds, least-squares values. `lambdas`: steps of your own, in units of the deviation."""

    spec = "vecq:{n}"

    lambdas: list[float] | None

    def __init__(self, bitwidth: int | None = None, lambdas: Sequence[float] | None = None, **kwargs: Any) -> None:
        self.__dict__["lambdas"] = None if lambdas is None else [float(step) for step in lambdas]
        super().__init__(bitwidth, **kwargs)

    def best_step(self, rms: Tensor) -> Tensor:
        """Return the step: of `lambdas`, else of least error on a Gaussian."""
        return super().best_step(rms) if self.lambdas is None else self.lambdas[self.n_bits - 1] * rms


class VecQAct(Activation, VecQ):
    """VecQ for activations."""
