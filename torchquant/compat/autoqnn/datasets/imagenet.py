"""ImageNet from folders train and val with one folder for each class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from torchquant.compat.autoqnn.datasets.base import DataLoaderX
from torchquant.errors import ConfigError, require

Numbers = Sequence[float]
PARSE_TYPES: dict[str, tuple[Numbers, Numbers]] = {
    "caffe": ((0.485, 0.456, 0.406), (1 / 255.0,) * 3),
    "tf": ((0.5,) * 3, (0.5,) * 3),
    "torch": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
"""Name -> (mean, deviation) of each colour, which normalize an image."""


def check_idx(train_dataset: Any, val_dataset: Any) -> None:
    """Raise ConfigError unless both data sets give the classes the same numbers."""
    train, val = train_dataset.class_to_idx, val_dataset.class_to_idx
    differing = sorted(name for name in train.keys() | val.keys() if train.get(name) != val.get(name))
    if differing:
        raise ConfigError(f"train and val number their classes differently: {', '.join(differing[:3])}")


def mvVal2ValFolders(data_path: str | os.PathLike[str]) -> int:  # noqa: N802 - published name
    """Move the images of `data_path`/val into a folder for each class; return how many were moved.

    `data_path`/val.txt has a line "image label" for each, `data_path`/synsets.txt the name of a class in each line.
    Images that lie in their folder already stay there. Raises ConfigError.
    """
    root = Path(data_path)
    missing = [name for name in ("val.txt", "synsets.txt") if not (root / name).is_file()]
    if missing:
        raise ConfigError(f"{root} lacks {' and '.join(missing)}, which say where the images of val belong")
    folders = (root / "synsets.txt").read_text(encoding="utf-8").split()
    n_moved = 0
    for line in (root / "val.txt").read_text(encoding="utf-8").splitlines():
        image, label = line.split()
        source, target = root / "val" / image, root / "val" / folders[int(label)] / image
        if target.is_file():
            continue
        if not source.is_file():
            raise ConfigError(f"{root / 'val.txt'} lists {image}, which is neither {source} nor {target}")
        target.parent.mkdir(exist_ok=True)
        source.rename(target)
        n_moved += 1
    return n_moved


def to_one_hot(x: Tensor, num_classes: int) -> Tensor:
    """Return labels as rows with a single 1."""
    return torch.nn.functional.one_hot(x, num_classes)


def get_dataset(
    data_path: str | os.PathLike[str],
    batch_size: int = 256,
    workers: int = 8,
    parse_type: str = "torch",
    mean_std: tuple[Numbers, Numbers] = ((0, 0, 0), (1, 1, 1)),
    prefetch: bool = False,
) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Return loaders of the images below `data_path`/train, augmented, and `data_path`/val, both 224 x 224.

    `parse_type` "torch", "tf" or "caffe" normalizes as these do, any other name by `mean_std`. `prefetch`: read one
    batch ahead. Raises ConfigError if a folder is missing, MissingDependencyError without torchvision.
    """
    t = require("torchvision.transforms", "autoqnn")
    datasets = require("torchvision.datasets", "autoqnn")
    for part in ("train", "val"):
        if not any((Path(data_path) / part).glob("*/*")):
            raise ConfigError(
                f"{Path(data_path) / part} must hold a folder of images for each class of ImageNet, and holds none. "
                "Unpack the images of https://www.image-net.org there, val sorted into the folders of train"
            )
    last = [t.ToTensor(), t.Normalize(*PARSE_TYPES.get(parse_type, mean_std))]
    augmented = t.Compose([t.RandomResizedCrop(224), t.RandomHorizontalFlip(), *last])
    train = datasets.ImageFolder(Path(data_path) / "train", augmented)
    val = datasets.ImageFolder(Path(data_path) / "val", t.Compose([t.Resize(256), t.CenterCrop(224), *last]))
    check_idx(train, val)
    loader = DataLoaderX if prefetch else DataLoader
    common: dict[str, Any] = {"batch_size": batch_size, "num_workers": workers, "pin_memory": torch.cuda.is_available()}
    return loader(train, shuffle=True, **common), loader(val, shuffle=False, **common)
