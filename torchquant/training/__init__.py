"""Calibrate, evaluate and train; tools for quantization-aware training: schedules, oscillation tracking, ..."""

from torchquant.training.bn_stats import reestimate_bn as reestimate_bn
from torchquant.training.calibration import calibrate as calibrate
from torchquant.training.distillation import Distillation as Distillation
from torchquant.training.distillation import attention_map_loss as attention_map_loss
from torchquant.training.distillation import distillation_loss as distillation_loss
from torchquant.training.distillation import feature_loss as feature_loss
from torchquant.training.evaluation import Metric as Metric
from torchquant.training.evaluation import evaluate as evaluate
from torchquant.training.ewgs import adapt_ewgs as adapt_ewgs
from torchquant.training.history import Look as Look
from torchquant.training.history import read_looks as read_looks
from torchquant.training.history import series as series
from torchquant.training.loop import Loss as Loss
from torchquant.training.loop import OnEpoch as OnEpoch
from torchquant.training.loop import fit as fit
from torchquant.training.loop import fit_quantized as fit_quantized
from torchquant.training.monitor import Monitor as Monitor
from torchquant.training.oscillation import OscillationReport as OscillationReport
from torchquant.training.oscillation import OscillationTracker as OscillationTracker
from torchquant.training.oscillation import dampening_loss as dampening_loss
from torchquant.training.profit import Instability as Instability
from torchquant.training.profit import ProgressiveFreezing as ProgressiveFreezing
from torchquant.training.rprelu import RPReLU as RPReLU
from torchquant.training.schedules import BitSchedule as BitSchedule
from torchquant.training.schedules import GradientSchedule as GradientSchedule
from torchquant.training.schedules import QuantizationSchedule as QuantizationSchedule
from torchquant.training.schedules import Ramp as Ramp
from torchquant.training.sinks import CSVSink as CSVSink
from torchquant.training.sinks import MLflowSink as MLflowSink
from torchquant.training.sinks import Sink as Sink
from torchquant.training.sinks import TensorBoardSink as TensorBoardSink
from torchquant.training.sinks import TerminalSink as TerminalSink
from torchquant.training.sinks import WandbSink as WandbSink

__all__ = [
    "BitSchedule",
    "CSVSink",
    "Distillation",
    "GradientSchedule",
    "Instability",
    "Look",
    "Loss",
    "MLflowSink",
    "Metric",
    "Monitor",
    "OnEpoch",
    "OscillationReport",
    "OscillationTracker",
    "ProgressiveFreezing",
    "QuantizationSchedule",
    "RPReLU",
    "Ramp",
    "Sink",
    "TensorBoardSink",
    "TerminalSink",
    "WandbSink",
    "adapt_ewgs",
    "attention_map_loss",
    "calibrate",
    "dampening_loss",
    "distillation_loss",
    "evaluate",
    "feature_loss",
    "fit",
    "fit_quantized",
    "read_looks",
    "reestimate_bn",
    "series",
]
