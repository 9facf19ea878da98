"""How a run is carried out: threads, workers, float models that runs share, --force, progress with the time left."""

from __future__ import annotations

import io
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from torchquant.errors import ConfigError
from torchquant.runs import console as console_file
from torchquant.runs import float_cache, options, stages
from torchquant.runs.clock import Clock
from torchquant.runs.compare import Recipe, compare, make_cases
from torchquant.runs.compare import run as compare_run
from torchquant.runs.console import NullProgress, Terminal
from torchquant.runs.data import TrainBatches, load_digits, make_pictures
from torchquant.runs.networks import build_model
from torchquant.runs.options import RunOptions, usable_cores
from torchquant.runs.quantize import JobConfig, run_job
from torchquant.runs.search import SearchConfig, run_search

OWN = """
from torch import nn

def small():
    return nn.Sequential(nn.Flatten(), nn.Linear(256, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 10))
"""


class Told(NullProgress):
    """Keeps the messages, and the largest position of the progress."""

    def __init__(self) -> None:
        self.words: list[str] = []
        self.total = self.done = 0.0

    def start(self, total: float) -> None:
        self.total, self.done = total, 0.0

    def advance(self, amount: float, doing: str) -> None:
        self.done += amount
        self.words.append(doing)

    skip = lambda self, amount: self.advance(amount, "skipped")  # noqa: E731

    def within(self, amount: float, doing: str) -> None:
        assert 0 < amount <= 2.0
        self.words.append(doing)

    def message(self, text: str) -> None:
        self.words.append(text)


@pytest.fixture
def own_model(tmp_path: Path) -> str:
    (tmp_path / "own.py").write_text(OWN)
    return f"{tmp_path / 'own.py'}:small"


@pytest.fixture
def floats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(float_cache.PLACE, str(tmp_path / "floats"))
    return tmp_path / "floats"


def job(model: str, **more: Any) -> JobConfig:
    return JobConfig(model, **{"mode": "qat", "float_epochs": 2, "epochs": 1, "learning_rate": 5e-3, **more})


def never(*args: Any, **given: Any) -> None:
    raise AssertionError("something was trained")


# Float models


