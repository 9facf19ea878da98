"""The networks and the data that a comparison knows, and how the one is fitted to the other."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchquant.demo.data import TrainingData, load_digits
from torchquant.demo.mobilenet import SmallMobileNetV2
from torchquant.demo.network import QuantSmallResNet, SmallResNet
from torchquant.errors import ConfigError, one_line, require
from torchquant.plan import quantize
from torchquant.quantizers import QuantizerFactory

CACHE = Path("~/.cache/torchquant")
DATA = ("digits", "cifar10")
"""Data by name; all else is a folder of pictures."""
FOLDER_SIZE = 64
"""Side of the squares that the pictures of a folder are brought to."""
SMALL = 64
"""Side up to which a ResNet begins with a 3x3 convolution and without pooling, as is usual for CIFAR."""


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
        """Batches of a new random order, each newly distorted."""
        for index in torch.randperm(self.n_train, generator=generator).split(batch_size):
            yield _distorted(self.train_images[index], self.mean, self.std, generator), self.train_labels[index]


def _normalized(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Floats in the default memory format, whatever that of the pictures."""
    return (images.to(torch.float32, memory_format=torch.contiguous_format) / 255.0 - mean.view(3, 1, 1)) / std.view(
        3, 1, 1
    )


def _distorted(images: Tensor, mean: Tensor, std: Tensor, generator: torch.Generator) -> Tensor:
    n, _, height, width = images.shape
    margin = max(height // 8, 1)
    padded = F.pad(images, [margin] * 4)
    top, left = torch.randint(0, 2 * margin + 1, (2, n), generator=generator)
    rows = top[:, None] + torch.arange(height)
    columns = left[:, None] + torch.arange(width)
    mirrored = torch.rand(n, generator=generator) < 0.5
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    picked = padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return _normalized(picked.permute(0, 3, 1, 2), mean, std)


def make_pictures(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], n_classes: int) -> Pictures:
    """`Pictures` of (images uint8 (N, 3, H, W), labels (N,)) pairs; normalized by the moments of the training ones."""
    sample = train[0][:10000].to(torch.float32) / 255.0
    mean, std = sample.mean((0, 2, 3)), sample.std((0, 2, 3)).clamp_min(1e-3)
    return Pictures(train[0], train[1], _normalized(test[0], mean, std), test[1], mean, std, n_classes)


def load_data(name: str, seed: int = 0, test_copies: int = 4) -> TrainingData:
    """ "digits", "cifar10", or a folder with the subfolders train and test (or val), a folder of pictures a class.

    CIFAR-10 is downloaded once, to `~/.cache/torchquant` or where `TORCHQUANT_DATA` says. Raises ConfigError,
    MissingDependencyError.
    """
    if name == "digits":
        return load_digits(seed, test_copies)
    if name == "cifar10":
        return _cifar10()
    return _folder(Path(name))


def _cifar10() -> Pictures:
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
    return make_pictures(parts[0], parts[1], 10)


