"""CIFAR-10 and CIFAR-100 from the folders in which their authors publish them."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch.utils.data import DataLoader, Dataset

from torchquant._shown import shown
from torchquant.compat.autoqnn.datasets.autoaugment import CIFAR10Policy
from torchquant.compat.autoqnn.datasets.cutout import Cutout
from torchquant.errors import ConfigError, require

MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
CLASSES = ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True)
class _Layout:
    """The files of a data set, its page, and the keys of labels and of their names."""

    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    meta: str
    labels: str
    names: str

    @property
    def page(self) -> str:
        """The address at which its authors publish it."""
        return f"https://www.cs.toronto.edu/~kriz/{self.folder.replace('batches-py', 'python')}.tar.gz"


LAYOUTS = {
    "cifar10": _Layout(
        "cifar-10-batches-py",
        tuple(f"data_batch_{i}" for i in range(1, 6)),
        ("test_batch",),
        "batches.meta",
        "labels",
        "label_names",
    ),
    "cifar100": _Layout("cifar-100-python", ("train",), ("test",), "meta", "fine_labels", "fine_label_names"),
}


class _ArraysOnly(pickle.Unpickler):
    """Reads pickles of NumPy arrays, lists and strings; refuses every other class, which could run code."""

    allowed: ClassVar[set[tuple[str, str]]] = {
        *((f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")),
        *(("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"it holds a {module}.{name}")
        return super().find_class(module, name)


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            held = _ArraysOnly(file, encoding="latin1").load()
    except (pickle.UnpicklingError, EOFError, ValueError) as error:
        raise ConfigError(f"{path} is not a file of CIFAR, a pickled dictionary of arrays: {error}") from error
    if not isinstance(held, dict):
        raise ConfigError(f"{path} is not a file of CIFAR, a pickled dictionary of arrays: it holds {shown(held)}")
    return held


class CIFAR(Dataset[Any]):
    """The images of one part of CIFAR, as (transformed PIL image, label).

    `root`: the folder that holds `cifar-10-batches-py` or `cifar-100-python`. Raises ConfigError if files are missing,
    MissingDependencyError without torchvision.
    """

    def __init__(
        self, root: str | os.PathLike[str], dataset: str, train: bool, transform: Callable[[Any], Any]
    ) -> None:
        if dataset not in LAYOUTS:
            raise ConfigError(f"dataset must be one of {', '.join(LAYOUTS)}, got {shown(dataset)}")
        layout = LAYOUTS[dataset]
        folder = Path(root).expanduser() / layout.folder
        files = layout.train if train else layout.test
        missing = [name for name in (*files, layout.meta) if not (folder / name).is_file()]
        if missing:
            raise ConfigError(
                f"{folder} lacks {', '.join(missing)}. Unpack {layout.page} in {Path(root).expanduser()}, or call with "
                "download=True"
            )
        np = require("numpy", "autoqnn")
        batches = [_read(folder / name) for name in files]
        self.data = np.concatenate([b["data"] for b in batches]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        self.targets = [int(label) for batch in batches for label in batch[layout.labels]]
        self.classes = CLASSES if dataset == "cifar10" else tuple(_read(folder / layout.meta)[layout.names])
        self.transform = transform
        self._image = require("PIL.Image", "autoqnn").fromarray

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(self._image(self.data[index])), self.targets[index]


def _transforms(autoaugment: bool) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """Return what is done to images of training and of the test."""
    t = require("torchvision.transforms", "autoqnn")
    last = t.Normalize(MEAN, DEVIATION)
    shifted = [t.RandomCrop(32, padding=4, fill=128), t.RandomHorizontalFlip()]
    augmented = [CIFAR10Policy(), t.ToTensor(), Cutout(n_holes=1, length=16)] if autoaugment else [t.ToTensor()]
    return t.Compose([*shifted, *augmented, last]), t.Compose([t.ToTensor(), last])


def get_cifar_dataset(
    root: str | os.PathLike[str] = "/workspace/datasets/cifar10",
    dataset: str = "cifar10",
    autoaugment: bool = True,
    download: bool = False,
) -> tuple[CIFAR, CIFAR]:
    """Return the training and test images of "cifar10" or "cifar100", normalized; training images are augmented.

    AutoQNN downloads what is missing; here only `download=True` does, with torchvision. Raises ConfigError.
    """
    if download:
        published = require("torchvision.datasets", "autoqnn")
        getattr(published, dataset.upper())(root=root, download=True)
    train, test = _transforms(autoaugment)
    return CIFAR(root, dataset, True, train), CIFAR(root, dataset, False, test)


def get_cifar_dataloader(
    train_batch_size: int = 500,
    val_batch_size: int = 100,
    num_workers: int = 4,
    autoaugment: bool = True,
    root: str | os.PathLike[str] = "/workspace/datasets/cifar10",
    dataset: str = "cifar10",
    download: bool = False,
) -> tuple[DataLoader[Any], DataLoader[Any], tuple[str, ...]]:
    """Return loaders of the training and test images of `get_cifar_dataset`, and the names of the classes."""
    train, test = get_cifar_dataset(root, dataset, autoaugment, download)
    loaders = (
        DataLoader(train, batch_size=train_batch_size, shuffle=True, num_workers=num_workers),
        DataLoader(test, batch_size=val_batch_size, shuffle=False, num_workers=num_workers),
    )
    return *loaders, train.classes
