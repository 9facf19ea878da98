"""Choosing quantizers: schemes (QSS), bit widths (QPL), and allocation by sensitivity. Start with docs/search.md."""

from torchquant.search.allocation import Allocation as Allocation
from torchquant.search.allocation import allocate as allocate
from torchquant.search.budget import Budget as Budget
from torchquant.search.cost import CostModel as CostModel
from torchquant.search.curvature import hessian_trace as hessian_trace
from torchquant.search.engine import Search as Search
from torchquant.search.fronts import Pareto as Pareto
from torchquant.search.fronts import ParetoPoint as ParetoPoint
from torchquant.search.fronts import pareto as pareto
from torchquant.search.latency import measure_latency as measure_latency
from torchquant.search.latency import read_latency as read_latency
from torchquant.search.latency import write_latency as write_latency
from torchquant.search.mixture import MixtureQuantizer as MixtureQuantizer
from torchquant.search.precision_learning import PrecisionLearning as PrecisionLearning
from torchquant.search.report import render_report as render_report
from torchquant.search.scheme_search import SchemeSearch as SchemeSearch
from torchquant.search.sensitivities import Sensitivity as Sensitivity
from torchquant.search.sensitivities import sensitivity as sensitivity
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
