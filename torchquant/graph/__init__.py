"""Whole models: finding the sites of any model, and putting quantizers there.

`tracer.py` follows one forward and notices what a graph of it would lose (`guards.py`, `outside.py`), `trace.py`
follows all its ways, `writes.py` orders what it writes in place, `calls.py` knows how it is called. `operators.py` is
the table of operators (`operator_table.py`: what a row is), `ops.py` asks it of the nodes of a graph; `finder.py` and
`graph_sites.py` find the sites. `rewrite.py` puts quantizers in (`edit.py`: into one graph) and takes them out,
`traced.py` runs the graphs, `again.py` follows a forward that goes another way. `recording.py` runs examples, `cost.py`
counts. `torchquant.plan` is what people use.
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

sys.modules[f"{__name__}.capture"] = finder  # where `capture` was, published as an address to import it from

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
