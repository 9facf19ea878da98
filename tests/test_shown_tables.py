"""What a notebook and a logger get: the rows of the text tables as HTML, the numbers of a report under flat keys."""

from __future__ import annotations

import re
from html import unescape
from typing import Any

import pytest
import torch
from torch import nn

import torchquant as tq
from torchquant._tables import ShownAsTables, html_of, text_table
from torchquant.deploy.certificate.record import Certificate


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.LayerNorm(144), nn.Linear(144, 3)).eval()


X = torch.rand(2, 1, 8, 8)


def calibrated(rules: Any = "w8a8") -> Any:
    model = tq.quantize(net(), rules, X)
    with tq.qmodule_state(model, tq.QModuleState.CALIBRATION):
        model(X)
    return model


def html_words(html: str) -> list[str]:
    return " ".join(unescape(text) for text in re.findall(">([^<>]*)<", html)).split()


def text_words(text: str) -> list[str]:
    return [word for word in text.split() if not re.fullmatch("-{2,}", word)]


@pytest.mark.parametrize("name", ["plan", "report", "cost", "diff", "same"])
def test_a_notebook_shows_the_rows_of_the_text(name: str) -> None:
    model = calibrated()
    plan = model.plan
    shown: Any = {
        "plan": plan,
        "report": tq.state_report(model),
        "cost": plan.cost(net(), X),
        "diff": plan.diff(plan.replace("0", weight="affine:4")),
        "same": plan.diff(plan),
    }[name]
    html = shown._repr_html_()
    assert ("<table>" in html) is (name != "same")
    found, expected = html_words(html), text_words(str(shown))
    assert [w for w in found if w != "-"] == [w for w in expected if w != "-"]
    rows = sum(1 for line in str(shown).splitlines() if "  " in line and not set(line) <= {"-", " "})
    assert html.count("<tr>") >= rows


def test_cells_come_apart_where_the_columns_are() -> None:
    rows = [["", "a  b", "<i>"], ["-", "--", ""], ["xyz", "", "1 & 2"]]
    html = html_of("title\n" + text_table(["head", "q", "r"], rows) + "\n\nend")
    cells = [[unescape(c) for c in re.findall("<t[hd]>(.*?)</t[hd]>", row)] for row in html.split("<tr>")[1:]]
    assert cells == [["head", "q", "r"], *rows]
    assert html.startswith("<p>title</p><table>")
    assert html.endswith("</table><p>end</p>")
    assert "<i>" not in html


def test_all_that_print_tables_show_them() -> None:
    from torchquant.deploy.packed.size import FileSizes
    from torchquant.search import Allocation, Pareto, Sensitivity

    for kind in (Certificate, Allocation, Pareto, Sensitivity, FileSizes, tq.QuantPlan):
        assert issubclass(kind, ShownAsTables)
    assert "<table>" in Pareto("bytes", ())._repr_html_()


@pytest.mark.parametrize("rules", ["w8a8", "w4a4-lsq", "ternary"])
def test_scalars_are_flat_numbers_under_stable_keys(rules: str) -> None:
    fresh, model = tq.quantize(net(), rules, X), calibrated(rules)
    before, found = (tq.state_report(m).scalars() for m in (fresh, model))
    assert all(type(value) is float for value in found.values())
    assert all(re.fullmatch(r"[\w./-]+", key) for key in found)
    assert before.keys() < found.keys()
    assert list(found) == list(tq.state_report(calibrated(rules)).scalars())
    assert before["4/weight/calibrated"] == 0.0
    assert found["4/weight/calibrated"] == 1.0
    assert found["4/weight/bits"] == model.get_submodule("4").weight_quantizer.n_bits


def test_scalars_are_the_numbers_of_the_quantizers() -> None:
    model = calibrated("w8a8")
    found = tq.state_report(model).scalars()
    wrapper = model.get_submodule("0")
    low, high = wrapper.weight_quantizer.observer.get_ranges()
    assert found["0/weight/range_min"] == float(low.min())
    assert found["0/weight/range_max"] == float(high.max())
    delta = wrapper.weight_quantizer.affine_params().delta
    assert (found["0/weight/scale_min"], found["0/weight/scale_max"]) == (float(delta.min()), float(delta.max()))
    assert "numbers" not in tq.state_report(model).to_dicts()[0]
    assert "numbers" not in str(tq.state_report(model))
