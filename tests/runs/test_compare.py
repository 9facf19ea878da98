"""The comparison: same recipe for all, nothing done twice, nothing lost, a table in every form."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.browser import Browser, check_opened, check_whole
from torchquant import cli
from torchquant.errors import ConfigError, UnknownNameError
from torchquant.quantizers import QUANTIZERS
from torchquant.runs.compare import Recipe, compare, leaderboard, make_cases, write_leaderboard
from torchquant.runs.compare import run as compare_run

TINY = Recipe(float_epochs=1, epochs=1, calibration_batches=1, test_copies=1)
PLUGIN = """
import torchquant as tq

@tq.QUANTIZERS.register("coarse")
class Coarse(tq.TernaryQuantizer):
    about = tq.quantizers.About(formula="ternary under another name", paper="none", bits="2")
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list]:
    out = tmp_path_factory.mktemp("compare")
    cases = make_cases(["affine", "twn"], [2, 4], [8], seeds=2)
    return out, compare(cases, TINY, out)


def test_every_case_has_a_result_from_the_same_float_network(finished) -> None:
    _, results = finished
    assert [r.case.name for r in results] == [
        *("affine-w2a8-seed0", "affine-w2a8-seed1", "affine-w4a8-seed0", "affine-w4a8-seed1"),
        *("twn-w2a8-seed0", "twn-w2a8-seed1"),
    ]
    for seed in (0, 1):
        assert len({r.float_accuracy for r in results if r.case.seed == seed}) == 1
    assert all(0.05 < r.accuracy <= 1.0 and r.weight_bytes > 1000 for r in results)
    by_bits = {r.case.weight_bits: r.weight_sqnr_db for r in results if r.case.scheme == "affine"}
    assert by_bits[4] > by_bits[2] + 6


def test_a_second_run_does_nothing_again_and_a_lost_one_is_repeated_exactly(finished, monkeypatch) -> None:
    out, results = finished
    lost = out / "runs" / "twn-w2a8-seed1.json"
    lost.unlink()
    done = []
    original = compare_run._run_case
    monkeypatch.setattr(compare_run, "_run_case", lambda case, *rest: done.append(case.name) or original(case, *rest))
    again = compare([r.case for r in results], TINY, out)
    assert done == ["twn-w2a8-seed1"]
    assert [r.accuracy for r in again] == [r.accuracy for r in results]


def test_a_result_of_other_activations_is_made_again(finished, monkeypatch) -> None:
    out, results = finished
    monkeypatch.setattr(compare_run, "_run_case", lambda case, *rest: pytest.fail(case.acts))
    with pytest.raises(pytest.fail.Exception, match="lsq:8"):
        compare([replace(results[0].case, acts="lsq:8")], TINY, out)


def test_another_recipe_does_not_mix_in(finished) -> None:
    out, results = finished
    with pytest.raises(ConfigError, match="another recipe .epochs: 1 there, 2 now.; choose another folder"):
        compare([results[0].case], replace(TINY, epochs=2), out)


def test_the_leaderboard_has_mean_and_spread(finished) -> None:
    _, results = finished
    rows = leaderboard(results)
    assert [(row.scheme, row.weight_bits, row.seeds) for row in rows if row.weight_bits == 4] == [("affine", 4, 2)]
    row = next(row for row in rows if row.scheme == "twn")
    scores = [r.accuracy for r in results if r.case.scheme == "twn"]
    assert row.accuracy == pytest.approx(sum(scores) / 2)
    assert row.spread == pytest.approx(abs(scores[0] - scores[1]) / 2**0.5)


@pytest.mark.slow
def test_the_number_of_processes_does_not_change_the_numbers(finished, tmp_path: Path) -> None:
    _, results = finished
    cases = [r.case for r in results[:2]]
    assert [r.accuracy for r in compare(cases, TINY, tmp_path, jobs=2)] == [r.accuracy for r in results[:2]]


