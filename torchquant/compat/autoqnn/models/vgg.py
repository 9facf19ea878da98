"""VGG with batch norm after the activation, for 32 x 32 pictures."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

Channels = Sequence[tuple[int, int]]


def vgg_block(num_convs: int, in_channels: int, out_channels: int) -> nn.Sequential:
    """Make `num_convs` times convolution, ReLU, batch norm; then pooling."""
    layers: list[nn.Module] = []
    for i in range(num_convs):
        layers.append(nn.Conv2d(in_channels if i == 0 else out_channels, out_channels, 3, padding=1))
        layers += [nn.ReLU(inplace=True), nn.BatchNorm2d(out_channels)]
    return nn.Sequential(*layers, nn.MaxPool2d(2, 2))


def vgg_stack(num_convs: Sequence[int], channels: Channels) -> nn.Sequential:
    """Make a block for each (channels in, channels out)."""
    return nn.Sequential(*(vgg_block(n, *pair) for n, pair in zip(num_convs, channels, strict=True)))


class VGG(nn.Module):
    """Blocks, then two linear layers. `out_dim`: remaining positions, 16 for three blocks on 32 x 32.

    forward: (B, 3, 32, 32) -> (B, 10).
    """

    def __init__(self, num_convs: Sequence[int], channels: Channels, out_dim: int = 16) -> None:
        super().__init__()
        self.feature = vgg_stack(num_convs, channels)
        hidden = (nn.Linear(out_dim * channels[-1][1], 1024), nn.ReLU(inplace=True), nn.Dropout(0.5))
        self.fc = nn.Sequential(*hidden, nn.Linear(1024, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.feature(x).flatten(1))


class VGG_plane(nn.Module):  # noqa: N801 - published name
    """Blocks, average pooling, one linear layer. forward: (B, 3, 32, 32) -> (B, 10)."""

    def __init__(self, num_convs: Sequence[int], channels: Channels) -> None:
        super().__init__()
        self.feature = vgg_stack(num_convs, channels)
        self.avg_pool = nn.AvgPool2d(4)
        self.linear = nn.Linear(channels[-1][1], 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.avg_pool(self.feature(x)).flatten(1))


def vgg7_M(M: int) -> VGG:  # noqa: N802, N803 - published names
    """Make a VGG of seven layers with M channels in the first."""
    return VGG((2, 2, 2), ((3, M), (M, 2 * M), (2 * M, 4 * M)))


def vgg7_M_plane(M: int) -> VGG_plane:  # noqa: N802, N803 - published names
    """Make a VGG of seven layers with M channels in the first, without the wide linear layer."""
    return VGG_plane((2, 2, 2), ((3, M), (M, 2 * M), (2 * M, 4 * M)))


def vgg7_64() -> VGG:
    """Make `vgg7_M(64)`."""
    return vgg7_M(64)


def vgg7_64_plane() -> VGG_plane:
    """Make `vgg7_M_plane(64)`."""
    return vgg7_M_plane(64)
