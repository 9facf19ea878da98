"""The data of runs: handwritten digits, CIFAR-10, or a folder of pictures.

The digits are shifted, rotated and made noisy, so that 8x8 pixels are not trivial.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from torchquant._registry import did_you_mean
from torchquant.errors import ConfigError, one_line, require

T = TypeVar("T")

AHEAD = 2
"""Number of batches that a worker prepares ahead."""
IMAGE_SIZE = 16
MAX_ANGLE = 0.35
"""Largest rotation, radians."""
MAX_SHIFT = 0.2
"""Largest shift, in half image widths."""
NOISE = 0.2
"""Standard deviation of the pixel noise; pixels are 0..1."""
CACHE = Path("~/.cache/torchquant")
DATA = ("digits", "cifar10")
"""Data sets by name; any other name is a folder of pictures."""
FOLDER_SIZE = 64
"""Side of the squares to which the pictures of a folder are resized."""


class TrainingData(Protocol):
    """Interface of data for training and testing."""

    @property
    def n_train(self) -> int:
        """Number of training images."""

    @property
    def n_channels(self) -> int:
        """Number of channels of an image: 1 or 3."""

    @property
    def n_classes(self) -> int: ...

    @property
    def test_images(self) -> Tensor: ...

    @property
    def test_labels(self) -> Tensor: ...

    def train_batches(self, generator: torch.Generator, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield one epoch of (images, labels); `generator` draws the order and the distortions."""


BATCH_SIZE = 64


