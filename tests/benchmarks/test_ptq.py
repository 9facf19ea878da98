"""The benchmark of post-training algorithms: its ways, its cells and its page. Nothing is timed."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.ptq import agreement, cell, facts_of
from benchmarks.real.networks import Real
from benchmarks.real.peers._base import Quantized
from benchmarks.real.ptq_page import page
from benchmarks.real.ptq_ways import WAYS, Made, Way, ends_of, ours, reads_of_layers
from torchquant.utils import weight_slots


class Tiny(nn.Module):
    """Three layers, of which the second is declared first."""

    def __init__(self) -> None:
        super().__init__()
        self.middle = nn.Conv2d(8, 8, 3, groups=8)
        self.first = nn.Conv2d(3, 8, 3)
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x).relu()).mean((2, 3)))


def tiny() -> Real:
    torch.manual_seed(0)
    return Real(Tiny().eval(), *([(torch.randn(4, 3, 8, 8),) for _ in range(2)] for _ in range(2)))


def test_each_network_has_ways_of_its_bits() -> None:
    found = {(way.section, way.tool, name) for way in WAYS.values() for name in way.networks}
    assert {("w4a8", tool, name) for tool in ("ours", "Brevitas") for name in ("face", "lite0", "pitch_small")} <= found
    assert {("w4", tool, "speaker") for tool in ("ours", "NNCF", "torchao", "ORT")} <= found
    assert {("w4 group", tool, "minilm") for tool in ("ours", "NNCF", "torchao", "ORT")} <= found


def test_both_sides_leave_the_ends_in_the_order_of_execution_float() -> None:
    network = tiny()
    assert ends_of(network.model, network.calibration[0]) == ("first", "last")
    made = ours(network, Path(), reads_of_layers, "gptq")
    quantized = [slot for slot in weight_slots(made.quantized.call) if slot.quantizer is not None]  # type: ignore[arg-type]
    assert [slot.path for slot in quantized] == ["middle"]
    assert made.quantized.weights == [8 * 9]
    assert made.facts["layers"] == 1


def test_memory_that_is_allowed() -> None:
    network = tiny()
    held = sum(p.nbytes for p in network.model.parameters())
    cut = 2 * 4 * 8 * 6 * 6 * 4  # what the second layer reads, in both batches
    facts = facts_of(network)
    assert facts["largest_k"] == 27
    assert facts["budget_mb"] == (held + 2 * cut + 3 * 27**2 * 8) >> 20


def test_a_cell_has_quality_and_cost() -> None:
    network = tiny()
    same = Way("w4", "none", "float", lambda *_: Made(Quantized(network.model, [108])), ("face",))
    found = cell(network, "lite0", same, Path())
    assert found["db"] == float("inf")
    assert found["agrees"] == 1.0
    assert {"seconds", "float_seconds", "peak_mb", "peak_before_mb", "share"} <= found.keys()


def test_agreement_of_vectors_is_that_of_nearest_neighbours() -> None:
    vectors = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    moved = vectors.clone()
    moved[1] = torch.tensor([0.0, 0.8])
    assert agreement("minilm", vectors, vectors * 3) == 1.0
    assert agreement("minilm", vectors, moved) < 1.0
    assert agreement("face", torch.tensor([[0.0, 0.7], [0.0, 0.2]]), torch.tensor([[9.0, 0.8], [0.0, 0.9]])) == 0.5


def content(**cells: Any) -> dict[str, Any]:
    facts = {"batches": 2, "test_batches": 2, "float_seconds": 0.5, "largest_k": 27, "budget_mb": 10}
    return {
        "command": "python -m benchmarks.ptq",
        "versions": {"torch": "2"},
        "threads": 1,
        "remarks": "Why it is so.",
        "networks": {"face": facts},
        "cells": {"face": cells},
    }


@pytest.mark.parametrize(("db", "said"), [(20.0, "met"), (12.0, "missed")])
def test_page_says_how_goals_fare(db: float, said: str) -> None:
    measured = {
        "seconds": 2.0,
        "float_seconds": 0.5,
        "peak_mb": 110,
        "peak_before_mb": 100,
        "agrees": 0.5,
        "share": 1.0,
    }
    stages = measured | {"stage_seconds": 1.0, "layers": 3, "undone": 1}
    text = page(
        content(
            **{
                "w4a8 | ours | nearest": stages | {"db": 10.0},
                "w4a8 | ours | gptq:act_order": stages | {"db": db},
                "w4a8 | Brevitas | gptq": measured | {"db": 15.0},
                "w4a8 | Brevitas | nearest": measured | {"db": 99.0, "share": 0.4},
                "w4a8 | Brevitas | adaround": {"fails": "ValueError: no such thing"},
            }
        )
    )
    assert f"| 3 dB over rounding to nearest | face | gptq:act_order: {db - 10:+.1f} dB | {said} |" in text
    assert f"gptq:act_order: {db:.1f}, Brevitas 15.0 dB | {said} |" in text
    assert "gptq:act_order: 1.0 s, allowed 1.3 s | met |" in text
    assert "| Brevitas | adaround | ValueError: no such thing |" in text
    assert f"| **{max(db, 15.0):.1f}**" in text  # not that of a tool that leaves most weights float
    assert "99.0 (40% of weights)" in text
    assert "1 of 3 layers undone" in text
    assert "Why it is so." in text


def test_a_way_names_its_tool() -> None:
    way = next(way for way in WAYS.values() if way.tool == "Brevitas" and way.section == "w4a8")
    assert isinstance(way.make, partial)
    assert WAYS[way.name] is way
