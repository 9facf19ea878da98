"""The benchmark on real networks: what it counts, what its page says, and that a run can go on. Nothing is timed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import real_networks
from benchmarks.harness import BASELINE, CONTROL, Comparison
from benchmarks.real import files, sweep
from benchmarks.real.networks import NETWORKS, Real
from benchmarks.real.page import missed, page
from benchmarks.real.peers import OTHERS, OURS, PEERS
from benchmarks.real.peers._base import Quantized, shares
from benchmarks.real.peers.ours import calibrated, quantized_weights
from torchquant import QuantPlan
from torchquant.range_observers import OBSERVERS, ExpAvgMinMax

WAYS = {"w8a8": "ours", "static": "of others", "dynamic": "of each call", "partial": "linear layers only"}
MACHINE = {"date": "2026-01-02T00:00", "cpu": "a processor", "threads": 2}


class Tiny(nn.Module):
    """A table, a convolution with its norm, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.linear = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(self.conv(x)).relu().mean((2, 3)))


def tiny() -> Real:
    torch.manual_seed(0)
    model = Tiny()
    model.train()(torch.randn(64, 3, 8, 8))
    parts = [[(torch.randn(4, 3, 8, 8),) for _ in range(2)] for _ in range(2)]
    parts[1].append((torch.randn(1, 3, 8, 8),))  # of another shape, so left out
    return Real(model.eval(), *parts)


def results(**cells: Any) -> dict[str, Any]:
    return {
        "runs": [{"command": "python -m benchmarks.real_networks", "machine": MACHINE}],
        "versions": {"torch": "2"},
        "ways": WAYS,
        "ours": ["w8a8"],
        "dynamic": ["dynamic"],
        "factors": {"observer": ["a", "b"], "batch norm": ["folded", "own"]},
        "remarks": {"net: accuracy": "too coarse; take finer"},
        "cells": cells,
    }


PEER_CELLS = {
    "net": {
        "w8a8": {"db": 20.0, "share": 1.0, "tables": None},
        "static": {"db": 21.0, "share": 0.96, "tables": 0.0},
        "dynamic": {"db": 20.2, "share": 1.0, "tables": 1.0},
        "partial": {"db": 40.0, "share": 0.5, "tables": None},
    },
    "other": {"w8a8": {"db": 9.0, "share": 1.0, "tables": None}, "static": {"fails": "TypeError: no"}},
}


def test_a_tool_is_compared_where_it_quantizes_as_much() -> None:
    text = page(results(peers=PEER_CELLS), "r.json")
    lines = text.splitlines()
    assert "| static | **21.0** ° | fails |" in lines
    assert "| partial | 40.0\\* 50% |  |" in lines
    assert "| w8a8 | 20.0 | **9.0** |" in lines
    row = "| net | 20.0 w8a8 | 21.0 static | **+1.0** | 20.2 dynamic | +0.2 | 40.0 partial, 50% of weights |"
    assert row in lines
    assert "- peers, other, static: TypeError: no" in lines


def test_missed_goals_stand_with_their_cause() -> None:
    file_cells = {
        "times": {"over theirs": 1.2, "over theirs exact": 1.04, "over float": 0.5, "noise": 0.02, "valid": True},
        "sizes": {"float": 100, "ours": 27, "theirs": 26},
        "certificate": {"passed": False, "compared": 1000, "differ": 3, "failures": ["3 codes differ"]},
    }
    given = results(peers=PEER_CELLS, files={"net": file_cells})
    assert missed(given) == [
        ("net", "accuracy", "static is ahead by 1.0 dB"),
        ("net", "speed", "1.20 of the time of ONNX Runtime's own file"),
        ("net", "certificate", "3 codes differ"),
    ]
    lines = page(given, "r.json").splitlines()
    assert "| net | accuracy | static is ahead by 1.0 dB | too coarse; take finer |" in lines
    assert "| net | 1.20 | 1.04 | 0.50 | 2% | 0.27 | 0.26 | FAILED | 1,000 | 3 |" in lines
    file_cells["times"]["valid"] = False
    assert [goal for _, goal, _ in missed(given)] == ["accuracy", "certificate"]
    assert "None is missed." in page(results(), "r.json")


