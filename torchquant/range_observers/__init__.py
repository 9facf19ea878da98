"""Range observers, which determine the real interval that a quantizer covers."""

from typing import TYPE_CHECKING

from torchquant._lazy import lazy_names
from torchquant.range_observers._base import OBSERVERS as OBSERVERS
from torchquant.range_observers._base import RangeObserver as RangeObserver
from torchquant.range_observers.histogram import EntropyObserver as EntropyObserver
from torchquant.range_observers.histogram import HistogramObserver as HistogramObserver
from torchquant.range_observers.histogram import MSEObserver as MSEObserver
from torchquant.range_observers.min_max import BatchMinMax as BatchMinMax
from torchquant.range_observers.min_max import ExpAvgMinMax as ExpAvgMinMax
from torchquant.range_observers.min_max import RunningMinMax as RunningMinMax
from torchquant.range_observers.moments import ACIQObserver as ACIQObserver
from torchquant.range_observers.moments import MeanStdObserver as MeanStdObserver
from torchquant.range_observers.percentile import PercentileObserver as PercentileObserver

if TYPE_CHECKING:
    from torchquant.range_observers._laws import check_observer as check_observer

__all__ = [
    "OBSERVERS",
    "ACIQObserver",
    "BatchMinMax",
    "EntropyObserver",
    "ExpAvgMinMax",
    "HistogramObserver",
    "MSEObserver",
    "MeanStdObserver",
    "PercentileObserver",
    "RangeObserver",
    "RunningMinMax",
    "check_observer",
]

__getattr__ = lazy_names(__name__, {"check_observer": f"{__name__}._laws"})
