"""Analyse a quantized model: what each site does to the output and why, error per layer, bytes per weight."""

from torchquant.analysis.advice import Advice as Advice
from torchquant.analysis.advice import Remedy as Remedy
from torchquant.analysis.advice import advise as advise
from torchquant.analysis.analyzer import analyze as analyze
from torchquant.analysis.causes import Finding as Finding
from torchquant.analysis.effects import Effect as Effect
from torchquant.analysis.errors import LayerError as LayerError
from torchquant.analysis.errors import SiteError as SiteError
from torchquant.analysis.errors import layer_errors as layer_errors
from torchquant.analysis.errors import sqnr as sqnr
from torchquant.analysis.facts import SlotFacts as SlotFacts
from torchquant.analysis.footprint import WeightBytes as WeightBytes
from torchquant.analysis.footprint import weight_bytes as weight_bytes
from torchquant.analysis.result import Analysis as Analysis
from torchquant.analysis.result import SiteAnalysis as SiteAnalysis

__all__ = [
    "Advice",
    "Analysis",
    "Effect",
    "Finding",
    "LayerError",
    "Remedy",
    "SiteAnalysis",
    "SiteError",
    "SlotFacts",
    "WeightBytes",
    "advise",
    "analyze",
    "layer_errors",
    "sqnr",
    "weight_bytes",
]
