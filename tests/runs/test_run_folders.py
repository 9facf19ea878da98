"""Folders of runs: one process at a time, tied to what took part, whole or refused in one line that names the file."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tests import ROOT
from torchquant import cli
from torchquant.compat.nni.compiled import compile_config
from torchquant.errors import ConfigError
from torchquant.plan import quantize
from torchquant.quantizers import QUANTIZERS
from torchquant.runs import networks, report, stages
from torchquant.runs.compare import Recipe, read_leaderboard, write_leaderboard
from torchquant.runs.compare import run as compare_run
from torchquant.runs.contents import contents_of
from torchquant.runs.data import Digits, load_digits
from torchquant.runs.folder import claimed
from torchquant.runs.quantize import JobConfig, run_job
from torchquant.runs.search import SearchConfig, run_search, write_report

OWN_MODEL = """
import torch
from torch import nn
from blocks_of_mine import Head

def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, stride=4), nn.ReLU(), nn.Flatten(), Head())
"""
BLOCKS = """
from torch import nn

class Head(nn.Linear):
    def __init__(self):
        super().__init__(64, 10)
"""
RULES = "- {weight: 'affine:BITS,symmetric=narrow/channel', input: 'affine:8'}\n"
RAISES = """
import torch
from torch import nn

class Forward(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(256, 10)
    def forward(self, x):
        return self.fc(x.flatten(1)) + torch.zeros(3, 7)

def build():
    return {}["layers"]

class Later(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(256, 10)
    def forward(self, x):
        return self.fc(x.flatten(1) if not self.training else {}["later"])
"""
MANY = "torchquant_ptq: 1\ndata: {samples: 64000, batch: 32}\nstages: [gptq]\n"
BROKEN_PLUGIN = """
import torchquant as tq

@tq.QUANTIZERS.register("broken")
class Broken(tq.TernaryQuantizer):
    about = tq.quantizers.About(formula="none", paper="none", bits="2")
    def measure(self, x):
        return None + 1
"""
PLUGIN = """
import torchquant as tq

@tq.QUANTIZERS.register("coarse")
class Coarse(tq.TernaryQuantizer):
    about = tq.quantizers.About(formula="ternary under another name", paper="none", bits="2")
"""


@pytest.fixture(autouse=True, scope="module")
def tiny_data() -> Iterator[None]:
    """Digits, few of them."""
    all_of_them = load_digits(0, 1)
    few = Digits(
        all_of_them.train_images[:128],
        all_of_them.train_labels[:128],
        all_of_them.test_images[:64],
        all_of_them.test_labels[:64],
    )
    with pytest.MonkeyPatch.context() as patch:
        for module in (networks, compare_run):
            original = module.load_data
            patch.setattr(module, "load_data", lambda name, *r, o=original: few if name == "digits" else o(name, *r))
        compare_run._data.cache_clear()
        yield
    compare_run._data.cache_clear()


def command(*words: Any) -> Any:
    return CliRunner().invoke(cli.build_app(), [str(word) for word in words], env={"COLUMNS": "200", "TERM": "dumb"})


@dataclass(frozen=True)
class Work:
    """A project of somebody: a model file and its blocks, rules, a checkpoint, a plug-in."""

    folder: Path

    @property
    def model(self) -> str:
        return f"{self.folder / 'own.py'}:small"

    def quantize(self, out: Path, *more: Any) -> Any:
        words = ["--rules", self.folder / "rules.yaml", "--float-epochs", 1, "--mode", "qat", "--epochs", 1]
        return command("quantize", self.model, *words, "--out", out, *more)

    def search(self, out: Path, *more: Any) -> Any:
        words = ["--budget", "bits<=3", "--epochs", 1, "--float-epochs", 1, "--retrain-epochs", 1, "--bits", "2-4"]
        return command("search", "qpl", self.model, *words, "--out", out, *more)

    def allocate(self, out: Path, *more: Any) -> Any:
        words = ["--budget", "bits<=3", "--float-epochs", 1, "--retrain-epochs", 0, "--bits", "2-4"]
        return command("search", "allocate", self.model, *words, "--method", "mse", "--out", out, *more)

    def compare(self, out: Path, *more: Any) -> Any:
        words = ["--schemes", "affine", "--bits", "4", "--seeds", 1, "--epochs", 0, "--float-epochs", 1]
        return command("compare", *words, "--out", out, *more)

    def export(self, out: Path, *more: Any) -> Any:
        return command("export", out, "--to", "integer", "--samples", 4, "--out", self.folder / "integer.json", *more)


def make_work(folder: Path) -> Work:
    folder.mkdir(exist_ok=True)
    (folder / "own.py").write_text(OWN_MODEL)
    (folder / "blocks_of_mine.py").write_text(BLOCKS)
    (folder / "rules.yaml").write_text(RULES.replace("BITS", "8"))
    return Work(folder)


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing is most of the time of a second run."""
    monkeypatch.setattr(report, "model_parts", lambda *args: [])
    monkeypatch.setitem(write_leaderboard.__globals__, "_html", lambda *args: "a leaderboard")


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Work:
    monkeypatch.syspath_prepend(tmp_path / "work")
    sys.modules.pop("blocks_of_mine", None)
    return make_work(tmp_path / "work")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Work, dict[str, Path]]]:
    """A finished run of each kind."""
    folder = tmp_path_factory.mktemp("finished")
    work = make_work(folder / "work")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(work.folder)
        sys.modules.pop("blocks_of_mine", None)
        runs = {}
        for kind in ("quantize", "search", "allocate", "compare"):
            done = getattr(work, kind)(folder / kind)
            assert done.exit_code == 0, done.output
            runs[kind] = folder / kind
        yield work, runs
    sys.modules.pop("blocks_of_mine", None)


