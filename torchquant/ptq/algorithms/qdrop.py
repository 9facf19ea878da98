"""QDrop."""

from __future__ import annotations

from functools import partialmethod

from torchquant.ptq.algorithms.brecq import BRECQ
from torchquant.ptq.stage import PTQ


@PTQ.register("qdrop")
class QDrop(BRECQ):
    """BRECQ with half of the elements of all activations not quantized while learning, at random."""

    source = "Wei et al. 2022, arXiv:2203.05740"
    when = "like brecq, activations of few bits"

    __init__ = partialmethod(BRECQ.__init__, drop=0.5)  # type: ignore[assignment]
