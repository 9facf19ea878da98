"""AutoQNN's data, on a few generated images in the files of CIFAR and the folders of ImageNet."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from torchquant.compat.autoqnn import datasets
from torchquant.compat.autoqnn.datasets.base import DataLoaderX, data_prefetcher
from torchquant.compat.autoqnn.datasets.cutout import Cutout
from torchquant.compat.autoqnn.datasets.imagenet import PARSE_TYPES, to_one_hot
from torchquant.errors import ConfigError

pytest.importorskip("torchvision")
from PIL import Image

PER_FILE = 4


def pixels(n: int = PER_FILE, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (n, 3072), dtype=np.uint8)


def write_cifar(root: Path, dataset: str = "cifar10") -> Path:
    """Write the files of CIFAR with `PER_FILE` images each."""
    is_ten = dataset == "cifar10"
    folder = root / ("cifar-10-batches-py" if is_ten else "cifar-100-python")
    folder.mkdir(parents=True)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"] if is_ten else ["train", "test"]
    for i, name in enumerate(names):
        labels = {"labels" if is_ten else "fine_labels": [(i + j) % 10 for j in range(PER_FILE)]}
        (folder / name).write_bytes(pickle.dumps({"data": pixels(seed=i), **labels}, protocol=2))
    meta = {"label_names" if is_ten else "fine_label_names": [f"class {i}" for i in range(10 if is_ten else 100)]}
    (folder / ("batches.meta" if is_ten else "meta")).write_bytes(pickle.dumps(meta, protocol=2))
    return root


def test_cifar_from_its_files(tmp_path: Path) -> None:
    root = write_cifar(tmp_path)
    train, test, classes = datasets.cifar.get_cifar_dataloader(8, 4, num_workers=0, root=root)
    assert (len(train.dataset), len(test.dataset), classes[:2]) == (20, 4, ("plane", "car"))
    images, labels = next(iter(test))
    raw = torch.from_numpy(pixels(seed=5)).view(-1, 3, 32, 32) / 255.0
    mean, deviation = (torch.tensor(n).view(3, 1, 1) for n in (datasets.cifar.MEAN, datasets.cifar.DEVIATION))
    torch.testing.assert_close(images, (raw - mean) / deviation)
    assert labels.tolist() == [5, 6, 7, 8]
    seen = [batch[0].shape for batch in train]
    assert seen == [(8, 3, 32, 32), (8, 3, 32, 32), (4, 3, 32, 32)]
    plain, _ = datasets.cifar.get_cifar_dataset(root, autoaugment=False)
    assert not any(isinstance(step, Cutout) for step in plain.transform.transforms)


def test_cifar_100_has_its_own_classes(tmp_path: Path) -> None:
    root = write_cifar(tmp_path, "cifar100")
    train, _, classes = datasets.cifar.get_cifar_dataloader(num_workers=0, root=root, dataset="cifar100")
    assert (len(train.dataset), len(classes), classes[99]) == (4, 100, "class 99")


def test_missing_data_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cifar-10-batches-py lacks data_batch_1, .*Unpack https://www.cs.toronto"):
        datasets.cifar.get_cifar_dataloader(root=tmp_path)
    with pytest.raises(ConfigError, match="dataset must be one of cifar10, cifar100, got 'mnist'"):
        datasets.cifar.get_cifar_dataset(tmp_path, "mnist")
    with pytest.raises(ConfigError, match=r"train must hold a folder of images for each class of ImageNet"):
        datasets.imagenet.get_dataset(tmp_path)


def test_a_pickle_that_could_run_code_is_refused(tmp_path: Path) -> None:
    root = write_cifar(tmp_path)
    (root / "cifar-10-batches-py" / "test_batch").write_bytes(pickle.dumps({"data": Path("x")}))
    with pytest.raises(ConfigError, match=r"test_batch is not a file of CIFAR.*it holds a pathlib"):
        datasets.cifar.get_cifar_dataset(root)


def write_imagenet(root: Path) -> Path:
    for part in ("train", "val"):
        for name in ("n01", "n02"):
            (root / part / name).mkdir(parents=True)
            for i in range(2):
                Image.fromarray(pixels(1, i).reshape(32, 32, 3)).resize((300, 280)).save(
                    root / part / name / f"{i}.png"
                )
    return root


def test_imagenet_from_its_folders(tmp_path: Path) -> None:
    root = write_imagenet(tmp_path)
    train, val = datasets.imagenet.get_dataset(root, batch_size=3, workers=0, prefetch=True)
    assert isinstance(train, DataLoaderX)
    assert [batch[0].shape for batch in train] == [(3, 3, 224, 224), (1, 3, 224, 224)]
    images, labels = next(iter(val))
    assert labels.tolist() == [0, 0, 1]
    _, plain = datasets.imagenet.get_dataset(root, 3, 0, parse_type="mine", mean_std=((0, 0, 0), (1, 1, 1)))
    raw, _ = next(iter(plain))
    mean, deviation = (torch.tensor(n).view(3, 1, 1) for n in PARSE_TYPES["torch"])
    torch.testing.assert_close(images, (raw - mean) / deviation)
    assert raw.min() >= 0
    assert to_one_hot(labels, 2).tolist() == [[1, 0], [1, 0], [0, 1]]
    (root / "val" / "n02").rename(root / "val" / "n03")
    with pytest.raises(ConfigError, match="number their classes differently: n02, n03"):
        datasets.imagenet.get_dataset(root)


def test_images_of_val_are_sorted(tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "val" / name).write_bytes(b"")
    with pytest.raises(ConfigError, match=r"lacks val.txt and synsets.txt, which say where the images"):
        datasets.imagenet.mvVal2ValFolders(tmp_path)
    (tmp_path / "val.txt").write_text("a.png 1\nb.png 0\n")
    (tmp_path / "synsets.txt").write_text("n01\nn02\n")
    assert [datasets.imagenet.mvVal2ValFolders(tmp_path) for _ in range(2)] == [2, 0]
    assert (tmp_path / "val" / "n02" / "a.png").is_file()
    (tmp_path / "val.txt").write_text("c.png 1\n")
    with pytest.raises(ConfigError, match=r"val.txt lists c.png, which is neither"):
        datasets.imagenet.mvVal2ValFolders(tmp_path)


def test_cutout_sets_squares_to_zero() -> None:
    image = torch.ones(3, 32, 32)
    cut = Cutout(n_holes=1, length=8)(image)
    assert torch.equal(image, torch.ones(3, 32, 32))
    hole = (cut == 0).all(0)
    rows, columns = hole.any(1).nonzero().flatten(), hole.any(0).nonzero().flatten()
    assert torch.equal((cut == 0).any(0), hole)
    assert int(hole.sum()) == len(rows) * len(columns)
    assert 4 <= len(rows) <= 8
    assert torch.equal(Cutout(0, 8)(image), image)


@pytest.mark.parametrize("name", ["CIFAR10Policy", "ImageNetPolicy", "SVHNPolicy"])
def test_policies_are_torchvisions(name: str) -> None:
    from torchvision.transforms import AutoAugment

    policy = getattr(datasets.autoaugment, name)(fillcolor=(1, 2, 3))
    assert isinstance(policy.transform, AutoAugment)
    image = Image.fromarray(pixels(1).reshape(32, 32, 3))
    torch.manual_seed(0)
    seen = {policy(image).tobytes() for _ in range(10)}
    assert len(seen) > 1
    assert repr(policy).startswith("AutoAugment ")


def test_loaders_read_ahead_and_give_every_batch() -> None:
    class Numbers(torch.utils.data.Dataset[Tensor]):
        def __len__(self) -> int:
            return 7

        def __getitem__(self, i: int) -> Tensor:
            return torch.tensor(i)

    assert [batch.tolist() for batch in DataLoaderX(Numbers(), batch_size=3)] == [[0, 1, 2], [3, 4, 5], [6]]
    ahead = data_prefetcher([(torch.tensor(i), torch.tensor(-i)) for i in range(2)])
    assert [tuple(map(int, ahead.next())) for _ in range(2)] == [(0, 0), (1, -1)]  # type: ignore[arg-type]
    assert ahead.next() == (None, None)
