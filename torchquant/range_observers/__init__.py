"""Range observers: which real interval a quantizer covers."""

from torchquant.range_observers._base import OBSERVERS as OBSERVERS
from torchquant.range_observers._base import RangeObserver as RangeObserver
from torchquant.range_observers.min_max import BatchMinMax as BatchMinMax
from torchquant.range_observers.min_max import ExpAvgMinMax as ExpAvgMinMax

__all__ = ["OBSERVERS", "BatchMinMax", "ExpAvgMinMax", "RangeObserver"]
