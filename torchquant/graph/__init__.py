"""Find the sites of any model, and put quantizers there.

`tracer.py` traces one forward and detects effects that its graph would lose (`guards.py`, `outside.py`); `trace.py`
traces all variants of a forward, `writes.py` orders in-place writes, `calls.py` describes calls. `operators.py` is the
table of operators (`operator_table.py` defines its rows), and `ops.py` looks nodes of a graph up in it; `finder.py` and
`graph_sites.py` find the sites. `rewrite.py` inserts quantizers (`edit.py`: into one graph) and removes them,
`traced.py` runs the graphs, `again.py` traces a forward again that takes a new path. `recording.py` runs examples,
`cost.py` computes costs. Users call `torchquant.plan`.
"""

import sys

from torchquant._renamed import renamed_names
from torchquant.graph import again as again
from torchquant.graph import finder
from torchquant.graph.cost import PlanCost as PlanCost
from torchquant.graph.cost import SiteCost as SiteCost
from torchquant.graph.finder import capture as capture
from torchquant.graph.operator_table import Operator as Operator
from torchquant.graph.operators import OPERATORS as OPERATORS
from torchquant.graph.operators import register_operator as register_operator
from torchquant.graph.sites import Captured as Captured
from torchquant.graph.sites import Site as Site
from torchquant.graph.sites import SiteInput as SiteInput
from torchquant.graph.sites import SitePlan as SitePlan
from torchquant.graph.sites import Unquantized as Unquantized

sys.modules[f"{__name__}.capture"] = finder  # a published address of `capture`

__all__ = [
    "OPERATORS",
    "Captured",
    "Operator",
    "PlanCost",
    "Site",
    "SiteCost",
    "SiteInput",
    "SitePlan",
    "Unquantized",
    "capture",
    "register_operator",
]

__getattr__ = renamed_names(__name__, {"LeftFloat": "Unquantized", "Read": "SiteInput"})
