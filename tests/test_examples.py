"""Each example runs to its end, where it checks what it shows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SMALL = {"bnn_cifar10.py": ["--data", "digits", "--width", "8", "--epochs", "2", "--out", "out"]}
"""What downloads a data set otherwise, on a small one."""


NEEDS = {"federated.py": "flwr"}
"""Example -> a library that is not among those of the tests: flwr pins versions of typer and rich."""


def test_there_are_examples() -> None:
    assert "quickstart.py" in [path.name for path in EXAMPLES]


@pytest.mark.parametrize("example", [e for e in EXAMPLES if e.name not in SMALL], ids=lambda path: path.name)
def test_example_runs(example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if example.name in NEEDS:
        pytest.importorskip(NEEDS[example.name])
    monkeypatch.chdir(tmp_path)
    module = ModuleType("example_under_test")  # a real module, so that classes it defines can be pickled
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(example.read_text(encoding="utf-8"), str(example), "exec"), module.__dict__)


def run_alone(example: Path, folder: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(example), *SMALL.get(example.name, [])]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("example", [e for e in EXAMPLES if e.name not in SMALL], ids=lambda path: path.name)
def test_example_runs_in_a_process_of_its_own(example: Path, tmp_path: Path) -> None:
    if example.name in NEEDS:
        pytest.importorskip(NEEDS[example.name])
    run_alone(example, tmp_path)


@pytest.mark.slow
def test_the_binary_experiment_goes_on_where_it_was(tmp_path: Path) -> None:
    example = ROOT / "examples" / "bnn_cifar10.py"
    first = run_alone(example, tmp_path)
    assert "epoch 2: accuracy" in first
    again = run_alone(example, tmp_path)
    assert "epoch 1:" not in again
    assert first.splitlines()[-1] == again.splitlines()[-1]
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert len(result["accuracy"]) == 2
    weights = torch.load(tmp_path / "out" / "binary.pth", weights_only=True)["features.3.weight"]
    assert weights.unique().tolist() == [-1.0, 1.0]
