"""The main job, run once: everything it promises is checked on what it left behind."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.browser import Browser, check_opened, check_whole
from torchquant import QModuleState
from torchquant._files import write_json, write_whole
from torchquant.analysis.sections import wilson
from torchquant.deploy import run_onnx
from torchquant.errors import ConfigError
from torchquant.report import Page
from torchquant.runs.console import NullProgress, Terminal
from torchquant.runs.data import distort, load_digits
from torchquant.runs.demo import SCHEMES, DemoConfig, DemoResult, run_demo
from torchquant.runs.demo import run as demo_run
from torchquant.runs.demo.report import DRAWN
from torchquant.runs.loop import accuracy, predict
from torchquant.runs.small_resnet import SmallResNet

TINY = DemoConfig(seed=3, float_epochs=1, long_epochs=1, short_epochs=1, test_copies=1, calibration_batches=2)


class Recorder(NullProgress):
    def __init__(self) -> None:
        self.total = self.done = 0.0
        self.messages: list[str] = []

    def start(self, total: float) -> None:
        self.total = total

    def advance(self, amount: float, doing: str) -> None:
        self.done += amount

    def message(self, text: str) -> None:
        self.messages.append(text)


class Run:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.show = Recorder()
        self.random_state = torch.random.get_rng_state()
        self.result: DemoResult = run_demo(DemoConfig.preset(quick=True), folder, self.show)
        self.random_state_after = torch.random.get_rng_state()
        self.json: dict[str, Any] = json.loads((folder / "results.json").read_text())
        self.html = (folder / "report.html").read_text()


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("demo") / "new" / "out")


@pytest.fixture(scope="module")
def images() -> tuple[Tensor, Tensor]:
    data = load_digits(0, DemoConfig.preset(quick=True).test_copies)
    return data.test_images, data.test_labels


def test_all_files_are_there_and_no_other(quick: Run) -> None:
    checkpoints = {f"{scheme.name}.pt" for scheme in SCHEMES} | {"float.pt"}
    files = {"report.html", "results.json", "w8a8.onnx", "certificate.json", "certificate.txt"}
    assert {p.name for p in quick.folder.iterdir()} == checkpoints | files


def test_the_certificate_passes_without_a_single_difference(quick: Run) -> None:
    certificate = quick.result.onnx.certificate
    assert certificate.passed
    assert certificate.comparisons[0].differ == 0
    assert quick.json["onnx"]["certificate"]["sha256"] == certificate.sha256


def test_accuracies_are_sane(quick: Run) -> None:
    row = quick.result.row
    assert 0.8 < row("float").accuracy < 0.99
    assert row("w8a8-ptq").accuracy == pytest.approx(row("float").accuracy, abs=0.01)
    assert row("qfmt8-ptq").accuracy == pytest.approx(row("float").accuracy, abs=0.02)
    assert row("w4a4-ptq").accuracy < row("float").accuracy - 0.01
    assert row("esb-qat").accuracy > row("float").accuracy - 0.05
    assert row("ternary-qat").accuracy > 0.6


def test_training_beats_calibration_at_4_bits(quick: Run) -> None:
    assert quick.result.row("w4a4-qat").accuracy > quick.result.row("w4a4-ptq").accuracy


def test_weight_bytes(quick: Run) -> None:
    elements = sum(p.numel() for p in SmallResNet().parameters() if p.ndim > 1)
    channels = sum(p.shape[0] for p in SmallResNet().parameters() if p.ndim > 1)
    row = quick.result.row
    assert row("float").weight_bytes == 4 * elements
    assert row("w8a8-ptq").weight_bytes == elements + 4 * channels
    assert row("w4a4-qat").weight_bytes == elements // 2 + 4 * channels
    assert row("ternary-qat").weight_bytes == elements // 4 + 4 * channels


def test_onnx_runtime_computes_the_same(quick: Run, images: tuple[Tensor, Tensor]) -> None:
    onnx = quick.result.onnx
    assert onnx.same_top1 > 0.99
    assert onnx.simulated_accuracy == quick.result.row("w8a8-ptq").accuracy
    assert accuracy(run_onnx(quick.folder / "w8a8.onnx", images[0]), images[1]) == onnx.accuracy
    assert onnx.file_bytes < quick.result.row("float").weight_bytes


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_checkpoint_loads_strictly_and_gives_the_accuracy(
    quick: Run, images: tuple[Tensor, Tensor], scheme: Any
) -> None:
    model = scheme.build(SmallResNet()).eval()
    model.load_state_dict(torch.load(quick.folder / f"{scheme.name}.pt", weights_only=True), strict=True)
    assert model.conv.state is QModuleState.QUANT_EVAL
    assert accuracy(predict(model, images[0]), images[1]) == quick.result.row(scheme.name).accuracy


def test_float_checkpoint_gives_the_accuracy(quick: Run, images: tuple[Tensor, Tensor]) -> None:
    network = SmallResNet()
    network.load_state_dict(torch.load(quick.folder / "float.pt", weights_only=True), strict=True)
    assert accuracy(predict(network, images[0]), images[1]) == quick.result.row("float").accuracy


def test_results_json_has_what_python_has(quick: Run) -> None:
    assert quick.json == json.loads(json.dumps(quick.result.to_dict()))
    assert quick.json["config"]["command"] == "torchquant demo --seed 0 --quick"
    assert {"float", "onnx", *(s.name for s in SCHEMES)} <= set(quick.json["seconds"])
    paths = [layer["path"] for layer in quick.json["layers"]["w4a4-qat"]]
    assert (paths[0], paths[-1], len(paths)) == ("conv", "fc", 21)


def test_more_bits_mean_less_noise_in_every_layer(quick: Run) -> None:
    eight, four = quick.result.layers["w8a8-ptq"], quick.result.layers["w4a4-ptq"]
    for site in ("weight", "output"):
        pairs = [(getattr(a, site), getattr(b, site)) for a, b in zip(eight, four, strict=True) if getattr(a, site)]
        assert len(pairs) >= 15
        assert all(a.sqnr_db > b.sqnr_db + 10 for a, b in pairs)
        assert all(b.quantized.unique().numel() <= 16 for _, b in pairs if site == "output")


def test_report_is_one_self_contained_file(quick: Run) -> None:
    check_whole(quick.html)
    assert quick.html.count('id="plotly"') == 1
    assert len(quick.html) < 4_000_000


def test_report_shows_the_results(quick: Run) -> None:
    for row in quick.result.rows:
        low, high = wilson(row.accuracy, 1800)
        accuracy = f">{row.title}</td><td>{row.accuracy:.2%}</td>"
        assert accuracy in quick.html
        assert f">{low:.2%} to {high:.2%}</td><td>{row.weight_bytes:,}</td>" in quick.html
    assert f"<b>{quick.result.onnx.same_top1:.2%}</b>of test images: same class" in quick.html
    assert f">{quick.result.layers['w8a8-ptq'][0].weight.sqnr_db:.1f} dB</td>" in quick.html
    assert "ORT, integer kernels: 0 of " in quick.html
    assert "torchquant demo --seed 0 --quick" in quick.html
    assert f"torch {torch.__version__}" in quick.html
    assert {name: len(points) for name, points in quick.result.losses.items()} == {
        **{"float": 8, "W4A4, QAT": 4, "ESB(4,1) weights, A8, QAT": 1, "ternary weights, A8, QAT": 1}
    }


def test_report_in_a_browser(quick: Run, browser: Browser) -> None:
    found = check_opened(browser, quick.folder / "report.html", "demo")
    assert [len(graph["names"]) for graph in found.graphs] == [21] * len(DRAWN)
    assert all("fc" in graph["shown"] and "weight" in graph["text"] for graph in found.graphs)
    assert all(graph["paths"] == 25 for graph in found.graphs)


def test_progress_reaches_the_end(quick: Run) -> None:
    assert quick.show.done == quick.show.total
    assert len(quick.show.messages) == len(SCHEMES) + 3


def test_callers_random_state_is_left_alone(quick: Run) -> None:
    assert torch.equal(quick.random_state, quick.random_state_after)


@pytest.mark.slow
def test_same_seed_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_run, "demo_page", lambda *args: Page("pictures take time", []))
    torch.manual_seed(1)
    first = run_demo(TINY, tmp_path / "a").to_dict()
    torch.manual_seed(2)
    second = run_demo(TINY, tmp_path / "b", Terminal()).to_dict()
    assert {**first, "seconds": None} == {**second, "seconds": None}
    assert set(first["seconds"]) == set(second["seconds"])


def test_data_is_split_by_image_and_depends_on_the_seed() -> None:
    data, again, other = load_digits(0, 1), load_digits(0, 1), load_digits(1, 1)
    assert torch.equal(data.test_images, again.test_images)
    assert not torch.equal(data.test_images, other.test_images)
    assert (data.train_images.shape, data.test_images.shape) == ((1347, 1, 8, 8), (450, 1, 16, 16))
    assert data.test_labels.bincount().min() >= 43


def test_epochs_differ_and_keep_labels() -> None:
    data = load_digits(0, 1)
    generator = torch.Generator().manual_seed(0)
    (first, first_labels), (second, _) = data.train_epoch(generator), data.train_epoch(generator)
    assert first.shape == (1347, 1, 16, 16)
    assert not torch.equal(first, second)
    assert torch.equal(first_labels.bincount(), data.train_labels.bincount())


def test_distort_moves_but_keeps_the_picture() -> None:
    images = torch.ones(500, 1, 8, 8)
    distorted = distort(images, torch.Generator().manual_seed(0))
    assert distorted[:, :, 6:10, 6:10].mean() == pytest.approx(1.0, abs=0.02)
    assert distorted[:, :, 0, 0].mean() < 0.6


@pytest.mark.parametrize("wrong", [{"seed": -1}, {"seed": 2**32}, {"float_epochs": 0}, {"test_copies": -1}])
def test_config_refuses(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))} must be .*got {next(iter(wrong.values()))}"):
        DemoConfig(**wrong)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_json(path, {"a": 1})

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_whole(path, fail)
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(path, {"a": math.inf})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]
