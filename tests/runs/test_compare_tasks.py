"""Networks and data of a comparison beside the demo's."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from torchquant.errors import ConfigError
from torchquant.runs.compare import Recipe, compare, make_cases
from torchquant.runs.data import load_data, make_pictures
from torchquant.runs.networks import NETWORKS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of pictures, red and blue, of several sizes."""
    root = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for split, n in (("train", 10), ("val", 4)):
        for channel, name in ((0, "red"), (2, "blue")):
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                picture = generator.integers(0, 90, (40 + i, 50, 3)).astype(np.uint8)
                picture[..., channel] += 120
                Image.fromarray(picture).save(root / split / name / f"{i}.png")
    return root


def test_a_folder_of_pictures_is_data(folder: Path) -> None:
    data = load_data(str(folder))
    assert (data.n_train, data.n_classes, data.n_channels) == (20, 2, 3)
    assert data.test_images.shape == (8, 3, 64, 64)
    batches = list(data.train_batches(torch.Generator().manual_seed(0), 8))
    assert [len(x) for x, _ in batches] == [8, 8, 4]
    again = list(data.train_batches(torch.Generator().manual_seed(0), 8))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(batches, again, strict=True))
    reds = batches[0][0][batches[0][1] == 1]
    assert bool((reds[:, 0].mean((1, 2)) > reds[:, 2].mean((1, 2))).all())


def test_distortion_moves_and_mirrors_and_nothing_else() -> None:
    image = torch.arange(1, 65, dtype=torch.uint8).view(1, 1, 8, 8).expand(1, 3, 8, 8).contiguous()
    data = make_pictures((image, torch.zeros(1, dtype=torch.int64)), (image, torch.zeros(1, dtype=torch.int64)), 1)
    original = ((data.test_images[0, 0] * data.std[0] + data.mean[0]) * 255).round()
    for seed in range(20):
        ((x, _),) = data.train_batches(torch.Generator().manual_seed(seed), 1)
        seen = ((x[0, 0] * data.std[0] + data.mean[0]) * 255).round()
        candidates = [torch.nn.functional.pad(o, [1] * 4) for o in (original, original.flip(1))]
        patches = [c.unfold(0, 8, 1).unfold(1, 8, 1).reshape(-1, 8, 8) for c in candidates]
        assert any(torch.equal(seen, patch) for part in patches for patch in part)


def test_cifar10_is_read_from_torchvision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    seen = []

    def stand_in(root: Path, train: bool, download: bool) -> SimpleNamespace:
        seen.append((root, train, download))
        n = 30 if train else 10
        return SimpleNamespace(data=np.full((n, 32, 32, 3), 7, np.uint8), targets=[i % 10 for i in range(n)])

    monkeypatch.setenv("TORCHQUANT_DATA", str(tmp_path))
    monkeypatch.setattr(datasets, "CIFAR10", stand_in)
    data = load_data("cifar10")
    assert (data.n_train, data.n_classes) == (30, 10)
    assert data.test_images.shape == (10, 3, 32, 32)
    assert seen == [(tmp_path, True, True), (tmp_path, False, True)]

    def offline(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(datasets, "CIFAR10", offline)
    with pytest.raises(ConfigError, match="could not be downloaded .no route to host.; put its folder"):
        load_data("cifar10")


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_starts_as_the_float_one(name: str, folder: Path) -> None:
    from torchquant import make_quantizer

    kind = NETWORKS[name]
    for data in (load_data(str(folder)), load_data("digits", test_copies=1)):
        network = kind.build(data).eval()
        model = kind.quantize(
            network, lambda m: make_quantizer("affine:8"), lambda m: make_quantizer("affine:8", "output"), "rescale"
        )
        x = data.test_images[:2]
        assert torch.equal(model(x), network(x))
        assert model(x).shape == (2, data.n_classes)


def test_a_comparison_on_a_folder_with_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    data = load_data(str(folder))
    network = NETWORKS["demo"].build(data)
    torch.save(network.state_dict(), tmp_path / "float.pt")
    recipe = Recipe("demo", str(folder), epochs=1, calibration_batches=1, checkpoint=str(tmp_path / "float.pt"))
    (result,) = compare(make_cases(["affine"], [8], [8], 1), recipe, tmp_path / "out")
    assert 0.0 <= result.accuracy <= 1.0
    stored = torch.load(tmp_path / "out" / "float-seed0.pt", weights_only=True)
    assert all(torch.equal(stored[key], value) for key, value in network.state_dict().items())
    torch.save({"other": torch.zeros(1)}, tmp_path / "wrong.pt")
    wrong = Recipe("demo", str(folder), checkpoint=str(tmp_path / "wrong.pt"))
    with pytest.raises(ConfigError, match="does not hold the state_dict of this network"):
        compare(make_cases(["affine"], [8], [8], 1), wrong, tmp_path / "out2")


def test_bad_folders_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a folder with the subfolders train and test"):
        load_data(str(tmp_path))
    (tmp_path / "train").mkdir()
    (tmp_path / "test").mkdir()
    with pytest.raises(ConfigError, match="has no pictures in folders by class"):
        load_data(str(tmp_path))
