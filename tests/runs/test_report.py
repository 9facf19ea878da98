"""Sections of reports of runs: accuracy with its interval, the model, losses, a certificate in words, the command."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from torch import nn

from tests.browser import check_whole
from torchquant.analysis import layer_errors
from torchquant.analysis.sections import accuracy_table, model_parts, sites_table, wilson
from torchquant.errors import ConfigError
from torchquant.plan import quantize
from torchquant.report import Graph, Node, Page, Section, Table
from torchquant.runs.losses import keep_loss, read_losses
from torchquant.runs.quantize import JobConfig
from torchquant.runs.report import certificate_section, made_section, training_sections
from torchquant.runs.settings import command_line
from torchquant.training import calibrate

EVIL = "<script>alert(1)</script>"


def certificate(verdict: str, differ: int = 0) -> dict[str, Any]:
    sites = [
        {"site": "conv", "elements": 4000, "differ": differ, "largest": 2 if differ else 0},
        {"site": "hidden", "elements": 0, "differ": 0, "largest": 0},
    ]
    return {
        **{"verdict": verdict, "samples": 1234, "float_operators": ["softmax"], "not_run": ["aux"]},
        "comparisons": [{"way": "integer kernels", "sites": sites}],
        "outputs": [{"engine": "runtime", "accuracy": 0.5, "same_top1": 0.75, "largest_difference": 0.125}],
    }


def said_by(*sections: Section) -> str:
    return "".join(check_whole(Page("a page", sections).html()).text)


@pytest.mark.parametrize(("share", "n"), [(0.9, 100), (0.5, 7), (0.02, 50), (0.0, 20), (1.0, 20), (0.123, 100_000)])
def test_the_interval_is_wilsons(share: float, n: int) -> None:
    """Its ends are the probabilities from which the seen share is 1.96 standard deviations away."""
    for end, (low, high) in zip(wilson(share, n), ((0.0, share), (share, 1.0)), strict=True):

        def apart(p: float) -> float:
            return (share - p) ** 2 - 1.959963984540054**2 * p * (1 - p) / n

        if low == high:
            assert end == pytest.approx(share, abs=1e-12)
        else:
            inside = (low, high - 1e-12) if high == share else (low + 1e-12, high)
            assert end == pytest.approx(brentq(apart, *inside, xtol=1e-14), abs=1e-6)


def test_accuracy_comes_with_its_interval_and_sample_size() -> None:
    table = accuracy_table([("float", 0.9), ("int8", 0.89)], 100, {"weight bytes": [4000, 1000]})
    text = said_by(Section("Accuracy", [table]))
    assert "On 100 test samples" in text.replace("Accuracy on", "On")
    assert "82.56% to 94.48%" in text
    assert [row[3] for row in table.rows] == [4000, 1000]


class Net(nn.Module):
    """A residual block whose first layer has the name of an attack; one layer is not reached."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module(EVIL, nn.Linear(6, 6))
        self.second, self.third, self.unused = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = getattr(self, EVIL)(x).relu()
        return self.third(self.second(y).tanh() + y)


def quantized(rules: Any) -> nn.Module:
    model = quantize(Net(), rules, torch.randn(2, 6))
    calibrate(model, [torch.randn(32, 6)], show_progress=False)
    return model


@pytest.mark.filterwarnings("ignore::torchquant.errors.StaysFloatWarning")
@pytest.mark.parametrize("rules", ["w8a8", "w4a4-lsq", [{"weight": "mxfp4"}], [{"weight": "affine:3"}]], ids=str)
def test_the_model_is_drawn_with_every_site_and_its_details(rules: Any) -> None:
    model, x = quantized(rules), torch.randn(16, 6)
    errors = layer_errors(model, x)
    graph, _ = model_parts(model, x, errors)
    assert isinstance(graph, Graph)
    assert [node.name for node in graph.nodes] == [error.path for error in errors]
    assert {(EVIL, "second"), ("second", "third" if rules != "w8a8" and rules != "w4a4-lsq" else "add")} <= set(
        graph.edges
    )
    for node, error in zip(graph.nodes, errors, strict=True):
        shown = error.output or error.weight
        assert node.value == (None if shown is None else shown.sqnr_db)
        assert isinstance(node.details[0], Table)
        n_figures = len(error.weights) + (error.output is not None)
        assert len(node.details) == 1 + n_figures
    text = said_by(Section("Model", [graph]))
    assert EVIL in text


