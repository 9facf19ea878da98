"""The curves of a monitor in a report."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import torchquant as tq
from torchquant.report import Details, Figure, Page, Table
from torchquant.runs.curves import FIGURES, curve_sections, watched_sections
from torchquant.training import Monitor


def watched(path: Path) -> Monitor:
    torch.manual_seed(0)
    x = torch.rand(64, 8)
    model = tq.quantize(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), "w4a4-lsq", x)
    tq.calibrate(model, [x])
    tq.set_qmodule_state(model, tq.QModuleState.QUANT_AWARE_TRAIN)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    with Monitor(model, every=2, to=f"csv:{path}") as monitor:
        for _ in range(12):
            optimizer.zero_grad()
            loss = (model(x) - 1.0).square().mean()
            loss.backward()
            optimizer.step()
            monitor.step({"loss": loss})
    return monitor


def test_a_report_draws_what_a_monitor_saw(tmp_path: Path) -> None:
    monitor = watched(tmp_path / "monitor.csv")
    (section,) = curve_sections(monitor.history)
    figures = {part.title: part for part in section.parts if isinstance(part, Figure)}
    assert figures.keys() >= {"loss of a batch", *(title for title, *_ in FIGURES)}
    drawn = figures["Codes of weights that change"].data[0]
    assert drawn["x"] == [2, 4, 6, 8, 10, 12]
    assert drawn["y"] == [look.numbers["weight/flips"] for look in monitor.history]
    (details,) = (part for part in section.parts if isinstance(part, Details))
    (table,) = details.parts
    assert isinstance(table, Table)
    rows = {row[0]: dict(zip(table.header, row, strict=True)) for row in table.rows}
    assert rows["0/weight"]["changed"] == monitor.history[-1].numbers["0/weight/flips"]
    assert rows["2/output"]["oscillation"] is None
    (read,) = watched_sections(tmp_path)
    assert "What the training did" in Page("run", [read]).write(tmp_path / "report.html").read_text()


def test_without_a_monitor_there_is_no_section(tmp_path: Path) -> None:
    assert watched_sections(tmp_path) == []
