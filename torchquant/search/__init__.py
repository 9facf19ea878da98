"""Choose quantizers: search schemes (QSS), learn bit widths (QPL), allocate by sensitivity. See docs/searching.md."""

from torchquant.search.allocation.assignment import Allocation as Allocation
from torchquant.search.allocation.assignment import allocate as allocate
from torchquant.search.allocation.curvature import hessian_trace as hessian_trace
from torchquant.search.allocation.fronts import Pareto as Pareto
from torchquant.search.allocation.fronts import ParetoPoint as ParetoPoint
from torchquant.search.allocation.fronts import pareto as pareto
from torchquant.search.allocation.latency import measure_latency as measure_latency
from torchquant.search.allocation.latency import read_latency as read_latency
from torchquant.search.allocation.latency import write_latency as write_latency
from torchquant.search.allocation.sensitivities import Sensitivity as Sensitivity
from torchquant.search.allocation.sensitivities import sensitivity as sensitivity
from torchquant.search.budget import Budget as Budget
from torchquant.search.cost import CostModel as CostModel
from torchquant.search.learning.engine import Search as Search
from torchquant.search.learning.mixture import MixtureQuantizer as MixtureQuantizer
from torchquant.search.learning.precision_learning import PrecisionLearning as PrecisionLearning
from torchquant.search.learning.scheme_search import SchemeSearch as SchemeSearch
from torchquant.search.report import render_report as render_report
from torchquant.search.settings import EpochRecord as EpochRecord
from torchquant.search.settings import PrecisionSettings as PrecisionSettings
from torchquant.search.settings import SearchSettings as SearchSettings
from torchquant.search.space import Candidates as Candidates
from torchquant.search.space import default_candidates as default_candidates
from torchquant.search.space import search_rules as search_rules

__all__ = [
    "Allocation",
    "Budget",
    "Candidates",
    "CostModel",
    "EpochRecord",
    "MixtureQuantizer",
    "Pareto",
    "ParetoPoint",
    "PrecisionLearning",
    "PrecisionSettings",
    "SchemeSearch",
    "Search",
    "SearchSettings",
    "Sensitivity",
    "allocate",
    "default_candidates",
    "hessian_trace",
    "measure_latency",
    "pareto",
    "read_latency",
    "render_report",
    "search_rules",
    "sensitivity",
    "write_latency",
]
