"""The networks of NNI's tests and tutorials, small, and real digits for them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ThreeConvs(nn.Module):
    """Three convolutions with batch norms, two of them added, and two linear layers, as in NNI's own tests."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, groups=4)
        self.bn2 = nn.BatchNorm2d(8)
        self.conv3 = nn.Conv2d(8, 8, 3)
        self.bn3 = nn.BatchNorm2d(8)
        self.fc1 = nn.Linear(8 * 4 * 4, 16)
        self.fc2 = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x))
        x = self.bn2(self.conv2(x)) + self.bn3(self.conv3(x))
        return F.log_softmax(self.fc2(self.fc1(x.flatten(1))), -1)


class Mnist(nn.Module):
    """The network of the quick start tutorial and of the examples."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3)
        self.conv2 = nn.Conv2d(8, 16, 2)
        self.fc1 = nn.Linear(16, 32)
        self.fc2 = nn.Linear(32, 10)
        self.relu1, self.relu2, self.relu3 = nn.ReLU6(), nn.ReLU6(), nn.ReLU6()
        self.max_pool1, self.max_pool2 = nn.MaxPool2d(2, 2), nn.MaxPool2d(2, 2)
        self.batchnorm1 = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.max_pool1(self.relu1(self.batchnorm1(self.conv1(x))))
        x = self.max_pool2(self.relu2(self.conv2(x)))
        return F.log_softmax(self.fc2(self.relu3(self.fc1(x.flatten(1)))), dim=1)


@functools.cache
def digits(train: bool = True) -> tuple[Tensor, Tensor]:
    """Return 1280 handwritten digits (N, 1, 8, 8) and their labels, or the 517 others."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x, y = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1, torch.tensor(data.target)
    return (x[:1280], y[:1280]) if train else (x[1280:], y[1280:])


def batches(size: int = 64, train: bool = True) -> Iterator[tuple[Tensor, Tensor]]:
    x, y = digits(train)
    return zip(x.split(size), y.split(size), strict=True)


def training_step(batch: Any, model: nn.Module, *args: Any) -> Tensor:
    return F.nll_loss(model(batch[0]), batch[1])


def training_model(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    training_step: Any,
    scheduler: Any = None,
    max_steps: int | None = None,
    max_epochs: int | None = None,
) -> None:
    """Train as the function of NNI's tests does: as many epochs, but no more steps."""
    model.train()
    n_steps = 0
    for _ in range(max_epochs or 1):
        for batch in batches():
            optimizer.zero_grad()
            training_step(batch, model).backward()
            optimizer.step()
            n_steps += 1
            if n_steps == (max_steps or 50):
                return
        if scheduler is not None:
            scheduler.step()


def evaluating_model(model: nn.Module) -> float:
    model.eval()
    x, y = digits(train=False)
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())