def test_the_command_writes_every_form_and_takes_a_plugin(tmp_path: Path) -> None:
    plugin, out = tmp_path / "mine.py", tmp_path / "out"
    plugin.write_text(PLUGIN)
    words = ["compare", "--schemes", "coarse,affine", "--bits", "2", "--seeds", "1", "--epochs", "0"]
    words += ["--float-epochs", "1", "--plugin", str(plugin), "--out", str(out)]
    try:
        result = CliRunner().invoke(cli.build_app(), words, env={"COLUMNS": "200"})
        assert result.exit_code == 0, result.output
    finally:
        QUANTIZERS.unregister("coarse")
    found = json.loads((out / "leaderboard.json").read_text())
    assert {row["scheme"] for row in found["rows"]} == {"coarse", "affine"}
    assert found["command"].startswith("torchquant compare --schemes coarse,affine --bits 2")
    assert len(list(csv.DictReader((out / "leaderboard.csv").read_text().splitlines()))) == 2
    assert "| coarse | 2 | 8 |" in (out / "leaderboard.md").read_text()
    html = (out / "leaderboard.html").read_text()
    assert "coarse:2/channel" in "".join(check_whole(html).text)
    assert "coarse" in result.output


def test_the_leaderboard_in_a_browser(finished, browser: Browser, tmp_path: Path) -> None:
    write_leaderboard(leaderboard(finished[1]), TINY, "torchquant compare", tmp_path)
    found = check_opened(browser, tmp_path / "leaderboard.html", "compare")
    assert found.plots == 1
    accuracy = next(column for column in found.tables[0] if column["name"] == "accuracy")
    assert len(accuracy["orders"][0][1]) == len(leaderboard(finished[1]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--schemes", "afine"], "no quantizer scheme 'afine'; did you mean 'affine'"),
        (["--schemes", "twn", "--bits", "8"], "twn has none of the widths 8"),
        (["--bits", "two"], "bits must be whole numbers from 1, such as '4', '2,3,4' or '2-8'; got 'two'"),
        (["--model", "vgg99"], "model must be one of demo, small_mobilenet, resnet18, resnet34, resnet50"),
        (["--data", "missing"], "data must be digits, cifar10 or a folder of pictures, got 'missing'"),
        (["--checkpoint", "missing.pt"], "the checkpoint missing.pt is not a file"),
        (["--seeds", "0"], "seeds must be at least 1"),
        (["--plugin", "missing.py"], "the plug-in missing.py is not a file"),
    ],
)
def test_bad_words_are_explained(words: list[str], message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.build_app(), ["compare", *words, "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert message in result.output


def test_activations_and_gradients_of_a_scheme() -> None:
    cases = {case.name: case for case in make_cases(["lsq", "apot", "pact", "affine@pwl"], [2], [2, 8], 1)}
    assert cases["lsq-w2a2-seed0"].acts == "lsq:2"
    assert (cases["apot-w2a2-seed0"].acts, cases["apot-w2a8-seed0"].acts) == ("apot:2", "affine:8")  # no such APoT
    assert (cases["pact-w2a2-seed0"].weight, cases["pact-w2a2-seed0"].acts) == (
        "affine:2,symmetric=narrow/channel",
        "pact:2",
    )
    one = {case.scheme: case.acts for case in make_cases(["irnet", "xnor", "rsign", "dorefa"], [1], [1], 1)}
    assert one == {"irnet": "adabin_act:1", "xnor": "adabin_act:1", "rsign": "rsign:1/channel", "dorefa": "dorefa:1"}
    assert cases["affine@pwl-w2a2-seed0"].weight == "affine:2,symmetric=narrow/channel@pwl"
    with pytest.raises(ConfigError, match="lsq has its own gradient"):
        make_cases(["lsq@pwl"], [2], [8], 1)


def test_all_stands_for_every_scheme_that_has_the_width() -> None:
    names = {case.scheme for case in make_cases(["all"], [2], [8], 1)}
    assert {"affine", "esb", "ternary", "qfmt"} <= names <= set(QUANTIZERS)
    with pytest.raises(UnknownNameError):
        make_cases(["nothing"], [2], [8], 1)


def test_a_batch_norm_is_folded_into_weights_that_keep_their_units() -> None:
    """Signs without a scale would leave nothing of the batch norm, and activations would grow from layer to layer."""
    kept = {"affine:4/channel", "xnor/channel", "twn/channel", "lsq:2/channel", "esb:3,k=0/channel", "nvfp4"}
    found = {
        spec for spec in (*kept, "bnn/channel", "dorefa:2/channel", "irnet:1/channel") if compare_run._keeps_units(spec)
    }
    assert found == kept