def test_calibrations_stand_beside_their_goals() -> None:
    cells = {
        "net": {
            "ema": {"cost": 1.154, "minima": 1.1, "valid": True},
            "running": {"cost": 1.21, "minima": 1.18, "valid": True},
            "mse": {"cost": 1.61, "minima": 1.5, "valid": True},
            "entropy": {"cost": 9.0, "minima": 1.5, "valid": False},
            "histogram": {"fails": "E: no"},
        }
    }
    given = results(calibration=cells)
    lines = page(given, "r.json").splitlines()
    assert "| network | ema | minmax | running | histogram | mse | percentile | entropy |" in lines
    assert "| net | 1.15 (1.10) |  | **1.21** (1.18) | fails | **1.61** (1.50) |  | void |" in lines
    assert "| at most | 1.15 | 1.15 | 1.15 | 1.50 | 1.50 | 1.50 | 1.50 |" in lines
    assert missed(given) == [("net", "calibration", "running 1.21, mse 1.61")]


def test_a_calibration_is_timed_from_its_first_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def compare(baseline: Any, candidates: Any, rounds: int) -> Any:
        for _ in range(rounds):
            baseline()
            candidates["calibration"]()
        calls = [1.0] * rounds
        return Comparison({BASELINE: calls, CONTROL: calls, "calibration": calls})

    def observed(self: ExpAvgMinMax, x: Tensor, former: Any = ExpAvgMinMax.observe_batch) -> None:
        seen.append(self.is_observed)
        former(self, x)

    monkeypatch.setattr(sweep, "compare", compare)
    choice = next(sweep.timed_observers())
    assert choice.name == "w8a8 observer=ema"
    monkeypatch.setattr(ExpAvgMinMax, "observe_batch", observed)
    assert sweep.calibration_cost(tiny(), choice, 2) == {"cost": 1.0, "minima": 1.0, "valid": True}
    n_batches, n_calibrations, n_sites = 2, 3, len(seen) // 6
    assert seen.count(False) == n_calibrations * n_sites
    assert len(seen) == n_calibrations * n_batches * n_sites


def test_choices_are_ranked() -> None:
    cells = {
        "x": {
            "w8a8 observer=a": {"db": 10.0},
            "w8a8 observer=b": {"db": 12.04},
            "w8a8 observer=a cost": {"cost": 1.1, "valid": True},
            "w8a8 observer=b cost": {"cost": 9.0, "valid": False},
        },
        "y": {
            "w8a8 observer=a": {"db": 30.0},
            "w8a8 observer=b": {"fails": "E: no"},
            "w8a8 observer=a cost": {"cost": 1.5, "valid": True},
        },
    }
    lines = page(results(defaults=cells), "r.json").splitlines()
    assert "### w8a8: observer" in lines
    assert "| x | 10.0, 1.10x | **12.0**, void |" in lines
    assert "| y | **30.0**, 1.50x | fails |" in lines
    assert "| mean rank | 1.5 | 1.0 |" in lines
    assert "| mean loss | 1.02 dB | 0.00 dB |" in lines
    assert "| largest cost | 1.50x |  |" in lines


def test_shares_tell_tables_from_factors() -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 8), nn.BatchNorm1d(8))
    assert shares([32], model) == (1.0, 0.0)
    assert shares([40, 16], model) == (0.5, 1.0)
    assert shares([32], nn.Linear(4, 8)) == (1.0, None)


def test_ours_counts_every_weight_once() -> None:
    network = tiny()
    assert sorted(quantized_weights(calibrated(network, "w8a8"))) == [32, 216]


