"""`torchquant analyze`: of a run's folder and of a model, its files, its plan, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.browser import Browser, check_opened, check_whole
from torchquant.analysis import Analysis
from torchquant.cli import build_app
from torchquant.errors import ConfigError
from torchquant.plan import QuantPlan
from torchquant.runs.analyze import AnalyzeConfig, run_analysis
from torchquant.runs.quantize import JobConfig, run_job

NET = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    first, second = nn.Conv2d(1, 8, 3, 2), nn.Conv2d(8, 8, 3, 2)
    net = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(72, 10))
    with torch.no_grad():
        net[2].weight[3] *= 60
    return net
"""
RULES = "- {weight: 'affine:8,symmetric=narrow'}\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("model")
    (folder / "net.py").write_text(NET)
    (folder / "rules.yaml").write_text(RULES)
    return f"{folder / 'net.py'}:build", str(folder / "rules.yaml")


@pytest.fixture(scope="module")
def run(model: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    run_job(JobConfig(model[0], model[1], float_epochs=0, calibration_batches=2), folder)
    return folder


def test_the_report_in_a_browser(model: tuple[str, str], run: Path, browser: Browser, tmp_path: Path) -> None:
    run_analysis(AnalyzeConfig(str(run), images=64, sites=1), tmp_path)
    found = check_opened(browser, tmp_path / "report.html", "analyze")
    assert [graph["names"] for graph in found.graphs] == [["0", "2", "5"]]
    assert found.drawn == found.plots > 0
    assert {"remedy", "gain"} <= {column["name"] for table in found.tables for column in table}


def test_the_command_on_a_run_writes_the_plan_that_helps(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "analysis"
    arguments = ["analyze", str(run), "--images", "64", "--sites", "1", "--apply", "--out", str(out)]
    told = CliRunner().invoke(build_app(), arguments)
    assert told.exit_code == 0, told.output
    assert "channels differ" in told.output
    assert str(out / "report.html") in "".join(told.output.split("\n"))
    analysis = Analysis.load(out)
    assert analysis.worst()[0].path == "2"
    assert analysis.samples == 64
    assert analysis.float_loss is not None
    advice = json.loads((out / "advice.json").read_text())
    assert next(remedy for remedy in advice["remedies"] if remedy["path"] == "2")["change"] == "per channel"
    plan = QuantPlan.load(out / "advised_plan.yaml")
    assert {site.path: site.weight for site in plan.sites}["2"] == "affine:8,symmetric=narrow/channel"
    page = "".join(check_whole((out / "report.html").read_text()).text)
    for words in ("channels differ", "Which sites hurt", "What to do about it", "torchquant analyze"):
        assert words in page

    again = tmp_path / "again"
    model = JobConfig(json.loads((run / "config.json").read_text())["model"], str(out / "advised_plan.yaml"))
    run_job(JobConfig(model.model, model.rules, float_epochs=0, calibration_batches=2), again)
    better = run_analysis(AnalyzeConfig(str(again), images=64, sites=0), tmp_path / "better").analysis
    assert better.whole.sqnr_db > analysis.whole.sqnr_db + 2.0
    assert analysis.diff(better)[0].figure == "sqnr_db"


def test_a_model_is_quantized_first_and_other_settings_are_refused(model: tuple[str, str], tmp_path: Path) -> None:
    config = AnalyzeConfig(model[0], model[1], float_epochs=0, images=64, sites=0)
    found = run_analysis(config, tmp_path)
    assert found.advice is None
    assert (tmp_path / "run" / "quantized.pt").exists()
    assert not (tmp_path / "advice.json").exists()
    assert run_analysis(config, tmp_path) == found
    with pytest.raises(ConfigError, match="holds another analysis"):
        run_analysis(AnalyzeConfig(model[0], model[1], float_epochs=0, images=32, sites=0), tmp_path)


def test_wrong_settings() -> None:
    with pytest.raises(ConfigError, match="sites 0 tries none"):
        AnalyzeConfig("demo", sites=0, apply=True)
    with pytest.raises(ConfigError, match="images must be at least 1"):
        AnalyzeConfig("demo", images=0)