def test_histograms_are_of_the_values_and_levels_are_drawn() -> None:
    model = quantized([{"weight": "affine:3"}])
    graph, _ = model_parts(model, torch.randn(16, 6))
    node: Node = next(node for node in graph.nodes if node.name == "second")  # type: ignore[attr-defined]
    facts, figure = node.details
    weight = model.second.layer.weight.detach()  # type: ignore[union-attr]
    counts, _ = np.histogram(weight.numpy(), 48, figure_range(figure))
    real, quantized_, levels = figure.data  # type: ignore[attr-defined]
    assert [round(36 * (share or 0.0)) for share in real["y"]] == counts.tolist()
    values = model.second.quantizers()["weight"](weight).unique()  # type: ignore[union-attr, operator]
    assert sum(share is not None for share in quantized_["y"]) == len(values)
    assert set(np.round(values.tolist(), 5)) <= set(np.round(levels["x"], 5))
    assert {row[0]: row[1] for row in facts.rows}["codes used"] == f"{len(values)} of 8"  # type: ignore[attr-defined]


def figure_range(figure: Any) -> tuple[float, float]:
    middles = figure.data[0]["x"]
    half = (middles[1] - middles[0]) / 2.0
    return middles[0] - half, middles[-1] + half


def test_the_table_of_sites_says_exact_and_sorts_it_last() -> None:
    errors = layer_errors(quantized([{"weight": "affine:3"}]), torch.randn(4, 6))
    table = sites_table([*errors])
    assert [row[0] for row in table.rows] == [error.path for error in errors]


@pytest.mark.parametrize(
    ("verdict", "differ", "words"),
    [
        ("passed", 0, "every code that was compared is within its bound"),
        ("FAILED", 7, "does not compute what the integer reference computes"),
        ("INCOMPLETE", 0, "some sites could not be compared"),
    ],
)
def test_a_certificate_is_said_in_words(verdict: str, differ: int, words: str) -> None:
    text = said_by(certificate_section(certificate(verdict, differ)))
    assert f"Certificate: {verdict}" in text
    assert words in text
    assert f"integer kernels: {differ} of 4,000 codes at 1 sites differ" in text
    assert ("by 2 at most" in text) == bool(differ)
    assert "1,234 samples" in text
    assert "in float32 in the reference too: softmax" in text
    assert "50.00%" in text


def test_losses_are_kept_over_stops_and_replaced_by_a_new_start(tmp_path: Path) -> None:
    assert read_losses(tmp_path) == {}
    for epoch, loss in ((1, 2.0), (2, 1.0), (3, math.nan)):
        keep_loss(tmp_path, "float", epoch, loss)
    keep_loss(tmp_path, "quantized", 1, 0.5)
    assert read_losses(tmp_path) == {"float": [(1, 2.0), (2, 1.0), (3, None)], "quantized": [(1, 0.5)]}
    keep_loss(tmp_path, "float", 2, 0.75)
    assert read_losses(tmp_path)["float"] == [(1, 2.0), (2, 0.75)]
    (tmp_path / "losses.json").write_text("[1, 2]")
    with pytest.raises(ConfigError, match=r"losses.json must hold training, epoch, loss.*; delete it"):
        read_losses(tmp_path)


def test_a_run_says_how_it_is_made_again() -> None:
    config = JobConfig("my nets.py:net", mode="qat", seed=3)
    command = command_line("quantize", config)
    assert command == "torchquant quantize 'my nets.py:net' --mode qat --seed 3"
    text = said_by(made_section(command, {"model": EVIL, "contents": {"a": "b"}, "distill": None}, "About it."))
    assert command in text
    assert f"torch {torch.__version__}" in text
    assert EVIL in text
    assert "contents" not in text


def test_no_losses_make_no_section() -> None:
    assert training_sections({}) == []
    assert "Loss per epoch" in said_by(*training_sections({"float": [(1, 0.5)]}))
