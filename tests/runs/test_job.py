"""`torchquant quantize`: any model into a folder, resumed where it was, refused in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tests.browser import Browser, check_opened, check_whole
from tests.runs.test_report import certificate
from torchquant import cli
from torchquant._files import write_json
from torchquant.errors import ConfigError
from torchquant.plan import QuantPlan
from torchquant.runs.data import load_digits
from torchquant.runs.losses import read_losses
from torchquant.runs.networks import build_model
from torchquant.runs.quantize import JobConfig, run_job
from torchquant.runs.settings import read_rules
from torchquant.training import read_looks

OWN_MODEL = """
from torch import nn

def small():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 49, 10)
    )

def wrong():
    return 3
"""


@pytest.fixture
def own_model(tmp_path: Path) -> str:
    path = tmp_path / "own.py"
    path.write_text(OWN_MODEL)
    return f"{path}:small"


def config(model: str, **more: Any) -> JobConfig:
    return JobConfig(model, **{"mode": "qat", "float_epochs": 2, "epochs": 2, "learning_rate": 5e-3, **more})


def test_a_model_of_a_file_goes_all_the_way(own_model: str, tmp_path: Path) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text("- {weight: 'affine:8,symmetric=narrow/channel', input: 'affine:8', output: 'affine:8'}\n")
    out = tmp_path / "out"
    job = config(own_model, rules=str(rules), monitor=10)
    result = run_job(job, out)
    assert result.qat_accuracy is not None
    assert result.float_accuracy > 0.3
    assert abs(result.ptq_accuracy - result.float_accuracy) < 0.05
    assert result.weight_bytes < result.float_weight_bytes / 3
    names = {
        "config.json",
        "float.pt",
        "plan.yaml",
        "calibrated.pt",
        "monitor.csv",
        "trained.pt",
        "quantized.pt",
        "sites.csv",
        "losses.json",
        "result.json",
        "report.html",
    }
    looks = read_looks(out / "monitor.csv")
    assert [look.step for look in looks] == list(range(10, 10 * len(looks) + 1, 10))
    assert looks[-1].numbers.keys() >= {"loss", "weight/oscillation", "4/weight/flips"}
    assert {path.name for path in out.iterdir()} == names
    assert json.loads((out / "result.json").read_text())["n_sites"] == result.n_sites
    plan = QuantPlan.load(out / "plan.yaml")
    model = plan.apply(build_model(own_model, load_digits(0, 1)))
    model.load_state_dict(torch.load(out / "quantized.pt", weights_only=True), strict=True)
    assert (out / "sites.csv").read_text().startswith("path,site,state,scheme")
    text = (out / "report.html").read_text()
    said = "".join(check_whole(text).text)
    assert f"torchquant quantize {own_model} --rules {rules} --mode qat --float-epochs 2 --epochs 2" in said
    assert f"{result.qat_accuracy:.2%}" in said
    assert "What the training did to the quantizers" in said
    losses = read_losses(out)
    assert {name: [epoch for epoch, _ in points] for name, points in losses.items()} == {
        "float": [1, 2],
        "quantized": [1, 2],
    }
    write_json(out / "certificate.json", certificate("INCOMPLETE"))
    assert run_job(job, out) == result
    assert "Certificate: INCOMPLETE" in "".join(check_whole((out / "report.html").read_text()).text)
    (out / "certificate.json").write_text('{"verdict": "passed"}')
    with pytest.raises(ConfigError, match=r"certificate.json is damaged.*write it again with torchquant certify"):
        run_job(job, out)


def test_the_report_in_a_browser(own_model: str, browser: Browser, tmp_path: Path) -> None:
    run_job(config(own_model, float_epochs=1, epochs=1), tmp_path / "out")
    found = check_opened(browser, tmp_path / "out" / "report.html", "quantize")
    assert set(found.graphs[0]["names"]) == {"0", "4", "quantize_input_1"}
    assert found.graphs[0]["paths"] == 2
    assert "quantized" in found.graphs[0]["text"]


@pytest.mark.slow
def test_a_job_learns_from_its_float_model_if_asked(own_model: str, tmp_path: Path) -> None:
    brief = {"rules": "w4a4-lsq", "float_epochs": 1, "epochs": 1}
    states = []
    for name, distill in (("alone", None), ("taught", 0.9)):
        run_job(config(own_model, distill=distill, **brief), tmp_path / name)
        states.append(torch.load(tmp_path / name / "trained.pt", weights_only=True))
    assert any(not torch.equal(states[0][key], value) for key, value in states[1].items())
    assert json.loads((tmp_path / "taught" / "config.json").read_text())["distill"] == 0.9


def test_the_share_that_is_learned_from_the_float_model() -> None:
    for wrong in ({"distill": 1.5}, {"distill": 0.5, "mode": "ptq"}):
        with pytest.raises(ConfigError, match="distill is a share of the loss of mode qat, above 0 and at most 1; got"):
            config("demo", **wrong)


def test_a_stopped_job_goes_on_and_ends_the_same(own_model: str, tmp_path: Path) -> None:
    whole = run_job(config(own_model), tmp_path / "whole")

    class Stopped(Exception):  # noqa: N818
        pass

    from torchquant.runs.console import NullProgress

    class StopsAt(NullProgress):
        def __init__(self, n: int) -> None:
            self.left = n

        def advance(self, amount: float, doing: str) -> None:
            self.left -= 1
            if self.left == 0:
                raise Stopped

    for n_steps in (1, 1, 2):
        with pytest.raises(Stopped):
            run_job(config(own_model), tmp_path / "stopped", StopsAt(n_steps))
    again = run_job(config(own_model), tmp_path / "stopped")
    assert again == whole
    states = [torch.load(tmp_path / name / "quantized.pt", weights_only=True) for name in ("whole", "stopped")]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    with pytest.raises(ConfigError, match=r"holds another job \(seed: 0 there, 1 now\)"):
        run_job(config(own_model, seed=1), tmp_path / "stopped")


def test_a_checkpoint_takes_the_place_of_float_training(own_model: str, tmp_path: Path) -> None:
    first = run_job(config(own_model, mode="ptq"), tmp_path / "first")
    again = run_job(
        config(own_model, mode="ptq", checkpoint=str(tmp_path / "first" / "float.pt"), rules="w4a8"),
        tmp_path / "second",
    )
    assert again.float_accuracy == first.float_accuracy
    assert again.weight_bytes <= first.weight_bytes


def test_models_by_name() -> None:
    data = load_digits(0, 1)
    for name in ("demo", "squeezenet1_1", "mobilenetv3_small_100"):
        if name == "mobilenetv3_small_100":
            pytest.importorskip("timm")
        net = build_model(name, data).eval()
        side = 64 if name == "squeezenet1_1" else 16
        with torch.no_grad():
            assert net(torch.randn(1, 1, side, side)).shape == (1, 10)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet1812", "no model 'resnet1812' in torchvision"),
        ("nowhere.py:small", "there is no file nowhere.py; a model of your own is path/to/file.py:function"),
        ("{own}:large", "has no function 'large'; it has small, wrong"),
        ("{own}:wrong", r"must return a model \(torch.nn.Module\), got int"),
    ],
)
def test_models_that_are_not_there(name: str, message: str, own_model: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model(name.format(own=own_model.rpartition(":")[0]), load_digits(0, 1))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mode": "train"}, "mode must be one of ptq, qat, got 'train'"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
    ],
)
def test_bad_settings(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        JobConfig("demo", **given)


def test_rules_are_a_name_or_a_file(tmp_path: Path) -> None:
    assert read_rules("w8a8") == "w8a8"
    with pytest.raises(ConfigError, match="rules must be one of w8a8, .*there is no file 'w8a9'"):
        read_rules("w8a9")


def test_the_command_shows_a_table_and_refuses_in_words(own_model: str, tmp_path: Path) -> None:
    runner = CliRunner()
    arguments = ["quantize", own_model, "--float-epochs", "1", "--out", str(tmp_path / "out")]
    done = runner.invoke(cli.build_app(), arguments, env={"COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb"})
    assert done.exit_code == 0, done.output
    assert "calibrated" in done.output
    assert "plan.yaml" in done.output
    bad = runner.invoke(cli.build_app(), ["quantize", "nothing", "--out", str(tmp_path / "no")])
    assert bad.exit_code == 1
    assert "no model 'nothing'" in bad.output
