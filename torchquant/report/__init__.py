"""Make a report: one HTML file with text, sortable tables, interactive figures and graphs, readable without a network.

A `Page` has a title and `Section`s; a section has parts: `Text`, `Numbers`, `Table`, `Figure`, `Picture`, `Graph` and
`Details`, which folds other parts away. `lines`, `bars`, `heatmap` and `histogram` make a `Figure` of plain numbers.
Every text that a part is given is shown as it is, so that a layer may have any name.

    table = Table(["model", "accuracy"], [["float", "97.1%"], ["int8", "96.8%"]])
    page = Page("My run", [Section("Accuracy", [table])])
    page.write(Path("report.html"))

This package knows nothing of quantization; sections about a quantized model are made where their data is. `html.py`
writes elements, `layout.py` lays graphs out, `page.css` and `page.js` are the style and the behaviour of every page.
"""

from torchquant.report.charts import bars as bars
from torchquant.report.charts import heatmap as heatmap
from torchquant.report.charts import histogram as histogram
from torchquant.report.charts import lines as lines
from torchquant.report.graph import Graph as Graph
from torchquant.report.graph import Node as Node
from torchquant.report.page import Page as Page
from torchquant.report.page import Section as Section
from torchquant.report.parts import Cell as Cell
from torchquant.report.parts import Code as Code
from torchquant.report.parts import Details as Details
from torchquant.report.parts import Figure as Figure
from torchquant.report.parts import Numbers as Numbers
from torchquant.report.parts import Part as Part
from torchquant.report.parts import Picture as Picture
from torchquant.report.parts import Table as Table
from torchquant.report.parts import Text as Text
