"""Aids of quantization-aware training: schedules, batch-norm re-estimation, oscillating weights, EWGS's delta."""

from torchquant.training.bn_stats import reestimate_bn as reestimate_bn
from torchquant.training.ewgs import adapt_ewgs as adapt_ewgs
from torchquant.training.fit import Loss as Loss
from torchquant.training.fit import OnEpoch as OnEpoch
from torchquant.training.fit import fit as fit
from torchquant.training.fit import fit_quantized as fit_quantized
from torchquant.training.oscillation import OscillationReport as OscillationReport
from torchquant.training.oscillation import OscillationTracker as OscillationTracker
from torchquant.training.oscillation import dampening_loss as dampening_loss
from torchquant.training.schedules import BitSchedule as BitSchedule
from torchquant.training.schedules import GradientSchedule as GradientSchedule
from torchquant.training.schedules import QuantizationSchedule as QuantizationSchedule
from torchquant.training.schedules import Ramp as Ramp

__all__ = [
    "BitSchedule",
    "GradientSchedule",
    "Loss",
    "OnEpoch",
    "OscillationReport",
    "OscillationTracker",
    "QuantizationSchedule",
    "Ramp",
    "adapt_ewgs",
    "dampening_loss",
    "fit",
    "fit_quantized",
    "reestimate_bn",
]