class TrainBatches:
    """The training batches of an epoch, drawn anew in each iteration; `torchquant.fit` takes them.

    >>> import torchquant
    >>> batches = TrainBatches(load_digits(), seed=0)
    >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 10))
    >>> torchquant.fit(net, batches, epochs=1, learning_rate=1e-2)
    """

    def __init__(self, data: TrainingData, seed: int = 0, batch_size: int = BATCH_SIZE, workers: int = 0) -> None:
        self.data, self.batch_size, self.workers = data, batch_size, workers
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return -(-self.data.n_train // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return in_threads(batch_tasks(self.data, self.generator, self.batch_size), self.workers)


BatchTask = Callable[[], tuple[Tensor, Tensor]]
"""Makes one batch from random numbers that were drawn before."""


def batch_tasks(data: TrainingData, generator: torch.Generator, batch_size: int) -> Iterator[BatchTask]:
    """Yield what makes the batches of an epoch: random numbers are drawn in order, and any thread can do the rest."""
    tasks = getattr(data, "train_tasks", None)
    if tasks is not None:
        yield from tasks(generator, batch_size)
    else:
        for batch in data.train_batches(generator, batch_size):
            yield partial(_same, batch)


def _same(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return batch


def in_threads(tasks: Iterable[Callable[[], T]], workers: int) -> Iterator[T]:
    """Do the tasks in `workers` threads, some of them ahead, and yield the results in order; 0: in this thread.

    >>> list(in_threads([lambda: 1, lambda: 2, lambda: 3], 2))
    [1, 2, 3]
    """
    if not workers:
        yield from (task() for task in tasks)
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[T]] = deque()
        for task in tasks:
            waiting.append(pool.submit(task))
            if len(waiting) > AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@dataclass(frozen=True)
class Digits:
    """Real digits, split by image: (N, 1, 8, 8) training images and (M, 1, 16, 16) distorted test images.

    Labels are (N,) and (M,) int64. No source image is in both splits.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    n_channels: int = 1
    n_classes: int = 10

    @property
    def n_train(self) -> int:
        return len(self.train_labels)

    def train_batches(self, generator: torch.Generator, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the images and labels of `train_epoch` in batches."""
        images, labels = self.train_epoch(generator)
        yield from zip(images.split(batch_size), labels.split(batch_size), strict=True)

    def train_epoch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the training images in random order, each distorted anew, (N, 1, 16, 16), and their labels, (N,)."""
        order = torch.randperm(len(self.train_labels), generator=generator)
        return distort(self.train_images[order], generator), self.train_labels[order]


def load_digits(seed: int = 0, test_copies: int = 4) -> Digits:
    """Load scikit-learn's 1797 digits; 3/4 for training, 1/4, each distorted `test_copies` times, for testing.

    Raises MissingDependencyError without scikit-learn.
    """
    images, labels = require("sklearn.datasets", "demo").load_digits(return_X_y=True)
    split = require("sklearn.model_selection", "demo").train_test_split
    parts = split(images / 16.0, labels, test_size=0.25, stratify=labels, random_state=seed)
    train_x, test_x = (torch.tensor(part, dtype=torch.float32).view(-1, 1, 8, 8) for part in parts[:2])
    train_y, test_y = (torch.tensor(part, dtype=torch.int64) for part in parts[2:])
    generator = torch.Generator().manual_seed(seed)
    test_x, test_y = test_x.repeat(test_copies, 1, 1, 1), test_y.repeat(test_copies)
    return Digits(train_x, train_y, distort(test_x, generator), test_y)


def distort(images: Tensor, generator: torch.Generator) -> Tensor:
    """Enlarge, rotate and shift each image at random and add noise: (N, 1, 8, 8) -> (N, 1, 16, 16)."""
    n = len(images)
    angle, shift_x, shift_y = torch.rand(3, n, generator=generator) * 2 - 1
    angle, shift_x, shift_y = angle * MAX_ANGLE, shift_x * MAX_SHIFT, shift_y * MAX_SHIFT
    zoom = 0.9 + 0.4 * torch.rand(n, generator=generator)
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    matrices = torch.stack([cos, -sin, shift_x, sin, cos, shift_y], dim=1).view(n, 2, 3)
    grid = F.affine_grid(matrices, [n, 1, IMAGE_SIZE, IMAGE_SIZE], align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="zeros", align_corners=False)
    return moved + NOISE * torch.randn(moved.shape, generator=generator)


@dataclass(frozen=True)
class Pictures:
    """Colour pictures in memory: (N, 3, H, W) uint8 for training, (M, 3, H, W) normalized float for testing.

    A training batch is shifted by up to an eighth of its side and mirrored at random.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    mean: Tensor
    std: Tensor
    n_classes: int
    n_channels: int = 3

    @property
    def n_train(self) -> int:
        return len(self.train_labels)

    def train_batches(self, generator: torch.Generator, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches in a new random order, each distorted anew."""
        return (task() for task in self.train_tasks(generator, batch_size))

    def train_tasks(self, generator: torch.Generator, batch_size: int) -> Iterator[BatchTask]:
        """Yield what makes these batches; the random numbers of a batch are drawn before it is yielded."""
        for index in torch.randperm(self.n_train, generator=generator).split(batch_size):
            drawn = _draw(len(index), max(self.train_images.shape[-2] // 8, 1), generator)
            yield partial(self._batch, index, *drawn)

    def _batch(self, index: Tensor, shift: Tensor, mirrored: Tensor) -> tuple[Tensor, Tensor]:
        images = _distorted(self.train_images[index], self.mean, self.std, shift, mirrored)
        return images, self.train_labels[index]


def _normalized(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return normalized floats in the default memory format, whatever memory format the pictures have."""
    return (images.to(torch.float32, memory_format=torch.contiguous_format) / 255.0 - mean.view(3, 1, 1)) / std.view(
        3, 1, 1
    )


def _draw(n: int, margin: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw the shifts (2, n), from 0 to twice the margin, and whether a picture is mirrored, (n,)."""
    shift = torch.randint(0, 2 * margin + 1, (2, n), generator=generator)
    return shift, torch.rand(n, generator=generator) < 0.5


def _distorted(images: Tensor, mean: Tensor, std: Tensor, shift: Tensor, mirrored: Tensor) -> Tensor:
    n, _, height, width = images.shape
    margin = max(height // 8, 1)
    padded = F.pad(images, [margin] * 4)
    top, left = shift
    rows = top[:, None] + torch.arange(height)
    columns = left[:, None] + torch.arange(width)
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    picked = padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return _normalized(picked.permute(0, 3, 1, 2), mean, std)


@dataclass(frozen=True)
class Preprocessing:
    """How pictures are prepared: the middle square, of which `crop` is kept, resized to `size`; then normalized."""

    size: int = FOLDER_SIZE
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    crop: float = 1.0
    interpolation: str = "bilinear"


def make_pictures(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    n_classes: int,
    prepared: Preprocessing = Preprocessing(),  # noqa: B008 - a frozen value
) -> Pictures:
    """Make `Pictures` from (images uint8 (N, 3, H, W), labels (N,)) pairs.

    They are normalized by the mean and deviation of `prepared`, or by those of the training pictures.
    """
    sample = train[0][:10000].to(torch.float32) / 255.0
    mean, std = sample.mean((0, 2, 3)), sample.std((0, 2, 3)).clamp_min(1e-3)
    if prepared.mean is not None and prepared.std is not None:
        mean, std = torch.tensor(prepared.mean), torch.tensor(prepared.std)
    return Pictures(train[0], train[1], _normalized(test[0], mean, std), test[1], mean, std, n_classes)


def load_data(name: str, seed: int = 0, test_copies: int = 4, prepared: Preprocessing | None = None) -> TrainingData:
    """Load "digits", "cifar10", or a folder with subfolders train and test (or val), one folder of pictures per class.

    CIFAR-10 is downloaded once, to `~/.cache/torchquant` or where `TORCHQUANT_DATA` says. `prepared`: how
    pictures are prepared for pretrained weights; CIFAR-10 keeps its size, and digits stay as they are. Raises
    ConfigError, MissingDependencyError.
    """
    if name == "digits":
        return load_digits(seed, test_copies)
    if name == "cifar10":
        return _cifar10(prepared or Preprocessing())
    return _folder(Path(name), prepared or Preprocessing())


def _cifar10(prepared: Preprocessing) -> Pictures:
    datasets = require("torchvision.datasets", "all")
    root = Path(os.environ.get("TORCHQUANT_DATA", CACHE)).expanduser()
    parts = []
    for is_train in (True, False):
        try:
            found = datasets.CIFAR10(root, train=is_train, download=True)
        except (OSError, RuntimeError) as error:
            raise ConfigError(
                f"CIFAR-10 is not in {root} and could not be downloaded ({error}); put its folder cifar-10-batches-py "
                "there, or set TORCHQUANT_DATA to where it is"
            ) from error
        parts.append((torch.as_tensor(found.data).permute(0, 3, 1, 2).contiguous(), torch.as_tensor(found.targets)))
    return make_pictures(parts[0], parts[1], 10, prepared)


def _folder(root: Path, prepared: Preprocessing) -> Pictures:
    splits = {name: root / name for name in ("train", "test", "val")}
    test = splits["test"] if splits["test"].is_dir() else splits["val"]
    if not (splits["train"].is_dir() and test.is_dir()):
        hint = did_you_mean(str(root), DATA)
        raise ConfigError(
            f"data must be digits, cifar10 or a folder with the subfolders train and test (or val), each with a folder "
            f"of pictures per class; got {str(root)!r}{hint and ';'}{hint}"
        )
    datasets, image = require("torchvision.datasets", "all"), require("PIL.Image", "all")

    def read(folder: Path) -> tuple[Tensor, Tensor, list[str]]:
        try:
            found = datasets.ImageFolder(folder)
        except FileNotFoundError as error:
            raise ConfigError(f"{folder} has no pictures in folders by class: {error}") from error
        images = []
        for path, _ in found.samples:
            try:
                images.append(_square(image.open(path), image, prepared))
            except (OSError, ValueError, SyntaxError) as error:  # PIL raises several kinds of errors for damaged files
                raise ConfigError(
                    f"{path} is not a picture that can be read: {one_line(error)}; remove or replace it"
                ) from error
        return torch.stack(images), torch.as_tensor(found.targets), found.classes

    train_images, train_labels, classes = read(splits["train"])
    test_images, test_labels, test_classes = read(test)
    if classes != test_classes:
        raise ConfigError(f"the classes of {splits['train']} and {test} differ: {classes} and {test_classes}")
    return make_pictures((train_images, train_labels), (test_images, test_labels), len(classes), prepared)


def _square(picture: Any, image: Any, prepared: Preprocessing) -> Tensor:
    """Crop the middle square of a picture and resize it, in colour: (3, size, size) uint8."""
    picture, size = picture.convert("RGB"), prepared.size
    side = max(round(min(picture.size) * prepared.crop), 1)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    picture = picture.crop((left, top, left + side, top + side))
    picture = picture.resize((size, size), getattr(image, prepared.interpolation.upper()))
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(size, size, 3)
    return pixels.permute(2, 0, 1).contiguous()
