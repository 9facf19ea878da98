"""The options of a command are the fields of its settings."""

from __future__ import annotations

import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests import ROOT
from torchquant import cli
from torchquant.runs.compare import Recipe
from torchquant.runs.options import RunOptions
from torchquant.runs.quantize import JobConfig
from torchquant.runs.search import SearchConfig

typer = pytest.importorskip("typer")

NOT_ASKED = {"contents"}
OPTIONS = {entry.name for entry in fields(RunOptions)}
LEARNED_ONLY = {"per", "form", "epochs", "arch_rate", "temperature", "penalty"}
MEASURED_ONLY = {"method", "solver"}


def parameters(*words: str) -> dict[str, Any]:
    found = typer.main.get_command(cli.build_app())
    for word in words:
        found = found.commands[word]
    return {parameter.name: parameter for parameter in found.params}


@pytest.mark.parametrize(
    ("words", "settings", "left_out", "own"),
    [
        (["quantize"], JobConfig, set(), {"out", "strict"} | OPTIONS),
        (["compare"], Recipe, set(), {"out", "schemes", "bits", "acts", "seeds", "jobs", "plugin"} | OPTIONS),
        (["search", "qss"], SearchConfig, {"kind"} | MEASURED_ONLY, {"out", "distributed"} | OPTIONS),
        (["search", "qpl"], SearchConfig, {"kind"} | MEASURED_ONLY, {"out", "distributed"} | OPTIONS),
        (["search", "allocate"], SearchConfig, {"kind"} | LEARNED_ONLY, {"out"} | OPTIONS),
        (
            ["search", "study"],
            SearchConfig,
            {"arch_rate", "temperature", "penalty"} | MEASURED_ONLY,
            {"out", "trials", "storage", "name"} | OPTIONS - {"force"},
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_field_is_an_option(words: list[str], settings: Any, left_out: set[str], own: set[str]) -> None:
    asked = {entry.name: entry for entry in fields(settings) if entry.name not in NOT_ASKED | left_out}
    found = parameters(*words)
    assert found.keys() == asked.keys() | own
    for name, entry in asked.items():
        assert found[name].help, name
        if entry.default is MISSING:
            assert found[name].param_type_name == "argument"
        else:
            assert found[name].opts == [f"--{name.replace('_', '-')}"]
            assert found[name].default == entry.default, name


def test_a_file_is_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    code = re.search(r"is `torchquant greet`:\n\n```python\n(.*?)```", page, re.DOTALL)
    assert code is not None
    (tmp_path / "greet.py").write_text(code[1])
    monkeypatch.setattr(cli, "__path__", [*cli.__path__, str(tmp_path)])
    done = CliRunner().invoke(cli.build_app(), ["greet", "you", "--times", "2"])
    assert (done.exit_code, done.output) == (0, "hello you\nhello you\n")
    assert CliRunner().invoke(cli.build_app(), ["greet"]).exit_code == 2
