"""AutoQNN's ZoomQ."""

from __future__ import annotations

from torchquant.compat.autoqnn.quantizers._scheme import Activation, Scheme
from torchquant.compat.autoqnn.quantizers.quantization import Quantization
from torchquant.quantizers import ZoomQQuantizer


class ZoomQ(Scheme, ZoomQQuantizer, Quantization):
    """Equal cells over the range."""

    spec = "zoomq:{n}"


class ZoomQAct(Activation, ZoomQ):
    """ZoomQ for activations."""
