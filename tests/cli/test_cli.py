"""The command line: commands, bad input, missing packages."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import torchquant
from tests import ROOT
from torchquant import cli
from torchquant.cli import demo as demo_command
from torchquant.graph import OPERATORS
from torchquant.quantizers import QUANTIZERS, catalogue
from torchquant.runs.console import NullProgress, Terminal
from torchquant.runs.demo import DemoConfig
from torchquant.runs.demo import run as demo_run
from torchquant.runs.options import RunOptions


@pytest.fixture
def runner() -> CliRunner:
    return CliRunner()


def test_version(runner: CliRunner) -> None:
    result = runner.invoke(cli.build_app(), ["--version"])
    assert (result.exit_code, result.output) == (0, f"torchquant {torchquant.__version__}\n")


def test_help_names_the_options(runner: CliRunner) -> None:
    result = runner.invoke(cli.build_app(), ["demo", "--help"], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})
    assert result.exit_code == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", result.output)
    assert all(option in text for option in ("--out", "--seed", "--quick"))


def test_demo_passes_its_options_on(runner: CliRunner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = []

    class Result:
        def table(self) -> tuple[list[str], list[list[str]], str]:
            return ["scheme", "accuracy"], [["W8A8", "97.00%"]], "a note"

    def run(config: DemoConfig, out: Path, show: NullProgress, options: RunOptions) -> Result:
        calls.append((config, out, type(show), options))
        return Result()

    monkeypatch.setattr(demo_command, "run_demo", run)
    result = runner.invoke(
        cli.build_app(), ["demo", "--out", str(tmp_path), "--seed", "7", "--quick", "--workers", "1"]
    )
    assert result.exit_code == 0, result.output
    assert calls == [(DemoConfig.preset(7, quick=True), tmp_path, Terminal, RunOptions(workers=1))]
    assert "97.00%" in result.output
    assert "report.html" in result.output


@pytest.mark.parametrize(
    ("seed", "message"), [("-1", "seed must be 0..4294967295, got -1"), (str(2**32), "seed must be 0..4294967295")]
)
def test_seed_out_of_range(runner: CliRunner, tmp_path: Path, seed: str, message: str) -> None:
    result = runner.invoke(cli.build_app(), ["demo", "--out", str(tmp_path), "--seed", seed])
    assert result.exit_code == 1
    assert message in result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("below", ["", "folder"])
def test_out_is_a_file(runner: CliRunner, tmp_path: Path, below: str) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    result = runner.invoke(cli.build_app(), ["demo", "--out", str(file / below)])
    assert result.exit_code == 1
    assert "must be a folder" in result.output
    assert file.read_text() == "mine"


def test_missing_package_is_named_before_any_work(
    runner: CliRunner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def never(*args: Any) -> None:
        raise AssertionError("work was begun")

    monkeypatch.setattr(demo_run, "load_digits", never)
    for package in ("sklearn", "onnx", "onnxruntime"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            result = runner.invoke(cli.build_app(), ["demo", "--out", str(tmp_path / "out")])
        assert result.exit_code == 1
        assert f"'{package}'" in result.output
        assert "pip install 'torchquant[demo]'" in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_without_its_packages_main_says_what_to_install(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    assert exit_info.value.code == 1
    assert "pip install 'torchquant[cli]'" in capsys.readouterr().err


def test_python_dash_m() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "torchquant", "--version"], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.split() == ["torchquant", torchquant.__version__]


def test_info_says_which_kernels_are_active(runner: CliRunner) -> None:
    shown = runner.invoke(cli.build_app(), ["info"])
    assert shown.exit_code == 0
    assert f"torchquant {torchquant.__version__} torch" in " ".join(shown.output.split())
    assert "kernels on cpu" in shown.output


def test_schemes_lists_every_scheme_and_explains_one(runner: CliRunner) -> None:
    wide = {"COLUMNS": "300", "NO_COLOR": "1", "TERM": "dumb"}
    listed = runner.invoke(cli.build_app(), ["schemes"], env=wide)
    assert listed.exit_code == 0
    assert all(name in listed.output for name in QUANTIZERS)
    one = runner.invoke(cli.build_app(), ["schemes", "twn"], env=wide)
    assert "arXiv:1605.04711" in one.output
    assert "clipped, ewgs, pwl" in one.output
    missing = runner.invoke(cli.build_app(), ["schemes", "twin"])
    assert missing.exit_code == 1
    assert "no quantizer scheme 'twin'" in missing.output


def test_the_page_of_schemes_is_the_generated_one(runner: CliRunner) -> None:
    page = runner.invoke(cli.build_app(), ["schemes", "--markdown"]).output
    written = (ROOT / "docs" / "schemes.md").read_text(encoding="utf-8")
    assert page == written, "run: torchquant schemes --markdown > docs/schemes.md"


def test_every_scheme_says_what_it_is() -> None:
    for entry in catalogue():
        assert entry.summary, entry.name
        assert entry.formula, entry.name
        assert entry.paper, entry.name
        assert entry.bits, entry.name


def test_operators_are_shown_in_a_table_and_one_by_one(runner: CliRunner) -> None:
    wide = {"COLUMNS": "300", "NO_COLOR": "1", "TERM": "dumb"}
    table = runner.invoke(cli.build_app(), ["operators"], env=wide)
    assert table.exit_code == 0, table.output
    assert all(name in table.output for name in OPERATORS)
    line = next(line for line in table.output.splitlines() if " div " in line)
    assert "no runtime divides integers" in line
    one = runner.invoke(cli.build_app(), ["operators", "channel_shuffle"], env=wide)
    assert one.exit_code == 0, one.output
    assert "pixel_unshuffle" in one.output
    assert "codes move" in one.output
    unknown = runner.invoke(cli.build_app(), ["operators", "matmull"])
    assert unknown.exit_code == 1
    assert "no operator 'matmull'; did you mean 'matmul'?" in " ".join(unknown.output.split())