@pytest.mark.parametrize("choice", list(sweep.choices("minilm")), ids=lambda choice: choice.name)
def test_a_choice_changes_the_ready_set_in_one_thing(choice: sweep.Choice) -> None:
    model = tiny().model
    plan = QuantPlan.from_rules(choice.made(), model)
    field = {"observer": "input", "weight rule": "weight", "granularity": "weight"}.get(choice.factor)
    site = next(site for site in plan.sites if site.path == "conv")
    if field is None:
        assert bool(site.fold_bn) is (choice.value == "folded")
    elif choice.factor == "granularity":
        assert ("/channel" in site.weight) is (choice.value == "channel")
    else:
        assert f"observer={choice.value}" in getattr(site, field)
    assert {site.path for site in plan.sites} == {s.path for s in QuantPlan.from_rules(choice.rules, model).sites}


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a run of a tiny network writes."""
    monkeypatch.setitem(NETWORKS, "tiny", tiny)
    return tmp_path / "real.json"


def command(out: Path, *more: str) -> int:
    threads = torch.get_num_threads()
    common = ["--networks", "tiny", "--rounds", "0", "--threads", "1", "--no-mallopt", "--out", str(out)]
    try:
        return real_networks.main([*common, *more])
    finally:
        torch.set_num_threads(threads)


def test_a_run_sweeps_every_choice_and_writes_its_page(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sweep, "FACTORS", sweep.FACTORS | {"observer": ("ema", "mse"), "weight rule": ("minmax",)})
    assert command(out, "--tables", "defaults", "peers", "--peers", "w8a8") == 0
    cells = json.loads(out.read_text())["cells"]
    assert cells["peers"]["tiny"]["w8a8"]["db"] > 20
    assert cells["peers"]["tiny"]["w8a8"]["share"] == 1.0
    rows = cells["defaults"]["tiny"]
    assert rows.keys() == {choice.name for choice in sweep.choices("tiny")}
    assert [row for row in rows.values() if "fails" in row] == []
    assert rows["w4a8 granularity=channel"]["db"] > 10
    text = out.with_suffix(".md").read_text()
    assert "### w4a8: weight rule" in text
    assert "defaults, tiny, w8a8 observer=mse: db" in capsys.readouterr().out
    out.with_suffix(".md").unlink()
    assert real_networks.main(["--from", str(out)]) == 0
    assert out.with_suffix(".md").read_text() == text


def test_a_run_goes_on_and_tries_again_what_failed(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(network: Real, folder: Path) -> Quantized:
        print("a tool talks")
        raise TypeError("not this one\nand more")

    monkeypatch.setitem(PEERS, "ORT min-max", PEERS["w8a8"].__class__((), refused, "fails"))
    asked = ("--tables", "peers", "--peers", "w8a8", "ORT min-max")
    assert command(out, *asked) == 0
    first = json.loads(out.read_text())["cells"]["peers"]["tiny"]
    assert first["ORT min-max"]["fails"] == "TypeError: not this one"
    first["w8a8"]["db"] = 1.25  # kept, so not measured again
    held = json.loads(out.read_text())
    held["cells"]["peers"]["tiny"] = first
    out.write_text(json.dumps(held))
    monkeypatch.setitem(PEERS, "ORT min-max", PEERS["w8a8"])
    assert command(out, *asked, "--resume") == 0
    again = json.loads(out.read_text())
    assert again["cells"]["peers"]["tiny"]["w8a8"]["db"] == 1.25
    assert again["cells"]["peers"]["tiny"]["ORT min-max"]["db"] > 20
    assert len(again["runs"]) == 2
    held = real_networks.Results(out, {}, cells={"files": {"tiny": {"times": {"valid": False}, "sizes": {"ours": 1}}}})
    assert (held.has("files", "tiny", "times"), held.has("files", "tiny", "sizes")) == (False, True)
    with pytest.raises(SystemExit, match="was measured with .*give another --out"):
        command(out, *asked, "--resume", "--batches", "1")


def test_what_is_not_installed_fails_by_name(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = PEERS["w8a8"]
    monkeypatch.setitem(PEERS, "w8a8", peer.__class__(("no_such_package",), peer.build, peer.about))
    assert command(out, "--tables", "peers", "--peers", "w8a8") == 0
    cell = json.loads(out.read_text())["cells"]["peers"]["tiny"]["w8a8"]
    assert cell["fails"] == "not installed: no_such_package"


def test_every_observer_is_a_choice() -> None:
    assert {f"w8a8 observer={name}" for name in OBSERVERS} <= {choice.name for choice in sweep.choices("tiny")}


def test_ways_have_names_of_their_own() -> None:
    assert not set(OURS) & set(OTHERS)
    assert all(name in real_networks.NETWORKS for way in PEERS.values() for name in way.networks)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_files_are_compared(tmp_path: Path) -> None:
    network = tiny()
    network.test = network.test[:2]
    sizes = files.sizes(network, tmp_path)
    assert set(sizes) == {"float", "ours", "theirs"}
    said = files.certificate(network, tmp_path)
    assert said["passed"]
    assert said["compared"] > 0
    found = files.times(network, tmp_path, rounds=1)
    assert found["over theirs"] > 0
