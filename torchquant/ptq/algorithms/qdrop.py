"""QDrop."""

from __future__ import annotations

from torchquant.ptq.algorithms.brecq import BRECQ
from torchquant.ptq.stage import PTQ


@PTQ.register("qdrop")
class QDrop(BRECQ):
    """BRECQ with half of the elements of all activations not quantized while learning, at random."""

    source = "Wei et al. 2022, arXiv:2203.05740"
    when = "like brecq, activations of few bits"

    def __init__(
        self,
        steps: int = 300,
        rate: float = 0.1,
        weight: float = 0.1,
        drop: float = 0.5,
        fisher: str = "none",
        activation_steps: int = 0,
        activation_rate: float = 1e-3,
    ) -> None:
        super().__init__(steps, rate, weight, drop, fisher, activation_steps, activation_rate)