def _folder(root: Path) -> Pictures:
    splits = {name: root / name for name in ("train", "test", "val")}
    test = splits["test"] if splits["test"].is_dir() else splits["val"]
    if not (splits["train"].is_dir() and test.is_dir()):
        raise ConfigError(
            f"data must be digits, cifar10 or a folder with the subfolders train and test (or val), each with a folder "
            f"of pictures a class; got {str(root)!r}"
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
                images.append(_square(image.open(path), image))
            except (OSError, ValueError, SyntaxError) as error:  # PIL has its own words for what is damaged
                raise ConfigError(f"{path} is not a picture that can be read: {one_line(error)}") from error
        return torch.stack(images), torch.as_tensor(found.targets), found.classes

    train_images, train_labels, classes = read(splits["train"])
    test_images, test_labels, test_classes = read(test)
    if classes != test_classes:
        raise ConfigError(f"the classes of {splits['train']} and {test} differ: {classes} and {test_classes}")
    return make_pictures((train_images, train_labels), (test_images, test_labels), len(classes))


def _square(picture: Any, image: Any) -> Tensor:
    """The middle square of a picture, in colour, (3, FOLDER_SIZE, FOLDER_SIZE) uint8."""
    picture = picture.convert("RGB")
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    picture = picture.crop((left, top, left + side, top + side)).resize((FOLDER_SIZE, FOLDER_SIZE), image.BILINEAR)
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(FOLDER_SIZE, FOLDER_SIZE, 3)
    return pixels.permute(2, 0, 1).contiguous()


@dataclass(frozen=True)
class Network:
    """A network by name: how it is built for data, how it is made quantizable, and its learning rates."""

    build: Callable[[TrainingData], nn.Module]
    quantize: Callable[[nn.Module, QuantizerFactory, QuantizerFactory, bool | str], nn.Module]
    float_rate: float
    rate: float


def _small(data: TrainingData) -> nn.Module:
    return SmallResNet(n_channels=data.n_channels, n_classes=data.n_classes)


def _quantized_small(
    network: nn.Module, weight: QuantizerFactory, acts: QuantizerFactory, fold_bn: bool | str
) -> nn.Module:
    assert isinstance(network, SmallResNet)
    return QuantSmallResNet(network, weight, acts, fold_bn)


def _small_mobilenet(data: TrainingData) -> nn.Module:
    return SmallMobileNetV2(n_channels=data.n_channels, n_classes=data.n_classes)


def _by_plan(network: nn.Module, weight: QuantizerFactory, acts: QuantizerFactory, fold_bn: bool | str) -> nn.Module:
    """Quantized wherever `quantize` finds a site; the class scores stay float."""
    rules: list[dict[str, Any]] = [
        {"weight": weight, "input": acts, "output": acts, "fold_bn": fold_bn},
        {"position": "last", "output": None},
    ]
    return quantize(network, rules)


class Gray(nn.Module):
    """Hands pictures with one channel to a network that takes three."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x.expand(-1, 3, -1, -1))


def _torchvision(name: str) -> Callable[[TrainingData], nn.Module]:
    def build(data: TrainingData) -> nn.Module:
        network = getattr(require("torchvision.models", "all"), name)(num_classes=data.n_classes)
        if name.startswith("resnet") and data.test_images.shape[-1] <= SMALL:
            network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
            network.maxpool = nn.Identity()
        return network if data.n_channels == 3 else Gray(network)

    return build


def _efficientnet(data: TrainingData) -> nn.Module:
    package = require("efficientnet_pytorch", "all")
    network = package.EfficientNet.from_name(
        "efficientnet-b0", num_classes=data.n_classes, image_size=data.test_images.shape[-1]
    )
    return network if data.n_channels == 3 else Gray(network)


def _fused(kind: str) -> Callable[[nn.Module, QuantizerFactory, QuantizerFactory, bool | str], nn.Module]:
    def quantize(
        network: nn.Module, weight: QuantizerFactory, acts: QuantizerFactory, fold_bn: bool | str
    ) -> nn.Module:
        import torchquant.models as models

        inner = network.network if isinstance(network, Gray) else network
        assert isinstance(inner, nn.Module)
        options = {"quantize_first": True, "quantize_fc": True, "fold_bn": fold_bn, "input_quantizer": acts}
        fused = getattr(models, kind)(inner, weight, acts, **options)
        return Gray(fused) if isinstance(network, Gray) else fused

    return quantize


NETWORKS = {
    "demo": Network(_small, _quantized_small, 8e-3, 3e-3),
    "small_mobilenet": Network(_small_mobilenet, _by_plan, 8e-3, 3e-3),
    **{
        name: Network(_torchvision(name), _fused("FusedResNet"), 1e-3, 3e-4)
        for name in ("resnet18", "resnet34", "resnet50")
    },
    "mobilenet_v2": Network(_torchvision("mobilenet_v2"), _fused("FusedMobileNetV2"), 1e-3, 3e-4),
    "efficientnet_b0": Network(_efficientnet, _fused("FusedEfficientNet"), 1e-3, 3e-4),
}
