"""ResNets for 32 x 32 pictures: the wide form (64, 128, 256, 512 channels) and the simple one (16, 32, 64)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

WIDE = (64, 128, 256, 512)
SIMPLE = (16, 32, 64)


def _conv_bn(n_in: int, n_out: int, kernel: int, stride: int) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    return nn.Conv2d(n_in, n_out, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(n_out)


class BasicBlock(nn.Module):
    """Two convolutions and a skip. (B, C, H, W) -> (B, planes, H / stride, W / stride)."""

    expansion = 1

    def __init__(self, in_planes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv_bn(in_planes, planes, 3, stride)
        self.conv2, self.bn2 = _conv_bn(planes, planes, 3, 1)
        fits = stride == 1 and in_planes == planes
        self.shortcut = nn.Sequential(*([] if fits else _conv_bn(in_planes, planes, 1, stride)))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y)) + self.shortcut(x)
        return F.relu(y)


class Bottleneck(nn.Module):
    """Three convolutions and a skip. (B, C, H, W) -> (B, 4 planes, H / stride, W / stride)."""

    expansion = 4

    def __init__(self, in_planes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        out = self.expansion * planes
        self.conv1, self.bn1 = _conv_bn(in_planes, planes, 1, 1)
        self.conv2, self.bn2 = _conv_bn(planes, planes, 3, stride)
        self.conv3, self.bn3 = _conv_bn(planes, out, 1, 1)
        fits = stride == 1 and in_planes == out
        self.shortcut = nn.Sequential(*([] if fits else _conv_bn(in_planes, out, 1, stride)))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y)) + self.shortcut(x)
        return F.relu(y)


class ResNet(nn.Module):
    """Maps (B, 3, 32, 32) to (B, classes); with `hiddens`, to a list: the output of every stage, then the scores."""

    widths: Sequence[int] = WIDE

    def __init__(self, block: Any, num_blocks: Sequence[int], num_classes: int = 10, hiddens: bool = False) -> None:
        super().__init__()
        self.hiddens = hiddens
        self.in_planes = self.widths[0]
        self.conv1, self.bn1 = _conv_bn(3, self.widths[0], 3, 1)
        for i, (planes, n) in enumerate(zip(self.widths, num_blocks, strict=True)):
            self.add_module(f"layer{i + 1}", self._make_layer(block, planes, n, stride=1 if i == 0 else 2))
        self.linear = nn.Linear(self.widths[-1] * block.expansion, num_classes)

    def _make_layer(self, block: Any, planes: int, n: int, stride: int) -> nn.Sequential:
        blocks = []
        for s in (stride, *([1] * (n - 1))):
            blocks.append(block(self.in_planes, planes, s))
            self.in_planes = planes * block.expansion
        return nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.bn1(self.conv1(x)))
        stages = []
        for i in range(len(self.widths)):
            x = self.get_submodule(f"layer{i + 1}")(x)
            stages.append(x)
        scores = self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return [*stages, scores] if self.hiddens else scores


class ResNet_simple(ResNet):  # noqa: N801 - published name
    """The narrow ResNet with three stages."""

    widths = SIMPLE


def ResNet18() -> ResNet:  # noqa: N802 - published name
    """Make the wide ResNet with two blocks per stage."""
    return ResNet(BasicBlock, [2, 2, 2, 2])


def ResNet14() -> ResNet:  # noqa: N802 - published name
    """Make the simple ResNet with two blocks per stage."""
    return ResNet_simple(BasicBlock, [2, 2, 2])


def ResNet18_hiddens() -> ResNet:  # noqa: N802 - published name
    """Make ResNet18 that also returns the outputs of its stages."""
    return ResNet(BasicBlock, [2, 2, 2, 2], hiddens=True)


def ResNet18_simple_hiddens() -> ResNet:  # noqa: N802 - published name
    """Make the same as `ResNet18_hiddens`, as published."""
    return ResNet18_hiddens()


def ResNet34_simple_hiddens() -> ResNet:  # noqa: N802 - published name
    """Make the wide ResNet with 3, 4, 6, 3 blocks that also returns its stages, as published."""
    return ResNet(BasicBlock, [3, 4, 6, 3], hiddens=True)


def ResNet20_simple_hiddens() -> ResNet:  # noqa: N802 - published name
    """Make the simple ResNet with three blocks per stage that also returns its stages."""
    return ResNet_simple(BasicBlock, [3, 3, 3], hiddens=True)


def ResNet56_simple_hiddens() -> ResNet:  # noqa: N802 - published name
    """Make the simple ResNet with nine blocks per stage that also returns its stages."""
    return ResNet_simple(BasicBlock, [9, 9, 9], hiddens=True)


def ResNet112_simple_hiddens() -> ResNet:  # noqa: N802 - published name
    """Make the simple ResNet with 18 blocks per stage that also returns its stages."""
    return ResNet_simple(BasicBlock, [18, 18, 18], hiddens=True)
