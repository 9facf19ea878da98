"""`torchquant search`: a search into a folder, resumed where it was killed, refused in words, shown in a report."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from tests import ROOT
from tests.browser import Browser, check_opened, check_whole
from torchquant import cli
from torchquant.errors import ConfigError, MissingDependencyError
from torchquant.plan import QuantPlan
from torchquant.runs.console import NullProgress, Terminal
from torchquant.runs.data import load_digits
from torchquant.runs.export import export_run, load_run
from torchquant.runs.loop import accuracy, predict
from torchquant.runs.ranks import Ranks, Share
from torchquant.runs.search import SearchConfig, SearchRunResult, run_search, run_study, write_report
from torchquant.runs.search.results import command_of
from torchquant.search import EpochRecord, PrecisionLearning, SchemeSearch
from torchquant.search.learning.engine import Search
from torchquant.search.report import render_report

OWN_MODEL = """
from torch import nn

def small():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(54, 10)
    )
"""
TINY = {"float_epochs": 1, "epochs": 2, "retrain_epochs": 1, "learning_rate": 2e-2, "calibration_batches": 2}
KINDS: dict[str, dict[str, Any]] = {
    "qss": {"budget": "bytes<=500", "schemes": "clipq,pot,affine", "fold_bn": True},
    "qpl": {"budget": "bits<=3,bytes<=390", "bits": "2-6"},
    "allocate": {"budget": "bytes<=450,bitops<=2e5", "bits": "2-4", "acts": "affine:4,affine:8"},
}


@pytest.fixture(scope="module")
def own_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model") / "own.py"
    path.write_text(OWN_MODEL)
    return f"{path}:small"


def config(kind: str, model: str, **more: Any) -> SearchConfig:
    return SearchConfig(kind, model, **{**TINY, **KINDS[kind], **more})


@pytest.fixture(scope="module")
def runs(own_model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, SearchRunResult]]:
    """A finished run of each kind."""
    folder = tmp_path_factory.mktemp("runs")
    return {kind: (folder / kind, run_search(config(kind, own_model), folder / kind)) for kind in KINDS}


def small_net() -> nn.Module:
    namespace: dict[str, Any] = {}
    exec(OWN_MODEL, namespace)
    return namespace["small"]()


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def history_of(folder: Path) -> list[dict[str, Any]]:
    return [{**entry, "seconds": 0.0} for entry in json.loads((folder / "history.json").read_text())]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_leaves_its_files_and_keeps_its_budget(
    kind: str, runs: dict[str, tuple[Path, SearchRunResult]], own_model: str
) -> None:
    folder, result = runs[kind]
    files = {"config.json", "float.pt", "plan.yaml", "choices.csv", "quantized.pt", "result.json", "report.html"}
    files |= {"losses.json"}
    own = {"sensitivity.json", "pareto.json"} if kind == "allocate" else {"history.json", "history.csv", "searched.pt"}
    assert {path.name for path in folder.iterdir()} == files | own
    assert SearchRunResult(**json.loads((folder / "result.json").read_text())) == result
    net = small_net()
    net.load_state_dict(torch.load(folder / ("float.pt" if kind == "allocate" else "searched.pt"), weights_only=True))
    plan = QuantPlan.load(folder / "plan.yaml")
    cost = plan.cost(net, load_digits(0, 1).test_images[:2])
    elements = {site.path: net.get_parameter(f"{site.path}.weight").numel() for site in cost if site.weight_bits}
    counted = {
        "bytes": cost.weight_bytes,
        "bitops": cost.bit_ops,
        "bits": sum(elements[s.path] * s.weight_bits for s in cost if s.weight_bits) / sum(elements.values()),
    }
    for measure, limit in result.budgets.items():
        assert counted[measure] <= limit
        assert result.costs[measure] == pytest.approx(counted[measure])
    assert result.keeps_budgets
    assert result.accuracy > 0.3
    choices = read_csv(folder / "choices.csv")
    chosen = {(row["place"], row["field"]): row["spec"] for row in choices}
    assert chosen == {
        (site.path, name): getattr(site, name)
        for site in plan.sites
        for name in ("weight", "input", "output")
        if (site.path, name) in chosen
    }
    assert sum(int(row["bytes"]) for row in choices if row["field"] == "weight") == cost.weight_bytes
    if kind != "allocate":
        assert [int(row["epoch"]) for row in read_csv(folder / "history.csv")] == [1, 2]


def test_every_kind_makes_a_choice(runs: dict[str, tuple[Path, SearchRunResult]]) -> None:
    qss = runs["qss"][1].candidates
    assert qss["0.weight"] == ["clipq:4/channel", "pot:4/channel", "affine:4,symmetric=narrow/channel"]
    assert runs["qpl"][1].candidates["6.weight"] == ["clipq:{n}/channel"]
    # an activation that comes quantized has no candidates for it a second time
    acts = {name for name in runs["allocate"][1].candidates if not name.endswith("weight")}
    assert acts == {"0.input", "0.output", "3.output"}
    plan = QuantPlan.load(runs["allocate"][0] / "plan.yaml")
    assert [site.input for site in plan.sites][1:] == [None] * (len(plan.sites) - 1)


def test_searched_inputs_are_those_that_count(own_model: str, tmp_path: Path) -> None:
    asked = config("qss", own_model, budget="bitops<=2e5", acts="affine:4,affine:8", epochs=1, retrain_epochs=0)
    result = run_search(asked, tmp_path)
    assert result.keeps_budgets
    assert {name for name in result.candidates if name.endswith("input")} == {"0.input"}


def test_a_run_is_loaded_and_exported_like_a_job(runs: dict[str, tuple[Path, SearchRunResult]], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    folder, result = runs["qss"]
    model, data, known = load_run(folder)
    assert accuracy(predict(model, data.test_images), data.test_labels) == result.accuracy
    assert (known.model, known.seed) == (config("qss", known.model).model, 0)
    made = export_run(folder, "onnx", True, 32, tmp_path / "model.onnx")
    assert made.certificate is not None
    assert made.certificate.passed


class Stopped(Exception):  # noqa: N818
    pass


class StopsAt(NullProgress):
    """Raises when the n-th row or advance comes."""

    def __init__(self, n: int) -> None:
        self.left = n

    def _count(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise Stopped

    def advance(self, amount: float, doing: str) -> None:
        self._count()

    def row(self, title: str, cells: Mapping[str, str]) -> None:
        self._count()


@pytest.mark.parametrize("kind", ["qpl", "allocate"])
def test_a_stopped_run_goes_on_and_ends_the_same(
    kind: str, own_model: str, runs: dict[str, tuple[Path, SearchRunResult]], tmp_path: Path
) -> None:
    whole, result = runs[kind]
    for n in (2, 2, 1):
        with pytest.raises(Stopped):
            run_search(config(kind, own_model), tmp_path, StopsAt(n))
    assert run_search(config(kind, own_model), tmp_path) == result
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in whole.iterdir()}
    states = [torch.load(folder / "quantized.pt", weights_only=True) for folder in (whole, tmp_path)]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    if kind == "qpl":
        assert history_of(tmp_path) == history_of(whole)
    with pytest.raises(ConfigError, match=r"holds another search \(seed: 0 there, 1 now\)"):
        run_search(config(kind, own_model, seed=1), tmp_path)


@pytest.mark.slow
def test_a_killed_search_goes_on_and_ends_the_same(own_model: str, tmp_path: Path) -> None:
    words = ["search", "qss", own_model, "--budget", "bytes<=500", "--schemes", "clipq,pot,esb", "--epochs", "6"]
    words += ["--float-epochs", "1", "--retrain-epochs", "2", "--learning-rate", "0.02"]
    command = [sys.executable, "-m", "torchquant", *words, "--out"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([*command, str(tmp_path / "whole")], env=environment, check=True, timeout=300, capture_output=True)
    killed = tmp_path / "killed"
    for file, least in (("history.json", 2), ("retrain.progress.pt", 0)):
        process = subprocess.Popen([*command, str(killed)], env=environment, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 200
        while not (killed / file).exists() or (least and len(history_of(killed)) < least):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (killed / "result.json").exists()
    subprocess.run([*command, str(killed)], env=environment, check=True, timeout=300, capture_output=True)
    for name in ("plan.yaml", "choices.csv", "result.json"):
        assert (killed / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert history_of(killed) == history_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "nas"}, "kind must be one of qss, qpl, allocate, got 'nas'"),
        ({"kind": "qpl", "budget": ""}, "qpl needs a budget, such as 'bits<=4'"),
        ({"budget": "byte<=3"}, "did you mean 'bytes'"),
        ({"schemes": "clipq,potato"}, "no quantizer scheme 'potato'; did you mean 'pot'"),
        ({"schemes": "clipq"}, "there is only one candidate, 'clipq:4/channel'; give more schemes or bits"),
        ({"schemes": "nf4", "bits": "2"}, "none of the schemes nf4 has a width in 2"),
        ({"bits": "two"}, "bits must be whole numbers from 1, such as '4', '2,3,4' or '2-8'; got 'two'"),
        ({"kind": "qpl", "bits": "2,8"}, "must be a range of widths without gaps, such as '2-8'; got '2,8'"),
        ({"acts": ""}, "at least one spec, such as 'affine:8'"),
        ({"per": "block"}, "per must be one of layer, model, got 'block'"),
        ({"method": "guess"}, "method must be one of mse, kl"),
        ({"solver": "guess"}, "solver must be one of ilp, dp, greedy"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"seed": -1}, "seed must be 0..4294967295, got -1"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"rules": "nothing.yaml"}, "there is no file 'nothing.yaml'"),
        ({"rules": "w8a8", "schemes": "pot"}, "rules name the candidates; leave out schemes"),
    ],
)
def test_bad_settings(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        SearchConfig(**{"kind": "qss", "model": "demo", "budget": "bits<=3", **given})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"budget": "bytes<=10"}, r"the budget bytes<=10 cannot be met: the smallest value .* is \d+"),
        ({"rules": "w8a8"}, "the rules leave nothing to choose"),
        ({"budget": "latency<=1ms"}, "a budget of latency needs a latency table"),
        ({"latency": "nothing.json"}, "nothing.json cannot be read"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_any_training(
    given: dict[str, Any], message: str, own_model: str, tmp_path: Path
) -> None:
    asked = SearchConfig("qss", own_model, **{**TINY, **given})
    with pytest.raises(ConfigError, match=message):
        run_search(asked, tmp_path)
    assert not (tmp_path / "float.pt").exists()


def test_rules_of_a_file(own_model: str, tmp_path: Path) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text("- {weight: 'affine:{n},symmetric=narrow/channel'}\n- {names: ['6'], weight: 'affine:8'}\n")
    plan = SearchConfig("qpl", own_model, "bits<=3", rules=str(rules), bits="2-5").space(small_net(), None)
    assert plan.sites[0].weight.options()[-1] == "affine:5,symmetric=narrow/channel"  # type: ignore[union-attr]
    assert plan.sites[-1].weight == "affine:8"
    QuantPlan.from_rules([{"weight": "affine:8"}], small_net()).save(rules)
    with pytest.raises(ConfigError, match="holds a plan, which leaves nothing to choose; give a list of rules"):
        SearchConfig("qpl", own_model, "bits<=3", rules=str(rules))


FIGURES = {
    "qss": {"Losses of the mixed model", "Entropy of the schemes' shares", "Cost in bytes", "Search points by scheme"},
    "qpl": {"Bits of the weights", "Losses of the mixed model", "Cost in bits", "Search points by scheme"},
    "allocate": {"Degradation over cost", "Search points by scheme"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_report_has_everything_and_needs_nothing(kind: str, runs: dict[str, tuple[Path, SearchRunResult]]) -> None:
    folder, result = runs[kind]
    page = (folder / "report.html").read_text()
    said = "".join(check_whole(page).text)
    assert all(name in said for name in FIGURES[kind])
    assert f"{result.accuracy:.2%}" in said
    assert "budget kept" in said
    assert all(row["spec"] in said for row in read_csv(folder / "choices.csv"))
    assert "The model, site by site" in said
    assert f"torchquant search {kind}" in said
    assert write_report(folder).read_text() == page


def test_the_report_in_a_browser(runs: dict[str, tuple[Path, SearchRunResult]], browser: Browser) -> None:
    found = check_opened(browser, runs["qpl"][0] / "report.html", "search")
    assert {"0", "3", "6"} <= set(found.graphs[0]["names"])
    assert found.plots > len(FIGURES["qpl"])


def test_a_report_without_a_run() -> None:
    """From plain data, also of one epoch, many places and no budget."""
    names = [f"layer{i}.weight" for i in range(40)]
    costs = dict.fromkeys(("bytes", "bits", "act_bytes", "act_bits", "bitops", "latency"), 1.0)
    record = EpochRecord(
        1, 0.5, None, 1.0, 5.0, costs, {}, dict.fromkeys(names, 4.0), dict.fromkeys(names, [0.5, 0.5]), 1.0
    )
    choices = [{"place": n, "field": "weight", "spec": "clipq:4<b>", "bits": 4, "bytes": 10} for n in names]
    page = render_report("t", (["a"], [["b"]], "n"), choices, [record], (), dict.fromkeys(names, ["clipq:4", "pot:4"]))
    said = "".join(check_whole(page).text)
    assert said.count("Search points by scheme") == 1
    assert "clipq:4<b>" in said
    with pytest.raises(ConfigError, match=r"it does not hold result.json"):
        write_report(ROOT / "tests")


def test_the_command_shows_epochs_and_goes_on(own_model: str, tmp_path: Path) -> None:
    words = ["search", "qpl", own_model, "--budget", "bits<=3", "--epochs", "1", "--float-epochs", "1"]
    words += ["--retrain-epochs", "0", "--learning-rate", "0.02", "--out", str(tmp_path / "out")]
    environment = {"COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb"}
    first = CliRunner().invoke(cli.build_app(), words, env=environment)
    assert first.exit_code == 0, first.output
    assert re.search(r"search: epoch 1 of 1, loss \d\.\d+, .*bits [\d.]+ of 3, entropy", first.output)
    assert "precision learning" in first.output
    assert "report.html" in first.output
    again = CliRunner().invoke(cli.build_app(), words, env=environment)
    assert "epoch 1" not in again.output
    assert first.output.endswith(again.output[again.output.index("torchquant search") :])
    asked = SearchConfig(**json.loads((tmp_path / "out" / "config.json").read_text()))
    assert command_of(asked).startswith(f"torchquant search qpl {own_model} --budget 'bits<=3' --float-epochs 1")
    for wrong, message in (
        (["search", "qpl", "demo"], "qpl needs a budget"),
        (
            ["search", "study", "allocate", "demo", "--budget", "bits<=3"],
            "a study needs the kind qss or qpl, got 'allocate'",
        ),
        (["search", "qss", "demo", "--device", "abacus"], "the device 'abacus' cannot be used"),
        (["search", "qss", "demo", "--distributed"], "torchrun --nproc-per-node 2 -m torchquant search"),
    ):
        refused = CliRunner().invoke(cli.build_app(), [*wrong, "--out", str(tmp_path / "no")], env=environment)
        assert refused.exit_code == 1
        assert message in " ".join(refused.output.split())


def test_a_terminal_has_a_table_that_grows() -> None:
    console = pytest.importorskip("rich.console")
    written = io.StringIO()
    terminal = Terminal(console.Console(file=written, force_terminal=True, width=100))
    with terminal as shown:
        shown.start(2.0)
        for epoch in range(1, 16):
            shown.row("search", {"epoch": f"{epoch} of 15", "loss": "0.500"})
        shown.advance(1.0, "searching")
        terminal._bar.refresh()
    assert "15 of 15" in written.getvalue()
    assert "4 of 15" in written.getvalue()


def test_ranks_share_the_batches() -> None:
    class Numbers:
        """Batches that are drawn one by one."""

        n_train, n_channels, n_classes = 64 * 7, 1, 10
        test_images, test_labels = torch.zeros(1, 1), torch.zeros(1)

        def train_batches(self, generator: torch.Generator, batch_size: int) -> Any:
            for _ in range(7):
                yield torch.rand(1, generator=generator), torch.zeros(1)

    def seen(rank: int, world: int) -> tuple[list[float], Tensor]:
        generator = torch.Generator().manual_seed(1)
        share = Share(Numbers(), rank, world, "cpu")
        found = [float(x) for x, _ in share.train_batches(generator, 64)]
        assert len(found) * 64 == share.n_train
        return found, generator.get_state()

    whole, state = seen(0, 1)
    parts = [seen(rank, 3) for rank in range(3)]
    assert [x for batch in zip(*(found for found, _ in parts), strict=True) for x in batch] == whole[:6]
    assert all(torch.equal(state, other) for _, other in parts)
    with pytest.raises(ConfigError, match="448 training images make 7 batches of 64, too few for 8 processes"):
        Share(Numbers(), 0, 8, "cpu")
    assert isinstance(Ranks().share(Numbers()), Numbers)  # type: ignore[arg-type]


def test_allocation_is_no_work_for_several_processes(own_model: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="allocate measures in one process"):
        run_search(config("allocate", own_model), tmp_path, distributed=True)


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch was built without gloo")
@pytest.mark.parametrize("kind", ["qss", "qpl"])
def test_two_processes_search_together(kind: str, own_model: str, tmp_path: Path) -> None:
    words = ["search", kind, own_model, "--budget", KINDS[kind]["budget"], "--epochs", "3", "--float-epochs", "2"]
    words += ["--retrain-epochs", "2", "--learning-rate", "0.02", "--out", str(tmp_path), "--distributed"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "-m", "torchquant", *words],
        env=environment,
        stdout=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    try:
        told, _ = process.communicate(timeout=300)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)  # torchrun ends its processes
    assert process.returncode == 0
    assert told.count("epoch 3 of 3") == 1
    result = SearchRunResult(**json.loads((tmp_path / "result.json").read_text()))
    assert result.keeps_budgets
    assert result.accuracy > 0.3
    assert json.loads((tmp_path / "config.json").read_text())["processes"] == 2
    assert "progress" not in "".join(path.name for path in tmp_path.iterdir())


def test_a_study_is_shared_and_goes_on(own_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    optuna = pytest.importorskip("optuna")
    asked = config("qpl", own_model, epochs=1, retrain_epochs=0)
    storage = str(tmp_path / "study.log")

    class StopsInSearch(NullProgress):
        def row(self, title: str, cells: Mapping[str, str]) -> None:
            raise Stopped

    with pytest.raises(Stopped):
        run_study(asked, tmp_path / "one", 1, storage, show=StopsInSearch())
    first = run_study(asked, tmp_path / "one", 1, storage)
    assert [trial.number for trial in first.trials] == [0]  # the one that was stopped
    second = run_study(asked, tmp_path / "two", 2, storage)  # another machine joins
    assert sorted(trial.number for trial in second.trials) == [0, 1]
    assert second.best.accuracy == max(trial.accuracy for trial in second.trials)
    assert all(trial.costs["bits"] <= 3 for trial in second.trials)
    assert (tmp_path / "one" / "trial-0" / "report.html").exists()
    assert (tmp_path / "two" / "trial-1" / "report.html").exists()
    assert len(json.loads((tmp_path / "two" / "study.json").read_text())) == 2
    header, rows, _ = second.table()
    assert header == ["trial", "accuracy", "bytes", "arch_rate", "penalty"]
    assert len(rows) == 2
    assert optuna.logging.get_verbosity() == optuna.logging.INFO
    with pytest.raises(ConfigError, match="holds a study of another search"):
        run_study(replace(asked, seed=1), tmp_path / "two", 2, storage)
    with pytest.raises(ConfigError, match="the storage 'nowhere://x' cannot be opened"):
        run_study(asked, tmp_path / "three", 1, "nowhere://x")
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingDependencyError, match=r"torchquant\[search\]"):
        run_study(asked, tmp_path / "three", 1)


def test_the_batches_of_an_epoch_are_always_the_same() -> None:
    from torchquant.runs.search.run import _epoch

    data = load_digits(0, 1)
    first, again, other = (list(itertools.islice(_epoch(data, 0, n), 2)) for n in (1, 1, 2))
    assert len(_epoch(data, 0, 1)) == 22
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0][0], other[0][0])


def test_retraining_that_was_stopped_sees_the_batches_of_its_epochs(tmp_path: Path) -> None:
    def batches(epoch: int) -> list[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(epoch)
        return [(torch.randn(8, 4, generator=generator), torch.arange(8) % 2) for _ in range(2)]

    def stop(epoch: int, loss: float) -> None:
        if epoch == 2:
            raise Stopped

    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    search = SchemeSearch(net, [{"weight": ["clipq:4/channel", "pot:4/channel"]}], batches(0)[0][0])
    whole = search.retrain(batches, 4).state_dict()
    with pytest.raises(Stopped):
        search.retrain(batches, 4, on_epoch=stop, progress=tmp_path / "retrain.pt")
    again = search.retrain(batches, 4, progress=tmp_path / "retrain.pt").state_dict()
    assert all(torch.equal(value, again[key]) for key, value in whole.items())


@pytest.mark.parametrize("kind", [SchemeSearch, PrecisionLearning])
def test_one_choice_for_the_model_stays_one_under_a_budget(kind: type[Search]) -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    field = ["affine:2", "affine:4", "affine:8"] if kind is SchemeSearch else "affine:{n}"
    search = kind(net, [{"weight": field}], torch.zeros(2, 4), "bits<=4.5", per="model")
    with torch.no_grad():
        for logits in search.logits:
            logits += torch.tensor([0.0, 0.5, 1.0])  # the widest is liked best, and over the budget
    assert [site.weight for site in search.derive().sites] == ["affine:4", "affine:4"]
