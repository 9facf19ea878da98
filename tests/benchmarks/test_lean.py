"""Memory is counted exactly, lean training takes less of it than float training, and the command writes its files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import lean, lean_pictures
from benchmarks.allocations import Allocations, allocations
from benchmarks.harness import BASELINE, CONTROL
from benchmarks.lean import GOALS, WAYS, Way, is_done, step_of, table
from benchmarks.models import MODELS, ModelCase, image_batch
from torchquant.qmodule import recorder
from torchquant.runs.small_resnet import SmallResNet

FLOAT = 4
"""Bytes of a float32."""


def test_every_change_is_recorded() -> None:
    def call() -> None:
        x = torch.empty(1000)
        y = torch.empty(500)
        del x
        z = torch.empty(2000)
        del y, z

    recorded = allocations(call)
    assert recorded.nbytes == [FLOAT * n for n in (1000, 1500, 500, 2500, 500, 0)] or recorded.nbytes == [
        FLOAT * n for n in (1000, 1500, 500, 2500, 2000, 0)
    ]
    assert recorded.peak == FLOAT * 2500
    assert recorded.times == sorted(recorded.times)


def test_memory_inside_of_operators_and_of_backward_counts() -> None:
    x = torch.randn(100, 50, requires_grad=True)
    recorded = allocations(lambda: x.exp().sum().backward())
    assert recorded.nbytes[-1] == FLOAT * 5000, "the gradient stays"
    assert recorded.peak >= FLOAT * 2 * 5000, "the result of exp is kept until the gradient has been made from it"


def test_memory_from_before_is_not_counted_when_it_is_freed() -> None:
    held = [torch.ones(1000)]
    assert allocations(held.clear).peak == 0
    allocations(lambda: held.append(torch.ones(1000)))
    held.clear()  # the allocator has recorded that this was allocated, and not that it is freed
    held.append(torch.ones(1000))
    freed = allocations(held.clear)
    assert set(freed.nbytes) <= {0}
    assert allocations(lambda: None) == Allocations([], [])


def test_a_curve_of_few_points_has_the_peak_and_the_level_between_changes() -> None:
    recorded = Allocations([0, 10, 11, 90, 99], [4, 9, 5, 7, 0])
    assert recorded.sampled(4) == [9, 5, 5, 7]
    assert recorded.sampled(1) == [recorded.peak]
    assert Allocations([], []).sampled(2) == [0, 0]


class Attends(nn.Module):
    """A table, an encoder layer with its attention, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 32)
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0, activation="gelu")
        self.classify = nn.Linear(32, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.classify(self.layer(self.table(tokens)).mean(1))


def small_images(batch: int, size: int) -> tuple[Tensor, Tensor]:
    images, _ = image_batch(batch, size)
    return images[:, :1], torch.arange(batch) % 10


def tokens(batch: int, size: int) -> tuple[Tensor, Tensor]:
    return torch.arange(batch * size).view(batch, size) % 50, torch.arange(batch) % 10


SMALL: Mapping[str, ModelCase] = {
    "convolutional": ModelCase(lambda _: SmallResNet(), batch=small_images),
    "transformer": ModelCase(lambda _: Attends(), batch=tokens),
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small networks take part in the command, which measures them in this process, and small tensors in lean mode."""
    monkeypatch.setattr(recorder, "FEWEST_ELEMENTS", 16)
    for name, case in SMALL.items():
        monkeypatch.setitem(MODELS, name, case)
        monkeypatch.setitem(GOALS, name, lean.Goal(1.1, 0.9))
    monkeypatch.setattr(lean, "alone", lambda measure: measure())


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("name", "saved", "recomputed"), [("convolutional", 0.7, 0.15), ("transformer", 0.85, 0.7)])
def test_lean_training_saves_less_than_float_training(name: str, saved: float, recomputed: float) -> None:
    """Bytes for backward, over those of the float model, through `quantize` with 8 bits everywhere."""
    steps = {way: step_of(name, WAYS[way], 16, 32) for way in (BASELINE, "plain", "lean", "lean, recomputed")}
    assert all(step.void_because() == "" for step in steps.values())
    counted = {way: step.saved_bytes() for way, step in steps.items()}
    assert counted["plain"] > counted[BASELINE], "there is something to save"
    assert counted["lean"] <= saved * counted[BASELINE]
    assert counted["lean, recomputed"] <= recomputed * counted[BASELINE]


def run(out: Path, *more: str) -> int:
    threads = torch.get_num_threads()
    ways = ["plain", "lean"]
    try:
        return lean.main(["--models", "transformer", "--sizes", "4x8", "--ways", *ways, "--out", str(out), *more])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.usefixtures("small")
def test_the_command_writes_after_every_cell_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "lean.json"
    common = ["--no-mallopt", "--rounds", "1"]
    assert run(out, *common, "--measure", "bytes") == 0
    cells = json.loads(out.read_text())["cells"]["transformer"]["4x8"]
    assert cells.keys() == {BASELINE, CONTROL, "plain", "lean"}
    assert cells[BASELINE] == cells[CONTROL] | {"curve": cells[BASELINE]["curve"]}, "bytes do not depend on the run"
    assert max(cells["lean"]["curve"]) == cells["lean"]["peak"] >> 10
    assert {path.name for path in tmp_path.iterdir()} == {"lean.json", "lean.png", "lean_memory.png"}

    measured: list[Callable[[], dict[str, Any]]] = []
    monkeypatch.setattr(lean, "alone", lambda measure: measured.append(measure) or {"fails": "stopped"})
    run(out, *common, "--measure", "bytes", "time", "--resume")
    assert len(measured) == 1, "only the time was missing"
    run(out, *common, "--measure", "bytes", "time", "--resume")
    assert len(measured) == 2, "what failed is measured again"
    assert "stopped" not in json.dumps(json.loads(out.read_text())["cells"]["transformer"]["4x8"]["lean"])
    assert "<= 0.9 met" in capsys.readouterr().out


def test_a_cell_without_a_valid_control_is_measured_again_and_meets_no_goal() -> None:
    def cell(control: float) -> dict[str, Any]:
        return {"seconds": {BASELINE: [1.0], CONTROL: [control], "lean": [1.02]}, "notes": {}}

    assert is_done(cell(1.01))
    assert not is_done(cell(1.2))
    assert not is_done(None)
    assert not is_done({"fails": "killed"})
    assert "<= 1.05 met" in table({"resnet18": {"8x96": {"time": cell(1.01)}}})
    assert "<= 1.05 unknown" in table({"resnet18": {"8x96": {"time": cell(1.2)}}})
    assert lean_pictures.ratio_of({"time": cell(1.2)}, "lean", "time") is None
    assert lean_pictures.ratio_of({"time": cell(1.01)}, "lean", "time") == pytest.approx(1.02)


def test_other_libraries_have_no_goal() -> None:
    assert GOALS.keys() == {"resnet18", "mobilenet_v2", "efficientnet_b0", "vit_b_16", "bert"}
    assert [GOALS["resnet18"].for_saved(way) for way in WAYS] == [None, None, None, 0.7, 0.4, None, None]


def test_a_size_is_checked_before_anything_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        lean.arguments(["--sizes", "8by96"])
    assert "8by96" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        lean.arguments(["--out", "lean.csv"])
    assert "must end in .json, got 'lean.csv'" in capsys.readouterr().err
    assert lean.arguments(["--ways", "lean"]).ways == [BASELINE, CONTROL, "lean"]
    assert Way() == WAYS[BASELINE]