def refused(done: Any, *words: Any) -> str:
    """The one line of a refusal, in which all the words are."""
    assert done.exit_code == 1, done.output
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert len(lines[0]) < 1500
    assert "weights_only" not in done.output
    for word in words:
        assert str(word) in lines[0]
    return lines[0]


# What took part


def test_rules_that_changed_under_the_same_name_are_another_job(work: Work, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert work.quantize(out).exit_code == 0
    before = (out / "result.json").read_bytes()
    assert work.quantize(out).exit_code == 0
    (work.folder / "rules.yaml").write_text(RULES.replace("BITS", "2"))
    refused(work.quantize(out), "holds another job", work.folder / "rules.yaml", "has changed")
    assert (out / "result.json").read_bytes() == before
    (work.folder / "rules.yaml").write_text(RULES.replace("BITS", "8"))
    assert work.quantize(out).exit_code == 0


@pytest.mark.parametrize("name", [pytest.param("own.py", marks=pytest.mark.slow), "blocks_of_mine.py"])
@pytest.mark.parametrize("kind", ["quantize", "search", "export"])
def test_a_model_file_that_changed_is_noticed(name: str, kind: str, finished: Any, tmp_path: Path) -> None:
    """The file of the model, and one that it takes a class from."""
    work, runs = finished
    out = runs["quantize" if kind == "export" else kind]
    before = (work.folder / name).read_text()
    try:
        (work.folder / name).write_text(before + "\n# another line\n")
        refused(getattr(work, kind)(out), name, "has changed")
    finally:
        (work.folder / name).write_text(before)
    assert getattr(work, kind)(out).exit_code == 0


def test_a_checkpoint_that_changed_is_noticed_by_every_command(finished: Any, tmp_path: Path) -> None:
    work, runs = finished
    for kind, trained in (("quantize", "float.pt"), ("allocate", "float.pt"), ("compare", "float-seed0.pt")):
        checkpoint, out = tmp_path / f"{kind}.pt", tmp_path / kind
        shutil.copy(runs[kind] / trained, checkpoint)
        run: Callable[..., Any] = getattr(work, kind)
        assert run(out, "--checkpoint", checkpoint).exit_code == 0
        assert run(out, "--checkpoint", checkpoint).exit_code == 0
        state = torch.load(checkpoint, weights_only=True)
        torch.save({key: value + 0.01 for key, value in state.items()}, checkpoint)
        refused(run(out, "--checkpoint", checkpoint), checkpoint, "has changed")
        checkpoint.unlink()
        refused(run(out, "--checkpoint", checkpoint), checkpoint)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("torchvision")
    folder = tmp_path / "pictures"
    for split in ("train", "test"):
        for i, name in enumerate("ab"):
            (folder / split / name).mkdir(parents=True)
            for n in range(2):
                image.new("RGB", (8, 8), (i * 200, n, 0)).save(folder / split / name / f"{n}.png")
    return folder


def test_a_model_of_one_channel_is_told_that_pictures_are_in_colour(work: Work, pictures: Path, tmp_path: Path) -> None:
    words = "does not take pictures of shape (2, 3, 64, 64), which are always in colour: "
    refused(command("quantize", work.model, "--data", pictures, "--out", tmp_path / "out"), words)


def test_data_that_changed_is_noticed(pictures: Path, tmp_path: Path) -> None:
    words = ["quantize", "demo", "--data", pictures, "--float-epochs", 0, "--out", tmp_path / "out"]
    assert command(*words).exit_code == 0
    assert command(*words).exit_code == 0
    picture = pictures / "train" / "a" / "0.png"
    os.utime(picture, (0, 0))  # touched is not changed
    assert command(*words).exit_code == 0
    picture.write_bytes((pictures / "train" / "b" / "0.png").read_bytes())
    refused(command(*words), "holds another job", pictures, "has changed")
    refused(command("export", tmp_path / "out"), pictures, "has changed")
    picture.write_bytes(b"no picture")
    refused(command(*words), picture, "is not a picture")


def test_a_plug_in_that_changed_makes_its_cases_run_again(tmp_path: Path) -> None:
    plugin, out = tmp_path / "mine.py", tmp_path / "out"
    words = ["compare", "--schemes", "coarse,affine", "--bits", "2", "--seeds", 1, "--epochs", 0, "--float-epochs", 1]
    words += ["--plugin", plugin, "--out", out]

    def run(text: str) -> Any:
        compare_run._load_once.cache_clear()
        plugin.write_text(text)
        try:
            done = command(*words)
        finally:
            if "coarse" in QUANTIZERS:
                QUANTIZERS.unregister("coarse")
        assert done.exit_code == 0, done.output
        return done.output

    run(PLUGIN)
    first = json.loads((out / "runs" / "coarse-w2a8-seed0.json").read_text())
    assert "has changed" not in run(PLUGIN)
    again = run(PLUGIN + "    def project(self, x, want_inside, *p):\n        return x * 0, None\n")
    assert "coarse-w2a8-seed0: mine.py has changed, so the case runs again" in again
    assert "affine-w2a8-seed0:" not in again
    found = json.loads((out / "runs" / "coarse-w2a8-seed0.json").read_text())
    assert found["weight_sqnr_db"] != first["weight_sqnr_db"]


def test_packages_of_another_python_are_not_contents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "lib" / "site-packages"
    site.mkdir(parents=True)
    (site / "layers_of_others.py").write_text("from torch import nn\n")
    # torch.ops names a file that does not exist
    (tmp_path / "net_of_mine.py").write_text("from torch import nn, ops\nimport layers_of_others\n")
    for folder in (site, tmp_path):
        monkeypatch.syspath_prepend(folder)
    importlib.import_module("net_of_mine")
    assert set(contents_of([], model="net_of_mine:build")) == {"net_of_mine.py"}


def test_settings_come_back_with_their_contents(finished: Any, tmp_path: Path) -> None:
    work, runs = finished
    config = JobConfig(**json.loads((runs["quantize"] / "config.json").read_text()))
    assert set(config.contents or ()) == {str(work.folder / "rules.yaml"), "own.py", "blocks_of_mine.py"}
    assert config == JobConfig(**{**asdict(config), "contents": None})
    stale = JobConfig(**{**asdict(config), "contents": {**(config.contents or {}), "own.py": "0"}})
    with pytest.raises(ConfigError, match="own.py changed since the settings were written"):
        run_job(stale, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    search = SearchConfig(**json.loads((runs["search"] / "config.json").read_text()))
    assert run_search(search, runs["search"]).keeps_budgets


@pytest.mark.parametrize("kind", ["quantize", "search", "compare"])
def test_a_folder_of_a_version_that_kept_no_contents_goes_on(kind: str, finished: Any, tmp_path: Path) -> None:
    work, runs = finished
    out = tmp_path / "old"
    shutil.copytree(runs[kind], out)
    path = out / ("recipe.json" if kind == "compare" else "config.json")
    known = json.loads(path.read_text())
    del known["contents"]
    path.write_text(json.dumps(known))
    done = getattr(work, kind)(out)
    assert done.exit_code == 0, done.output
    if kind != "compare":
        assert "was written by a version that kept no contents;" in done.output
    if kind == "quantize":
        assert work.export(out).exit_code == 0


# Who has the folder

CLAIMS = """
import os, sys, time
from pathlib import Path
from torchquant.runs.folder import claimed
from torchquant.errors import ConfigError

def claim(out, who, told):
    try:
        with claimed(out / "config.json", {"who": who}, "another job", "job", ("made-*",), print) as folder:
            (folder / f"made-{who}").write_text("")
            time.sleep(0.02)
            told.write_text("won")
    except ConfigError as error:
        told.write_text(str(error))

for turn in range(6):
    out = Path(sys.argv[1]) / f"out{turn}"
    children = []
    for who in range(12):
        child = os.fork()
        if child == 0:
            claim(out, who, out.with_name(f"told{turn}-{who}"))
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
def test_of_many_processes_one_gets_the_folder(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-W", "ignore", "-c", CLAIMS, str(tmp_path)], env=environment, check=True)
    for turn in range(6):
        out = tmp_path / f"out{turn}"
        told = [(tmp_path / f"told{turn}-{who}").read_text() for who in range(12)]
        assert told.count("won") == 1, told
        winner = told.index("won")
        assert {path.name for path in out.iterdir()} == {"config.json", f"made-{winner}"}
        assert json.loads((out / "config.json").read_text()) == {"who": winner}
        refusals = (f"{out} is in use by ", f"{out} holds another job (who: {winner} there, ")
        assert all(text == "won" or text.startswith(refusals) for text in told), told


def claim(folder: Path, **settings: Any) -> Any:
    return claimed(folder / "config.json", settings, "another job", "job", ("float.pt",), lambda text: None)


def test_a_folder_in_use_is_refused_and_left_alone(tmp_path: Path) -> None:
    with claim(tmp_path, a=1):
        refusal = rf"is in use by process {os.getpid()} on .*; wait for it"
        for a in (1, 2):
            with pytest.raises(ConfigError, match=refusal), claim(tmp_path, a=a):
                pass
    assert json.loads((tmp_path / "config.json").read_text()) == {"a": 1}


def test_a_command_that_fails_before_it_made_anything_leaves_no_claim(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(RuntimeError), claim(tmp_path, a=1):
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(FileExistsError), claim(tmp_path, a=2):
        [(tmp_path / "float.pt").touch(exist_ok=False) for _ in range(2)]
    with pytest.raises(ConfigError, match=r"holds another job \(a: 2 there, 3 now\)"), claim(tmp_path, a=3):
        pass
    with claim(tmp_path, a=2):
        pass
    (tmp_path / "config.json").unlink()
    with (
        pytest.raises(ConfigError, match=r"config.json is missing, but float.pt of some run is there"),
        claim(tmp_path, a=2),
    ):
        pass


def test_a_command_that_was_killed_before_it_made_anything_gives_way(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"a": 1}')
    (tmp_path / ".lock").write_text("process 1")
    (tmp_path / ".tmp-01234567-float.pt").write_text("half")
    with claim(tmp_path, a=2):
        pass
    assert json.loads((tmp_path / "config.json").read_text()) == {"a": 2}
    assert not (tmp_path / ".lock").exists()


# All is checked first


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["quantize", "resnet81"], "no model 'resnet81' in torchvision or timm; did you mean 'resnet"),
        (["quantize", "OWN", "--rules", "w8a9"], "there is no file 'w8a9'"),
        (["quantize", "OWN", "--rules", "BAD"], "rule 1: no type 'Conv9d'; did you mean 'Conv"),
        (["quantize", "OWN", "--checkpoint", "BAD"], "holds no state dict that can be read safely"),
        (["quantize", "OWN", "--checkpoint", "missing.pt"], "there is no file missing.pt"),
        (["quantize", "OWN", "--data", "missing"], "data must be digits, cifar10 or a folder"),
        (["quantize", "OWN", "--learning-rate", "nan"], "learning_rate must be above 0 and finite, got nan"),
        (["quantize", "OWN", "--learning-rate", "inf"], "learning_rate must be above 0 and finite, got inf"),
        (["quantize", "OWN", "--seed", 2**40], "seed must be 0..4294967295"),
        (["quantize", "torch.nn:ReLU"], "must return scores of shape (2, 10) for pictures of shape (2, 1, 16, 16)"),
        (["quantize", "torch.nn:Linear"], "torch.nn:Linear failed: TypeError"),
        (["quantize", "squeezenet1_1"], "does not take pictures of shape (2, 1, 16, 16)"),
        (["search", "qpl", "OWN", "--budget", "bits<=3", "--checkpoint", "BAD"], "holds no state dict"),
        (["search", "qpl", "OWN", "--budget", "bits<=3", "--learning-rate", "nan"], "learning_rate must be above 0"),
        (["search", "qpl", "OWN", "--budget", "bits<=3", "--penalty", "nan"], "penalty must be above 0 and finite"),
        (["search", "qpl", "torch.nn:ReLU", "--budget", "bits<=3"], "must return scores of shape (2, 10)"),
        (["quantize", "OWN", "--data", "digts"], "got 'digts'; did you mean 'digits'?"),
        (["quantize", "OWN", "--device", "abacus"], "the device 'abacus' cannot be used"),
        (["quantize", "OWN", "--amp", "fp8"], "amp must be one of bf16, fp16, got 'fp8'"),
        (["quantize", "OWN", "--weights", "DEFAULT"], "is not a model of torchvision or timm, so it has no weights"),
        (["compare", "--data", "digts"], "got 'digts'; did you mean 'digits'?"),
        (["quantize", "OWN", "--mode", "qta"], "mode must be one of ptq, qat, got 'qta'; did you mean 'qat'?"),
        (["quantize", "OWN", "--rules", "w4a4lsq"], "there is no file 'w4a4lsq'; did you mean 'w4a4-lsq'?"),
        (["quantize", "RAISES:build"], "raises.py, line 13, failed: KeyError: 'layers' (in: return {}[\"layers\"])"),
        (["quantize", "RAISES:Forward"], "raises.py, line 10, failed: RuntimeError: The size of tensor a (10)"),
        (["quantize", "RAISES:Later", "--mode", "qat"], "raises.py, line 20)"),
        (["ptq", "OWN", "--recipe", "gptqq"], "there is no 'gptqq'. did you mean 'gptq'?"),
        (["ptq", "OWN", "--recipe", "MANY"], "digits has 128 training images, fewer than the recipe asks"),
        (["ptq", "OWN", "--recipe", "brecq:no_such_option"], "no_such_option"),
        (["analyze", "OWN", "--rules", "w8a9"], "there is no file 'w8a9'"),
        (["analyze", "RAISES:Forward"], "raises.py, line 10, failed: RuntimeError"),
        (["search", "allocate", "OWN", "--budget", "bits<=3", "--method", "hesian"], "did you mean 'hessian'?"),
        (["search", "qss", "OWN", "--schemes", "twinn"], "presets: bnn"),
        (["search", "qss", "OWN", "--bits", "4-2"], "bits must be whole numbers from 1, such as '4', '2,3,4' or '2-8'"),
        (["compare", "--bits", "2..4"], "bits must be whole numbers from 1, such as '4', '2,3,4' or '2-8'"),
        (["compare", "--acts", "0"], "acts must be whole numbers from 1"),
        (["compare", "--schemes", "lsq, afine"], "no quantizer scheme 'afine'; did you mean 'affine'"),
        (["compare", "--model", "resnet19"], "did you mean 'resnet18'?"),
        (["compare", "--plugin", "PLUGIN", "--schemes", "broken", "--bits", "2"], "plug.py, line 8, failed: TypeError"),
        (["compare", "--jobs", 0], "jobs must be a whole number of at least 1, got 0"),
        (["compare", "--jobs", -2], "jobs must be a whole number of at least 1, got -2"),
        (["compare", "--checkpoint", "BAD"], "does not hold the state_dict of this network"),
        (["compare", "--plugin", "BAD"], "is not a Python file"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_what_is_asked_wrongly_is_refused_before_the_folder_is_touched(
    words: list[Any], message: str, work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **options: Any) -> None:
        raise AssertionError("something was trained")

    for module in (stages, compare_run):
        monkeypatch.setattr(module, "train", never)
    bad = tmp_path / "bad.yaml"
    bad.write_text("- {types: [Conv9d], weight: 'affine:8'}\n")
    places = {"OWN": work.model, "BAD": bad}
    for name, text in (("raises.py", RAISES), ("plug.py", BROKEN_PLUGIN), ("many.yaml", MANY)):
        (tmp_path / name).write_text(text)
    raises, plugin, many = (str(tmp_path / name) for name in ("raises.py", "plug.py", "many.yaml"))
    places |= {"PLUGIN": plugin, "MANY": many}
    given = [places.get(word, str(word).replace("RAISES", raises)) for word in words]
    try:
        refused(command(*given, "--out", tmp_path / "out"), message)
    finally:
        if "broken" in QUANTIZERS:
            QUANTIZERS.unregister("broken")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "made",
    [
        lambda: JobConfig(3),  # type: ignore[arg-type]
        lambda: JobConfig("demo", epochs="3"),  # type: ignore[arg-type]
        lambda: JobConfig("demo", epochs=True),
        lambda: JobConfig("demo", rules=Path("a.yaml")),  # type: ignore[arg-type]
        lambda: JobConfig("demo", mode=[]),  # type: ignore[arg-type]
        lambda: JobConfig("demo", learning_rate=None),  # type: ignore[arg-type]
        lambda: SearchConfig("qpl", "demo", 3),  # type: ignore[arg-type]
        lambda: SearchConfig(["qpl"], "demo", "bits<=3"),  # type: ignore[arg-type]
        lambda: SearchConfig("qpl", "demo", "bits<=3", fold_bn="yes"),  # type: ignore[arg-type]
        lambda: SearchConfig("qpl", "demo", "bits<=3", penalty="much"),  # type: ignore[arg-type]
        lambda: Recipe(model=None),  # type: ignore[arg-type]
        lambda: Recipe(epochs=2.5),  # type: ignore[arg-type]
        lambda: Recipe(learning_rate=float("nan")),
    ],
)
def test_settings_of_a_wrong_type_are_named(made: Callable[[], object]) -> None:
    with pytest.raises(ConfigError, match=r"^\w+ must be .*, got "):
        made()


# Damaged files


def damages(path: Path) -> dict[str, bytes]:
    """What a file can become."""
    good = path.read_bytes()
    found = {"empty": b"", "cut": good[: len(good) // 2], "garbage": bytes(range(256)) * 4}
    found |= {"pickle": pickle.dumps({"a": [1.0]}), "list": b"[1, 2]", "mapping": b'{"other": 1}', "null": b"null"}
    if path.suffix == ".json":
        data = json.loads(good)
        if isinstance(data, dict):
            found["newer"] = json.dumps(data | {"of_tomorrow": 1}).encode()
            for key in ("kind", "model", "seed", "contents") if "model" in data else data:
                if key not in data:
                    continue
                found[f"without {key}"] = json.dumps({k: v for k, v in data.items() if k != key}).encode()
                found[f"wrong {key}"] = json.dumps(data | {key: [[]]}).encode()
    if path.suffix == ".yaml":
        found["newer"] = good.replace(b"_plan: 1", b"_plan: 2")
        found["wrong"] = good.replace(b"sites:", b"sites: 3\nother:")
    if path.suffix == ".pt":
        torch.save({"other": torch.zeros(1)}, path)
        found["of another model"] = path.read_bytes()
        torch.save([torch.zeros(1)], path)
        found["a list"] = path.read_bytes()
        torch.save(torch.nn.Linear(1, 1), path)
        found["a module"] = path.read_bytes()
        path.write_bytes(good)
    return found


REWRITTEN = {
    "quantize": {"plan.yaml", "quantized.pt", "report.html", "result.json", "sites.csv"},
    "search": {"choices.csv", "result.json", "report.html", "history.csv"},
    "allocate": {"choices.csv", "result.json", "report.html"},
    "compare": {"leaderboard.json", "leaderboard.csv", "leaderboard.md", "leaderboard.html"},
}
"""Files that a second run writes again from the others."""
HARMLESS = {"without contents", "without evaluated", "wrong evaluated", "newer pareto.json", "newer sensitivity.json"}
"""As an older version wrote it; what nothing here reads."""


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[] if kind == "compare" else [pytest.mark.slow]) for kind in REWRITTEN],
)
def test_a_damaged_file_is_named_in_one_line_or_made_again(kind: str, finished: Any, tmp_path: Path) -> None:
    work, runs = finished
    out = tmp_path / "out"
    shutil.copytree(runs[kind], out)
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        good = path.read_bytes()
        if path.name == "float-seed0.pt":  # not read while all cases have their results
            (out / "runs" / "affine-w4a8-seed0.json").rename(out / "kept")
        for name, damaged in damages(path).items():
            if path.name in REWRITTEN[kind] and name not in ("cut", "garbage"):
                continue
            path.write_bytes(damaged)
            done = getattr(work, kind)(out)
            if done.exit_code == 0:
                assert path.name in REWRITTEN[kind] or {name, f"{name} {path.name}"} & HARMLESS, (path, name)
                if path.name in REWRITTEN[kind] - {"history.csv"}:
                    assert path.read_bytes() != damaged
            else:
                refused(done, path.name)
            path.write_bytes(good)
        path.unlink()
        done = getattr(work, kind)(out)
        if done.exit_code != 0:
            refused(done, path.name)
        path.write_bytes(good)
        if (out / "kept").exists():
            (out / "kept").rename(out / "runs" / "affine-w4a8-seed0.json")
    assert getattr(work, kind)(out).exit_code == 0


@pytest.mark.parametrize("name", ["config.json", "plan.yaml", "quantized.pt"])
@pytest.mark.parametrize("kind", ["quantize", "search"])
def test_a_damaged_run_is_not_exported(name: str, kind: str, finished: Any, tmp_path: Path) -> None:
    work, runs = finished
    out = tmp_path / "out"
    shutil.copytree(runs[kind], out)
    for what, damaged in damages(out / name).items():
        (out / name).write_bytes(damaged)
        done = work.export(out)
        if done.exit_code != 0:
            refused(done, name)
        else:
            assert name == "config.json", what
    (out / name).unlink()
    refused(work.export(out), name)


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("kind", "names"),
    [
        pytest.param("search", ["config.json", "result.json", "history.json", "choices.csv"], marks=pytest.mark.slow),
        ("allocate", ["pareto.json", "result.json"]),
    ],
)
def test_a_report_of_damaged_files_names_them(kind: str, names: list[str], finished: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished[1][kind], out)
    for name in names:
        good = (out / name).read_bytes()
        for damaged in damages(out / name).values():
            (out / name).write_bytes(damaged)
            assert names_it_if_refused(lambda: write_report(out), name)
        (out / name).write_bytes(good)
    write_report(out)


def names_it_if_refused(read: Callable[[], object], name: str) -> bool:
    try:
        read()
    except ConfigError as error:
        return name in str(error)
    return True


def test_a_damaged_leaderboard_is_named(finished: Any, tmp_path: Path) -> None:
    path = tmp_path / "leaderboard.json"
    shutil.copy(finished[1]["compare"] / "leaderboard.json", path)
    for damaged in damages(path).values():
        path.write_bytes(damaged)
        assert names_it_if_refused(lambda: read_leaderboard(path), str(path))


@pytest.mark.parametrize(
    ("kind", "name"),
    [("quantize", "qat.progress.pt"), pytest.param("search", "search.progress.pt", marks=pytest.mark.slow)],
)
def test_damaged_progress_is_named(kind: str, name: str, finished: Any, tmp_path: Path) -> None:
    work, runs = finished
    out = tmp_path / "out"
    shutil.copytree(runs[kind], out)
    for made in ("trained.pt", "plan.yaml", "searched.pt"):
        (out / made).unlink(missing_ok=True)
    shutil.copy(out / "float.pt", out / name)
    for damaged in damages(out / name).values():
        (out / name).write_bytes(damaged)
        line = refused(getattr(work, kind)(out), name)
        assert "delete it" in line
    (out / name).unlink()
    assert getattr(work, kind)(out).exit_code == 0


# A full disk


@pytest.mark.parametrize("kind", ["quantize", "search", "allocate", "compare"])
def test_a_full_disk_ends_a_run_in_one_line_that_names_the_file(
    kind: str, finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for n files, whatever n is; afterwards the run goes on."""
    import errno

    from torchquant import _files

    work, _ = finished
    out = tmp_path / "out"
    settle = _files._settle
    left = [0]

    def full(temporary: Path, target: Path, mode: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        settle(temporary, target, mode)

    with monkeypatch.context() as patch:
        patch.setattr(_files, "_settle", full)
        for n in (0, 2, 3):
            left[0] = n
            line = refused(getattr(work, kind)(out), "cannot write ", "the disk is full", "free some space")
            assert str(out) in line
            assert not [p for p in out.rglob("*") if p.name.startswith(".")]
    assert getattr(work, kind)(out).exit_code == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"op_types": "Conv2d"}, "op_types must be a list of strings, got 'Conv2d'; write ['Conv2d']"),
        ({"op_names": "0"}, "op_names must be a list of strings, got '0'"),
        ({"quant_types": "weight"}, "quant_types must be a list of strings, got 'weight'"),
        ({"op_types": [torch.nn.Linear]}, "op_types must be a list of strings, got [the class Linear]"),
        ({"quant_bits": True}, "quant_bits of weight must be a whole number from 1 to 31, got True"),
    ],
)
def test_a_config_list_of_nni_with_a_word_for_a_list(wrong: dict[str, Any], message: str) -> None:
    entry = {"op_types": ["Linear"], "quant_types": ["weight"], "quant_bits": 8, **wrong}
    with pytest.raises(ConfigError, match=re.escape(message)):
        compile_config(torch.nn.Sequential(torch.nn.Linear(2, 2)), [entry], lambda name, target: "affine:8")


@pytest.mark.parametrize("given", ["resnet18", None, torch.nn.Linear])
def test_a_name_where_a_module_is_wanted(given: Any) -> None:
    with pytest.raises(ConfigError, match="model must be a Module, got "):
        quantize(given, "w8a8")
