"""Handwritten digits, moved, turned and made noisy so that 8x8 pixels are not trivial."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from torchquant.errors import require

IMAGE_SIZE = 16
MAX_ANGLE = 0.35
"""Largest rotation, radians."""
MAX_SHIFT = 0.2
"""Largest shift, in half image widths."""
NOISE = 0.2
"""Standard deviation of the pixel noise; pixels are 0..1."""


class TrainingData(Protocol):
    """What training needs of its data."""

    @property
    def n_train(self) -> int:
        """Number of training images."""

    @property
    def n_channels(self) -> int:
        """1 or 3."""

    @property
    def n_classes(self) -> int: ...

    @property
    def test_images(self) -> Tensor: ...

    @property
    def test_labels(self) -> Tensor: ...

    def train_batches(self, generator: torch.Generator, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch of (images, labels), in an order and with distortions drawn from `generator`."""


@dataclass(frozen=True)
class Digits:
    """Real digits, split by image: (N, 1, 8, 8) training images, (M, 1, 16, 16) distorted test images.

    Labels are (N,) and (M,) int64. No source image is in both parts.
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
        """`train_epoch`, in batches."""
        images, labels = self.train_epoch(generator)
        yield from zip(images.split(batch_size), labels.split(batch_size), strict=True)

    def train_epoch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The training images in random order, each newly distorted: (N, 1, 16, 16), (N,)."""
        order = torch.randperm(len(self.train_labels), generator=generator)
        return distort(self.train_images[order], generator), self.train_labels[order]


def load_digits(seed: int = 0, test_copies: int = 4) -> Digits:
    """scikit-learn's 1797 embedded digits; 3/4 for training, 1/4 distorted `test_copies` times for testing.

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
    """(N, 1, 8, 8) -> (N, 1, 16, 16): enlarged, rotated, shifted, with pixel noise; every image its own way."""
    n = len(images)
    angle, shift_x, shift_y = torch.rand(3, n, generator=generator) * 2 - 1
    angle, shift_x, shift_y = angle * MAX_ANGLE, shift_x * MAX_SHIFT, shift_y * MAX_SHIFT
    zoom = 0.9 + 0.4 * torch.rand(n, generator=generator)
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    matrices = torch.stack([cos, -sin, shift_x, sin, cos, shift_y], dim=1).view(n, 2, 3)
    grid = F.affine_grid(matrices, [n, 1, IMAGE_SIZE, IMAGE_SIZE], align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="zeros", align_corners=False)
    return moved + NOISE * torch.randn(moved.shape, generator=generator)
