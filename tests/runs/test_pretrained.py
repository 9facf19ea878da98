"""Float models that start from pretrained weights: by name from a local file, from a file, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from torchquant import cli
from torchquant.errors import ConfigError
from torchquant.runs.data import Pictures, Preprocessing, load_data
from torchquant.runs.export import export_run, load_run
from torchquant.runs.networks import Gray, build_model, model_for
from torchquant.runs.pretrained import check_weights, known_weights, load_weights, preprocessing_of, source_of
from torchquant.runs.quantize import JobConfig, check_job, run_job

torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")
MODEL = "squeezenet1_1"
"""The smallest model of torchvision with a file of its own."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """A folder of downloads that has the weights of `MODEL` by name; no network is asked."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    url = torchvision.models.get_model_weights(MODEL)["DEFAULT"].url
    path = tmp_path / "torch" / "hub" / "checkpoints" / url.rpartition("/")[2]
    path.parent.mkdir(parents=True)
    torch.manual_seed(7)
    state: dict[str, Tensor] = torchvision.models.get_model(MODEL).state_dict()
    torch.save(state, path)
    return state


def unreachable(*args: Any, **options: Any) -> None:
    raise OSError("Network is unreachable")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of pictures of 80 x 64 pixels."""
    image = pytest.importorskip("PIL.Image")
    for split, n in (("train", 3), ("test", 2)):
        for shade, kind in ((40, "dark"), (200, "light")):
            place = tmp_path / "pictures" / split / kind
            place.mkdir(parents=True)
            for i in range(n):
                image.new("RGB", (80, 64), (shade, shade + i, shade)).save(place / f"{i}.png")
    return tmp_path / "pictures"


def test_names_of_models_and_weights() -> None:
    assert source_of("timm:resnet18") == ("timm", "resnet18")
    assert source_of("torchvision:resnet18") == source_of("resnet18") == ("torchvision", "resnet18")
    assert source_of("demo") == ("", "demo")
    assert "IMAGENET1K_V1" in known_weights("torchvision", "resnet18")
    assert "a1_in1k" in known_weights("timm", "resnet18")
    data = load_data("digits", 0, 1)
    assert type(build_model("timm:resnet18", data)).__module__ == "timm.models.resnet"
    published = build_model("torchvision:resnet18", data)
    assert isinstance(published, Gray)
    assert published.network.conv1.kernel_size == (7, 7)  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="no model 'timm:resnet1' in torchvision or timm; did you mean 'resnet"):
        build_model("timm:resnet1", data)


@pytest.mark.parametrize(
    ("model", "weights", "message"),
    [
        ("resnet18", "IMAGENET1K_V2", "weights must be one of DEFAULT, .*; did you mean 'IMAGENET1K_V1'"),
        ("timm:resnet18", "a1_in2k", "did you mean 'a1_in1k'"),
        ("demo", "DEFAULT", "demo is not a model of torchvision or timm, so it has no weights by name"),
        ("own.py:net", "weights.pt", "there is no file 'weights.pt'; give the path of a state dict"),
    ],
)  # fmt: skip
def test_weights_that_are_not_there(model: str, weights: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_weights(model, weights)


def test_pictures_are_prepared_as_for_the_weights(folder: Path) -> None:
    ours = preprocessing_of("resnet18", "DEFAULT")
    assert ours == Preprocessing(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 224 / 256, "bilinear")
    theirs = preprocessing_of("timm:resnet18", "a1_in1k")
    assert theirs is not None
    assert (theirs.size, theirs.crop, theirs.interpolation) == (224, 0.95, "bicubic")
    assert preprocessing_of("resnet18", None) is None
    data = load_data(str(folder), prepared=theirs)
    assert isinstance(data, Pictures)
    assert data.test_images.shape == (4, 3, 224, 224)
    expected = (40 / 255 - 0.485) / 0.229
    assert float(data.test_images[0, 0].mean()) == pytest.approx(expected, abs=1e-4)


def test_a_classifier_of_other_classes_is_new_and_the_rest_is_loaded(hub: dict[str, Tensor]) -> None:
    data = load_data("digits", 0, 1)
    config = JobConfig(MODEL, weights="DEFAULT")
    net = model_for(config, data)
    assert load_weights(net, MODEL, "DEFAULT") == ["classifier.1.weight", "classifier.1.bias"]
    loaded = net.network.state_dict()  # type: ignore[operator, union-attr]
    assert all(torch.equal(value, hub[name]) for name, value in loaded.items() if "classifier" not in name)
    with pytest.raises(ConfigError, match="classifier.1.weight, classifier.1.bias has other classes in the weights"):
        check_job(JobConfig(MODEL, weights="DEFAULT", float_epochs=0))


def test_weights_of_another_model_are_refused(hub: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(hub, tmp_path / "other.pt")
    data = load_data("digits", 0, 1)
    for model, message in (("resnet18", "are not of resnet18: they lack "), ("demo", "are not of demo: they lack ")):
        config = JobConfig(model, weights=str(tmp_path / "other.pt"))
        with pytest.raises(ConfigError, match=message):
            load_weights(model_for(config, data), model, str(tmp_path / "other.pt"))
    with pytest.raises(ConfigError, match="checkpoint and weights were both given"):
        JobConfig("demo", weights="a.pt", checkpoint="b.pt")


@pytest.mark.parametrize("model", ["resnet18", "timm:resnet18"])
def test_without_a_network_the_message_says_which_file_goes_where(
    model: str, hub: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timm, "create_model", unreachable)
    where = "put https://download.pytorch.org/models/resnet18-" if model == "resnet18" else "download timm/resnet18"
    with pytest.raises(ConfigError, match=f"not on this machine and could not be downloaded .*unreachable.*; {where}"):
        load_weights(torch.nn.Linear(1, 1), model, "DEFAULT")


def test_a_run_starts_from_weights_and_its_export_is_of_the_same_network(
    hub: dict[str, Tensor], folder: Path, tmp_path: Path
) -> None:
    state = {name: value for name, value in hub.items() if "classifier" not in name}
    torch.manual_seed(0)
    state |= {"classifier.1.weight": torch.randn(2, 512, 1, 1) * 0.1, "classifier.1.bias": torch.zeros(2)}
    torch.save(state, tmp_path / "weights.pt")
    given = JobConfig(MODEL, data=str(folder), weights=str(tmp_path / "weights.pt"), float_epochs=0,
                      calibration_batches=1)  # fmt: skip
    run_job(given, tmp_path / "out")
    kept = torch.load(tmp_path / "out" / "float.pt", weights_only=True)
    assert all(torch.equal(value, kept[name]) for name, value in state.items())
    assert str(tmp_path / "weights.pt") in json.loads((tmp_path / "out" / "config.json").read_text())["contents"]
    _, data, config = load_run(tmp_path / "out")
    assert config.weights == given.weights
    assert data.test_images.shape[-1] == 224
    assert export_run(tmp_path / "out", "packed").bytes < 2e6


def test_a_model_that_starts_from_random_weights_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchquant.runs.quantize._run", unreachable)
    words = ["quantize", "mobilenet_v2", "--out", str(tmp_path / "out")]
    told = CliRunner().invoke(cli.build_app(), words, env={"COLUMNS": "300", "TERM": "dumb"}).output
    assert "mobilenet_v2 starts from RANDOM weights and is trained for 30 epochs on digits in float" in told
    assert "--weights takes pretrained ones, --checkpoint your own" in told
