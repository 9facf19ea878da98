"""Define a small MobileNetV2: its depthwise convolutions make it sensitive to low bit widths."""

from __future__ import annotations

from torch import Tensor, nn


class InvertedResidual(nn.Module):
    """A 1x1 convolution to `expansion` times the channels, a 3x3 depthwise one, a 1x1 one; with a shortcut."""

    def __init__(self, n_in: int, n_out: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = n_in * expansion
        self.expand = nn.Sequential(nn.Conv2d(n_in, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6())
        depthwise = nn.Conv2d(wide, wide, 3, stride, padding=1, groups=wide, bias=False)
        self.depthwise = nn.Sequential(depthwise, nn.BatchNorm2d(wide), nn.ReLU6())
        self.project = nn.Sequential(nn.Conv2d(wide, n_out, 1, bias=False), nn.BatchNorm2d(n_out))
        self.has_shortcut = stride == 1 and n_in == n_out

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.has_shortcut else y


class SmallMobileNetV2(nn.Module):
    """Maps (N, n_channels, H, W) images to (N, n_classes) class scores; 5 inverted residuals, 20 layers with weights.

    >>> import torch
    >>> SmallMobileNetV2()(torch.zeros(1, 1, 16, 16)).shape
    torch.Size([1, 10])
    """

    def __init__(self, width: int = 8, n_channels: int = 1, n_classes: int = 10, expansion: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(n_channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU6()
        )
        shapes = [(width, width, 2), (width, width, 1), (width, 2 * width, 2), (2 * width, 2 * width, 1)]
        shapes += [(2 * width, 3 * width, 2)]
        self.blocks = nn.Sequential(*(InvertedResidual(i, o, stride, expansion) for i, o, stride in shapes))
        self.head = nn.Sequential(nn.Conv2d(3 * width, 8 * width, 1, bias=False), nn.BatchNorm2d(8 * width), nn.ReLU6())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(8 * width, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.flatten(self.pool(self.head(self.blocks(self.stem(x))))))
