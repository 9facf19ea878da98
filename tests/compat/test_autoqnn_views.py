"""AutoQNN's pictures: the graph of a model with and without graphviz, and histograms of quantized weights."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from torchquant.compat import autoqnn
from torchquant.compat.autoqnn.core import convert
from torchquant.compat.autoqnn.utils import EMA, ModuleIO, ModuleIOs, view_module, zero_grad
from torchquant.errors import MissingDependencyError


class Digraph:
    """Stands in for that of the package graphviz, which may not be installed."""

    def __init__(self, **options: Any) -> None:
        self.nodes: dict[str, str] = {}
        self.links: list[tuple[str, str]] = []

    def node(self, name: str, label: str) -> None:
        self.nodes[name] = label

    def edges(self, pairs: list[tuple[str, str]]) -> None:
        self.links = pairs

    def pipe(self, format: str) -> bytes:
        if format == "pdf":
            raise OSError("failed to execute dot")
        return b"<svg/>"


NET = nn.Sequential(nn.Linear(4, 2), nn.ReLU())


def test_the_graph_is_a_digraph_of_graphviz(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    graphviz = ModuleType("graphviz")
    graphviz.Digraph = Digraph  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "graphviz", graphviz)
    nodes, edges, dot = view_module(NET, (1, 4), tmp_path / "net.svg")
    assert isinstance(dot, Digraph)
    assert (dot.nodes, dot.links) == (nodes, edges)
    assert (tmp_path / "net.svg").read_bytes() == b"<svg/>"
    with pytest.raises(MissingDependencyError, match=r"a \.pdf needs the program dot of Graphviz .*failed to execute"):
        view_module(NET, save_path=tmp_path / "net.pdf")
    assert not (tmp_path / "net.pdf").exists()


def test_without_graphviz_drawing_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "graphviz", None)
    nodes, edges, dot = view_module(NET)
    assert len(nodes) == len(edges) + 1
    assert str(dot).startswith("digraph Net {")
    said = r"needs the package 'graphviz', which is not installed; run: pip install 'torchquant\[autoqnn\]'"
    with pytest.raises(MissingDependencyError, match=said):
        dot.render("net")
    assert "The graph is not drawn: this needs the package" in dot._repr_html_()
    with pytest.raises(MissingDependencyError, match=said):
        view_module(NET, save_path=tmp_path / "net.png")
    assert list(tmp_path.iterdir()) == []


def recorded(weight_quant: Any) -> ModuleIOs:
    model = convert(nn.Sequential(nn.Linear(50, 40)), quantize_config_dict={"weight_quant": weight_quant})
    records = ModuleIOs([("0.weight", model[0].weight_quant), ("0", model[0])])
    records.register()
    model(torch.randn(3, 50))
    records.unregister()
    return records


def test_histograms_show_scheme_bits_and_levels(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    records = recorded(autoqnn.quantizers.FixedQuant(bitwidth=3))
    figure = records.draw_differences(save_path=tmp_path / "picture.png")
    before, after, *_ = figure.axes
    assert (before.get_title(), after.get_title()) == ("0.weight: before", "0.weight: after, FixedQuant, 3 bits")
    levels = records.modules["0.weight"].levels()
    torch.testing.assert_close(torch.tensor(after.get_xticks()), levels, check_dtype=False)
    assert before.get_xlim() == after.get_xlim()
    assert min(label.get_fontsize() for axes in figure.axes for label in axes.get_xticklabels()) >= 10
    header = (tmp_path / "picture.png").read_bytes()[:20]
    assert int.from_bytes(header[16:20], "big") == 1200


def test_histograms_in_one_panel_and_many_levels() -> None:
    pytest.importorskip("matplotlib")
    figure = recorded(autoqnn.quantizers.VecQ(bitwidth=6, per_channel=False)).draw_differences(rows=1, bins=20)
    first, second = figure.axes
    assert first.get_title() == "0.weight: VecQ, 6 bits"
    assert len(first.get_xticks(minor=True)) == 64
    assert second.get_title() == "0: Linear"
    assert [text.get_text() for text in first.get_legend().get_texts()] == ["before", "after"]
    labels = recorded(autoqnn.quantizers.PotQ(bitwidth=4)).draw_differences(rows=1).axes[0].get_xticklabels()
    assert 0 < sum(label.get_text() == "" for label in labels) < len(labels)


def test_a_figure_is_pyplots_where_pyplot_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = recorded(autoqnn.quantizers.VecQ(bitwidth=2)).draw_differences()
    assert plt.gcf() is figure
    plt.close(figure)


def test_one_module_is_recorded() -> None:
    record = ModuleIO(nn.ReLU())
    record.register()
    record.module(torch.tensor([-1.0, 2.0]))
    record.unregister()
    record.module(torch.tensor([5.0]))
    assert record.input is not None
    assert (record.input[0].tolist(), record.output.tolist()) == ([-1.0, 2.0], [0.0, 2.0])


def test_small_helpers() -> None:
    x = torch.ones(2, requires_grad=True)
    x.sum().backward()
    zero_grad(x)
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 0.0]
    assert float(EMA(torch.tensor(1.0), torch.tensor(3.0), 0.75)) == 1.5
