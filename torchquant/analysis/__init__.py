"""Analyse a quantized model: error per layer, bytes per weight."""

from torchquant.analysis.errors import LayerError as LayerError
from torchquant.analysis.errors import SiteError as SiteError
from torchquant.analysis.errors import layer_errors as layer_errors
from torchquant.analysis.errors import sqnr as sqnr
from torchquant.analysis.footprint import WeightBytes as WeightBytes
from torchquant.analysis.footprint import weight_bytes as weight_bytes

__all__ = ["LayerError", "SiteError", "WeightBytes", "layer_errors", "sqnr", "weight_bytes"]
