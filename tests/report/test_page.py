"""The report machinery: structure, escaping, tables, figures, graphs, in the file and in a browser."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.browser import Browser, check_opened, check_whole, opened
from torchquant.errors import ConfigError, TorchQuantError
from torchquant.report import (
    Cell,
    Code,
    Details,
    Graph,
    Node,
    Numbers,
    Page,
    Part,
    Picture,
    Section,
    Table,
    Text,
    bars,
    heatmap,
    histogram,
    lines,
)
from torchquant.report.page import _library

EVIL = "<script>alert(1)</script>"
QUOTED = "\"'`&<b>"
ROWS = [
    ["b10", 9.5, "1,024 kB", "5.0%"],
    [EVIL, 30.25, "2 MB", "50%"],
    ["b9", None, "7 B", "7.5%"],
    ["c", Cell("exact", math.inf), "", "-1.5%"],
]
TABLE = Table(["layer", "SQNR", "bytes", "share"], ROWS, "As `code`.", "layers")
HISTOGRAM = histogram("Weights", [0.0, 1.0, 2.0, 3.0], {"float": [0.5, 0.0, 0.5], "quantized": [1.0, 0.0, 0.0]}, [0.5])


def graph(*names: str) -> Graph:
    nodes = [Node(name, 10.0 * i, details=[replace(TABLE, name=None), HISTOGRAM]) for i, name in enumerate(names)]
    return Graph(nodes, [*zip(names, names[1:], strict=False), (names[0], names[-1])], "SQNR, dB", "The model.")


def every_part(name: str) -> list[Part]:
    return [
        Numbers([("97%", name)]),
        Text(f"Of {name} with `{name}`."),
        Code(name),
        TABLE,
        lines("Loss", {name: [(1, 2.0), (2, None)], "b": [(2, math.nan)]}, "epoch", "loss", limits={name: 1.0}),
        bars("SQNR", [name, "b"], {name: [1.0, None]}),
        heatmap("Shares", [name], ["a", name], [[0.5, 0.25]]),
        HISTOGRAM,
        Picture(b"\x89PNG", name, name),
        graph("a", name, "c"),
        Details(name, [Text(name)]),
    ]


@pytest.mark.parametrize("name", ["conv", EVIL, QUOTED, "</style></title></body>", "a" * 500])
def test_names_are_text_wherever_they_stand(name: str) -> None:
    text = Page(name, [Section(name, every_part(name))], name).html()
    found = check_whole(text)
    assert found.tags.count("script") == check_whole(Page("x", [Section("x", every_part("x"))], "x").html()).tags.count(
        "script"
    )
    assert "alert" in "".join(found.text)  # of the table
    assert name.replace("`", "") in "".join(found.text)
    assert EVIL not in text


def test_plotly_is_embedded_once_and_only_for_a_figure() -> None:
    pytest.importorskip("plotly")
    without = Page("x", [Section("x", [TABLE, graph("a", "b")])]).html()
    assert 'id="plotly"' in without  # the details of a node have figures too
    without = Page("x", [Section("x", [TABLE, Graph([Node("a")], [])])]).html()
    assert 'id="plotly"' not in without
    assert len(without) < 30_000
    several = Page("x", [Section("x", every_part("x"))]).html()
    assert several.count('id="plotly"') == 1
    assert len(several) < 2_500_000


def test_without_plotly_figures_are_open_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    _library.cache_clear()
    try:
        text = Page("x", [Section("x", [HISTOGRAM])]).html()
    finally:
        _library.cache_clear()
    check_whole(text)
    assert "torchquant[report]" in text
    assert 'class="plot"' not in text
    assert "<details open><summary>The same as a table" in text


def test_figures_have_their_numbers_as_a_table() -> None:
    found = "".join(check_whole(Page("x", [Section("x", [heatmap("h", ["r"], ["c"], [[0.125]])])]).html()).text)
    assert "rc" not in found
    assert "0.125" in found
    assert [row[1:] for row in HISTOGRAM.table.rows] == [[0.5, 1.0], [0.5, 0.0]]
    drawn = lines("Loss", {"a": [(1, 2.0), (3, 1.0)], "b": [(2, 5.0)]}, "epoch")
    assert drawn.table.rows == [[1, 2.0, None], [2, None, 5.0], [3, 1.0, None]]


def test_the_data_of_a_figure_is_json_without_nan() -> None:
    text = Page("x", [Section("x", [lines("l", {EVIL: [(0.1 + 0.2, math.nan), (2, math.inf)]})])]).html()
    (data,) = re.findall(r'<script type="application/json">(.*?)</script>', text)
    trace = json.loads(data)["data"][0]
    assert (trace["x"], trace["y"]) == ([0.3, 2], [None, None])
    assert trace["name"] == "&lt;script>alert(1)&lt;/script>"  # plotly reads tags in names


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = Page("first", [Section("x", [Text("x")])]).write(tmp_path / "report.html")
    before = path.read_text(encoding="utf-8")

    class Broken:
        def render(self, rendering: object) -> str:
            raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        Page("second", [Section("x", [Broken()])]).write(path)  # type: ignore[list-item]
    assert path.read_text(encoding="utf-8") == before
    with pytest.raises(TorchQuantError, match="there is no folder"):
        Page("third", []).write(tmp_path / "none" / "report.html")
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_wrong_parts_are_refused() -> None:
    with pytest.raises(ConfigError, match="must have 2 cells, got \\[1\\]"):
        Table(["a", "b"], [[1]])
    with pytest.raises(ConfigError, match="'a' twice"):
        Graph([Node("a"), Node("b"), Node("a")], [])
    with pytest.raises(ConfigError, match="an edge leads to 'c'"):
        Graph([Node("a")], [("a", "c")])


def test_a_reader_sorts_clicks_and_sees(browser: Browser, tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    names = ("conv", EVIL, "layer1.0", "fc")
    page = Page("A report", [Section("Parts", every_part("x")), Section("Graph", [graph(*names)])])
    found = check_opened(browser, page.write(tmp_path / "report.html"), "page")
    columns = {column["name"]: column["orders"] for column in found.tables[0]}
    assert columns["layer"][0] == ["ascending", [EVIL, "b9", "b10", "c"]]
    assert columns["SQNR"][0] == ["descending", ["exact", "30.25", "9.5", "–"]]
    assert columns["SQNR"][1] == ["ascending", ["9.5", "30.25", "exact", "–"]]
    assert columns["bytes"][1] == ["ascending", ["7 B", "1,024 kB", "2 MB", ""]]
    assert columns["share"][0] == ["descending", ["50%", "7.5%", "5.0%", "-1.5%"]]
    assert found.graphs[1]["names"] == list(names)
    assert found.graphs[1]["paths"] == 4
    assert "1,024 kB" in found.graphs[1]["text"]
    assert found.drawn == found.plots == 6  # four figures, and one of the node of each graph


def test_a_fault_of_a_script_is_found(browser: Browser, tmp_path: Path) -> None:
    path = Page("x", [Section("x", [TABLE])]).write(tmp_path / "report.html")
    path.write_text(path.read_text().replace("</main>", "</main><script>missing()</script>"))
    assert any("missing is not defined" in fault for fault in opened(browser, path, "faulty").faults)
