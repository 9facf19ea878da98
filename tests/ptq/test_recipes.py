"""Recipes and the commands around them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import Tensor
from typer.testing import CliRunner

from tests.browser import Browser, check_opened, check_whole
from tests.stage_table import PAGE, written
from torchquant import cli
from torchquant.errors import ConfigError
from torchquant.ptq import PTQ, RECIPES, Recipe, find_recipe
from torchquant.ptq.stage import CHANGES
from torchquant.runs.ptq import PTQConfig, run_ptq

OWN_MODEL = """
from torch import nn

def small():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 49, 10)
    )
"""


def test_stages_in_one_line() -> None:
    recipe = Recipe.parse("fold_bn, gptq:damp=0.05,act_order , bias_correction:match=layer")
    assert recipe.stages == ("fold_bn", "gptq:damp=0.05,act_order", "bias_correction:match=layer")
    _, gptq, bias = recipe.made
    assert (gptq.damp, gptq.act_order, bias.match) == (0.05, True, "layer")  # type: ignore[attr-defined]


def test_a_recipe_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "torchquant_ptq: 1\nplan: w4a8\nskip: [head]\nstages:\n  - calibrate\n  - gptq: {act_order: true}\n"
    )
    found = find_recipe(str(path))
    assert (found.rules, found.skip, found.stages) == ("w4a8", ("head",), ("calibrate", {"gptq": {"act_order": True}}))
    assert found.made[1].act_order is True  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stages: [gptq]", "its first line must be 'torchquant_ptq: 1'"),
        ("torchquant_ptq: 1\nstage: [gptq]", "no stage in a recipe; it has"),
        ("torchquant_ptq: 1\nstages: gptq", "stages must be a list of names, got 'gptq'"),
        ("torchquant_ptq: 1\nstages: [gptk]", "did you mean 'gptq'"),
        (
            "torchquant_ptq: 1\nstages: [gptq]\ndata: {sources: digits}",
            "data of a recipe has no sources; it has source,",
        ),
        ("torchquant_ptq: 1\nstages: [gptq]\ndata: {batch: 0}", "data: batch must be a whole number >= 1, got 0"),
        ("torchquant_ptq: 1\nstages: [gptq]\ndata: {samples: 10, batch: 4}", "samples must be whole batches, got 10"),
        (
            "torchquant_ptq: 1\nstages: [gptq]\ncache: {bytes: 2XB}",
            "cache: bytes must be a number of bytes .*got '2XB'",
        ),
        ("torchquant_ptq: 1\nstages: [gptq]\ncache: {dtype: bf16}", "cache of a recipe has no dtype; it has bytes"),
    ],
)
def test_files_that_are_no_recipes(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        find_recipe(str(path))


def test_a_recipe_names_its_data_and_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, seen = tmp_path / "recipe.yaml", {}
    path.write_text(
        "torchquant_ptq: 1\nplan: w4a8\ndata: {source: digits, samples: 96, batch: 32, seed: 5}\n"
        "cache: {bytes: 2kB}\nstages: [gptq]\n"
    )
    assert find_recipe(str(path)).cache_bytes == 2000
    model = tmp_path / "own.py"
    model.write_text(OWN_MODEL)
    config = PTQConfig(f"{model}:small", str(path), float_epochs=0)
    assert (config.data, config.batches) == ("digits", 3)
    assert PTQConfig(f"{model}:small", str(path), data="cifar10", batches=2).data == "cifar10"

    def run(model: object, stages: object, batches: list[tuple[Tensor, Tensor]], *args: object, **more: object) -> None:
        seen.update(more, sizes=[len(x) for x, _ in batches])

    monkeypatch.setattr("torchquant.ptq.run", run)
    run_ptq(config, tmp_path / "out")
    assert (seen["cache_bytes"], seen["sizes"]) == (2000, [32, 32, 32])
    more = PTQConfig(f"{model}:small", str(path), float_epochs=0, cache_bytes="1MB")
    run_ptq(more, tmp_path / "other")
    assert seen["cache_bytes"] == 10**6
    with pytest.raises(ConfigError, match="cache_bytes must be a number of bytes"):
        PTQConfig(f"{model}:small", str(path), cache_bytes="much")
    assert "cache_bytes" not in json.loads((tmp_path / "out" / "config.json").read_text())
    path.write_text("torchquant_ptq: 1\ndata: {samples: 64000, batch: 32}\nstages: [gptq]\n")
    with pytest.raises(ConfigError, match="digits has .* training images, fewer than the recipe asks"):
        run_ptq(PTQConfig(f"{model}:small", str(path), float_epochs=0), tmp_path / "more")


def test_a_recipe_that_is_not_there() -> None:
    with pytest.raises(
        ConfigError, match="a recipe is one of cnn-w8a8.*there is no 'cnn-w4a9'.*did you mean 'cnn-w4a8'"
    ):
        find_recipe("cnn-w4a9")


@pytest.mark.parametrize("name", RECIPES)
def test_ready_recipes_can_be_made(name: str) -> None:
    assert all(stage.changes in CHANGES for stage in RECIPES[name].made)


@pytest.mark.parametrize("name", PTQ)
def test_every_stage_says_when_to_use_it(name: str) -> None:
    said = CliRunner().invoke(cli.build_app(), ["algorithms", name], env={"COLUMNS": "200"}).output
    assert PTQ[name].when.split(",")[0] in said


def test_the_page_lists_every_stage() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == written(page), "run: python -m tests.stage_table"


def test_the_command_goes_all_the_way_and_on(tmp_path: Path) -> None:
    model, out = tmp_path / "own.py", tmp_path / "out"
    model.write_text(OWN_MODEL)
    words = [
        "ptq",
        f"{model}:small",
        "--recipe",
        "calibrate,gptq,bias_correction",
        "--float-epochs",
        "2",
        "--out",
        str(out),
    ]
    planned = CliRunner().invoke(cli.build_app(), [*words, "--dry-run", "--blocks"], env={"COLUMNS": "200"})
    assert planned.exit_code == 0, planned.output
    assert "5 steps; each batch runs 4 times through the quantized model and 2 times" in planned.output
    assert "bytes of Gram matrices" in planned.output
    assert "block  class" in planned.output
    assert not out.exists()
    first = CliRunner().invoke(cli.build_app(), words)
    assert first.exit_code == 0, first.output
    assert len(json.loads((out / "steps" / "ptq.json").read_text())["steps"]) == 5
    assert "<h1>Post-training run</h1>" in (out / "steps" / "report.html").read_text()
    said = "".join(check_whole((out / "report.html").read_text()).text)
    assert f"torchquant ptq {model}:small --recipe calibrate,gptq,bias_correction" in said
    assert "the recipe" in first.output
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "float.pt", "plan.yaml", "calibrated.pt", "quantized.pt", "result.json", "steps"} <= names
    result = json.loads((out / "result.json").read_text())
    (out / "quantized.pt").unlink()
    again = CliRunner().invoke(cli.build_app(), words)
    assert json.loads((out / "result.json").read_text()) == result
    assert again.exit_code == 0
    other = CliRunner().invoke(cli.build_app(), [*words, "--seed", "1"])
    assert other.exit_code == 1
    assert "holds another run" in other.output


def test_the_report_in_a_browser(browser: Browser, tmp_path: Path) -> None:
    model, out = tmp_path / "own.py", tmp_path / "out"
    model.write_text(OWN_MODEL)
    run_ptq(PTQConfig(f"{model}:small", "calibrate,gptq,bias_correction", float_epochs=0), out)
    found = check_opened(browser, out / "report.html", "ptq")
    assert [column["name"] for column in found.tables[1]][:3] == ["step", "stage", "layer"]
    assert {"0", "4"} < set(found.graphs[0]["names"])
    assert "codes used" in found.graphs[0]["text"]