def test_runs_that_differ_only_in_what_comes_after_share_the_float_model(
    own_model: str, floats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run_job(job(own_model), tmp_path / "first")
    assert len(list(floats.iterdir())) == 1
    told = Told()
    again = run_job(job(own_model), tmp_path / "again", told)
    assert again == first, "the float model was taken over, and everything after it is the same"
    assert any("taken over from a run with the same training" in words for words in told.words)
    assert not any("float: epoch" in words for words in told.words)
    assert told.done == pytest.approx(told.total)
    with monkeypatch.context() as patch:
        patch.setattr(stages, "train", never)
        run_job(job(own_model, mode="ptq", rules="w4a8"), tmp_path / "other")
        run_search(SearchConfig("allocate", own_model, "bits<=4", float_epochs=2, learning_rate=5e-3, retrain_epochs=0),
                   tmp_path / "search")  # fmt: skip
        for other in ({"seed": 1}, {"float_epochs": 3}, {"learning_rate": 1e-3}):
            with pytest.raises(AssertionError, match="something was trained"):
                run_job(job(own_model, **other), tmp_path / "another")
        with pytest.raises(AssertionError, match="something was trained"):
            run_job(job(own_model), tmp_path / "alone", options=RunOptions(reuse_float=False))
        for changed in (OWN.replace("8", "9"), f"{OWN}\n# other contents"):
            (tmp_path / "own.py").write_text(changed)
            with pytest.raises(AssertionError, match="something was trained"):
                run_job(job(own_model), tmp_path / "changed")
    assert len(list(floats.iterdir())) == 1


def test_a_comparison_shares_float_networks(floats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, cases = Recipe(float_epochs=1, epochs=0, test_copies=1), make_cases(["affine"], [4], [8], 1)
    first = compare(cases, recipe, tmp_path / "first")
    monkeypatch.setattr(compare_run, "train", never)
    assert compare(cases, recipe, tmp_path / "again") == first


def test_float_models_are_deleted_from_the_oldest_on(floats: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = torch.nn.Linear(4, 4)
    float_cache.keep_float(net, "a")
    monkeypatch.setattr(float_cache, "MOST_BYTES", 2.5 * (floats / "a.pt").stat().st_size)
    for key in ("b", "c"):
        time.sleep(0.02)
        float_cache.keep_float(net, key)
    assert [path.stem for path in sorted(floats.iterdir())] == ["b", "c"]
    (floats / "c.pt").write_bytes(b"damaged")
    assert not float_cache.take_float(net, "c")
    assert float_cache.take_float(net, "b")
    monkeypatch.setenv(float_cache.PLACE, "0")
    assert not float_cache.take_float(net, "b")


# Folders


def test_force_replaces_what_another_run_left(own_model: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_job(job(own_model), out)
    (out / "notes.txt").write_text("mine")
    (out / "model.onnx").write_text("of the former run")
    other = job(own_model, mode="ptq", rules="w4a8")
    with pytest.raises(ConfigError, match="holds another job .*, or replace it with --force"):
        run_job(other, out)
    run_job(other, out, options=RunOptions(force=True))
    assert json.loads((out / "config.json").read_text())["rules"] == "w4a8"
    names = {path.name for path in out.iterdir()}
    assert "notes.txt" in names
    assert not {"model.onnx", "trained.pt", "monitor.csv"} & names
    with pytest.raises(ConfigError, match=r"force would delete .*float\.pt, which this run reads; move it out of"):
        run_job(replace(other, checkpoint=str(out / "float.pt")), out, options=RunOptions(force=True))
    assert (out / "float.pt").exists()


def test_force_leaves_a_folder_alone_that_no_run_has_made(own_model: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "float.pt").write_text("of somebody")
    with pytest.raises(ConfigError, match="config.json is missing"):
        run_job(job(own_model), tmp_path / "out", options=RunOptions(force=True))
    assert (tmp_path / "out" / "float.pt").read_text() == "of somebody"


# Options


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"device": "abacus"}, "the device 'abacus' cannot be used"),
        ({"amp": "bf61"}, "amp must be one of bf16, fp16, got 'bf61'; did you mean 'bf16'?"),
        ({"workers": -1}, "workers must be at least 0, got -1"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
    ],
)
def test_options_are_checked(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        RunOptions(**given)


def test_compilation_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match="compile on the CPU compiles C.., but CXX names a C.. compiler"):
        RunOptions(compile=True)


def test_mixed_precision_is_a_setting_of_the_run(own_model: str, tmp_path: Path) -> None:
    run_job(job(own_model), tmp_path, options=RunOptions(amp="bf16", workers=1, threads=1))
    assert json.loads((tmp_path / "config.json").read_text())["amp"] == "bf16"
    with pytest.raises(ConfigError, match="amp: bf16 there, None now"):
        run_job(job(own_model), tmp_path)
    with pytest.raises(ConfigError, match="a search takes amp bf16"):
        run_search(SearchConfig("qss", own_model), tmp_path / "search", options=RunOptions(amp="fp16"))


def test_threads_are_few_for_small_models_and_beside_other_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    data = load_digits(0, 1)
    image, former = data.test_images[:1], torch.get_num_threads()
    small, large = build_model("demo", data), build_model("resnet18", data).eval()
    monkeypatch.setattr(options, "usable_cores", lambda: 8)
    monkeypatch.setattr("os.getloadavg", lambda: (5.2, 0, 0))
    assert RunOptions().threads_for(small.eval(), image) == (1, "the model is small")
    assert RunOptions().threads_for(large, image) == (3, "8 cores, of which other programs use 5")
    assert RunOptions(threads=2).threads_for(large, image) == (2, "as asked")
    with RunOptions(threads=former + 1).computing(small, image) as words:
        assert torch.get_num_threads() == former + 1
        assert "(as asked; --threads N for another number)" in words
    assert torch.get_num_threads() == former
    monkeypatch.undo()
    assert usable_cores() >= 1


@pytest.mark.parametrize("kind", ["digits", "pictures"])
def test_batches_do_not_depend_on_workers(kind: str) -> None:
    images, labels = torch.randint(0, 256, (200, 3, 8, 8), dtype=torch.uint8), torch.arange(200) % 10
    data = load_digits(0, 1) if kind == "digits" else make_pictures((images, labels), (images, labels), 10)
    found = []
    for workers in (0, 3):
        batches = TrainBatches(data, seed=4, batch_size=32, workers=workers)
        found.append([list(batches), list(batches), batches.generator.get_state()])
    for one, other in zip(found[0][:2], found[1][:2], strict=True):
        assert len(one) == len(other) > 5
        assert all(torch.equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))
    assert torch.equal(found[0][2], found[1][2])


# Progress


def test_a_clock_estimates_from_what_was_worked(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    clock = Clock(10.0)
    assert clock.left() is None
    clock.skip(4.0)
    assert clock.left() is None
    now[0] += 3.0
    clock.within(0.5)
    assert clock.left() == pytest.approx(6.0 * 5.5)
    now[0] += 3.0
    clock.advance(1.0)
    assert clock.left() == pytest.approx(6.0 * 5.0)
    now[0] += 4.0
    assert clock.words() == "10 s so far, about 26 s left"


def test_without_a_terminal_a_line_says_now_and_then_that_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    rich = pytest.importorskip("rich.console")
    monkeypatch.setattr(console_file, "PULSE", 0.15)
    written = io.StringIO()
    terminal = Terminal(rich.Console(file=written, width=200))
    with terminal as shown, terminal:  # a run within a run
        shown.start(4.0)
        shown.advance(1.0, "float: epoch 1 of 2")
        shown.within(0.5, "float: epoch 2 of 2, batch 5 of 10")
        time.sleep(0.5)
    lines = written.getvalue().splitlines()
    assert 2 <= len(lines) <= 4
    assert all(line.startswith("float: epoch 2 of 2, batch 5 of 10; ") and line.endswith(" left") for line in lines)
    time.sleep(0.3)
    assert len(written.getvalue().splitlines()) == len(lines), "nothing is printed after the end"


def test_progress_has_stage_epoch_and_batch_and_ends_at_the_total(own_model: str, tmp_path: Path) -> None:
    told = Told()
    run_job(job(own_model), tmp_path, told)
    assert told.done == pytest.approx(told.total)
    for words in ("float: epoch 1 of 2, batch 3 of 22", "float: epoch 2 of 2, loss", "calibrating",
                  "quantized: epoch 1 of 1, batch 22 of 22", "1 thread (the model is small; --threads N"):  # fmt: skip
        assert any(words in line for line in told.words), words
    again = Told()
    run_job(job(own_model), tmp_path, again)
    assert again.done == pytest.approx(again.total)
    assert not any("epoch 1" in line for line in again.words)
