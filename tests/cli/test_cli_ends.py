"""How a command ends early: Ctrl-C, an error of the user's code, an error that nobody foresaw; and modes of files."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from torchquant import cli
from torchquant.cli import quantize as quantize_command
from torchquant.runs import quantize as quantize_run
from torchquant.runs import stages
from torchquant.runs.folder import contents_in_words

OWN = """
from torch import nn

def small():
    return nn.Sequential(nn.Flatten(), nn.Linear(256, 10))
"""
FEW = ["--float-epochs", "3", "--epochs", "1", "--mode", "qat"]


@pytest.fixture
def own_model(tmp_path: Path) -> str:
    (tmp_path / "own.py").write_text(OWN)
    return f"{tmp_path / 'own.py'}:small"


def run(*words: Any) -> Any:
    given = [str(word) for word in words]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["torchquant", *given])
        return CliRunner().invoke(cli.build_app(), given, env={"COLUMNS": "200", "TERM": "dumb"})


def test_ctrl_c_says_what_is_kept_and_how_to_resume(
    own_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "my out"
    words = ["quantize", own_model, *FEW, "--out", out]

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stages, "keep_loss", stop)
        early = run(*words)
    assert early.exit_code == 130
    assert f"stopped; {out} keeps float.progress.pt (after epoch 1)" in early.stderr
    with monkeypatch.context() as patch:
        patch.setattr(quantize_run, "calibrate", stop)
        stopped = run(*words)
    assert stopped.exit_code == 130
    assert f"stopped; {out} keeps losses.json, float.pt, plan.yaml" in stopped.stderr
    assert f"resume with: torchquant quantize {own_model} {' '.join(FEW)} --out '{out}'" in stopped.stderr
    assert "Traceback" not in stopped.output
    resumed = run(*words)
    assert resumed.exit_code == 0, resumed.output
    assert "epoch 1 of 3" not in resumed.output


def test_ctrl_c_before_anything_was_made(own_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(quantize_run, "check_job", stop)
    stopped = run("quantize", own_model, "--out", tmp_path / "out")
    assert (stopped.exit_code, stopped.stderr) == (
        130,
        "\ntorchquant: stopped; nothing was made yet that the next run could use\n",
    )
    assert not (tmp_path / "out").exists()


def test_an_error_that_nobody_foresaw_keeps_its_traceback_in_a_file(
    own_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr("torchquant.cli._explained.user_frame", lambda error: None)
    monkeypatch.setattr(quantize_command, "run_job", fail)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    ended = run("quantize", own_model, "--out", tmp_path / "out")
    assert ended.exit_code == 1
    assert "an error that it did not foresee: ZeroDivisionError: by nothing; please report it" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    path = Path(ended.stderr.split("traceback: ")[1].strip())
    assert "raise ZeroDivisionError" in path.read_text()


def test_a_failed_command_leaves_no_folder(own_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise OSError("no more")

    monkeypatch.setattr(stages, "train", fail)
    (tmp_path / "mine").mkdir()
    for name in ("new", "mine"):
        ended = run("quantize", own_model, "--out", tmp_path / name)
        assert (ended.exit_code, ended.stderr) == (1, "torchquant: no more\n")
    assert not (tmp_path / "new").exists()
    assert list((tmp_path / "mine").iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="Windows has other modes")
def test_files_have_the_modes_that_the_umask_asks_for(own_model: str, tmp_path: Path) -> None:
    former = os.umask(0o027)
    try:
        assert run("quantize", own_model, *FEW, "--out", tmp_path / "out").exit_code == 0
        for form in ("onnx", "packed", "integer"):
            assert run("export", tmp_path / "out", "--to", form).exit_code == 0
    finally:
        os.umask(former)
    modes = {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in (tmp_path / "out").iterdir()}
    assert set(modes.values()) == {"0o640"}, modes
    assert {"model.onnx", "model.safetensors", "integer.json", "quantized.pt", "report.html"} <= modes.keys()


def test_contents_of_a_folder_in_words(tmp_path: Path) -> None:
    assert contents_in_words(tmp_path) == ""
    (tmp_path / "recipe.json").touch()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "a.json").touch()
    torch.save({"epoch": 7}, tmp_path / "x.progress.pt")
    torch.save({}, tmp_path / "y.progress.pt")
    words = contents_in_words(tmp_path)
    assert set(words.split(", ")) == {"runs/ (1 file)", "x.progress.pt (after epoch 7)", "y.progress.pt"}
