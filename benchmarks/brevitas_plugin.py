"""Plug-in of `torchquant compare`: the learned scales of Brevitas. Also an example of another library's quantizer."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

import torchquant as tq
from torchquant.quantizers import Quantizer

COLLECT_STEPS = 20
"""Training steps in which Brevitas collects before its scale is a parameter; its default 300 exceeds a run here."""


class LearnedByBrevitas(Quantizer):
    """A Brevitas activation quantizer with a learned scale, at any site; signed where the first tensor goes below 0."""

    start: ClassVar[str] = ""

    def __init__(self, n_bits: int, nonfinite: str = "raise") -> None:
        super().__init__()
        self.n_bits = n_bits
        self.signed = None
        self.inner: Any = None

    def pre_observe(self, x: Tensor) -> None:
        if self.inner is None:
            self.inner = self._made(bool((x < 0).any())).to(x.device)
            self.inner.train()
            self.inner(x.detach())

    def _made(self, signed: bool) -> Any:
        import brevitas.nn as qnn
        from brevitas.quant import scaled_int

        kind = getattr(scaled_int, f"{'Int' if signed else 'Uint'}8ActPerTensorFloat{self.start}")
        return qnn.QuantIdentity(act_quant=kind, bit_width=self.n_bits, collect_stats_steps=COLLECT_STEPS)

    def quantize(self, x: Tensor) -> Tensor:
        value = self.inner(x)
        return value if isinstance(value, Tensor) else value.value

    @property
    def is_ready(self) -> bool:
        return self.inner is not None


@tq.QUANTIZERS.register("brevitas")
class BrevitasDefault(LearnedByBrevitas):
    """A learned scale that starts at the 99.999th percentile of the magnitudes."""

    typical = "{name}:{n}"
    typical_acts = "brevitas:{n}"


@tq.QUANTIZERS.register("brevitas_mse")
class BrevitasMSE(LearnedByBrevitas):
    """A learned scale that starts at the least squared error."""

    start = "MSE"
    typical = "{name}:{n}"
    typical_acts = "brevitas_mse:{n}"
