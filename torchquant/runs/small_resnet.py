"""Define a small residual network, in float and in quantizable form; also an example of how to write one."""

from __future__ import annotations

import copy
import operator

from torch import Tensor, nn

from torchquant.qmodule import FloatCheckpoints, QOp, QWrapper
from torchquant.quantizers import QuantizerFactory


class Block(nn.Module):
    """Two 3x3 convolutions with a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or n_in != n_out:
            self.downsample = nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(shortcut + self.bn2(self.conv2(y)))


class SmallResNet(nn.Module):
    """Maps (N, n_channels, H, W) images to (N, n_classes) class scores; 14 convolutions and a linear layer."""

    def __init__(self, width: int = 8, n_channels: int = 1, n_classes: int = 10) -> None:
        super().__init__()
        self.conv = nn.Conv2d(n_channels, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.blocks = nn.Sequential(
            Block(width, width, stride=2),
            Block(width, width, stride=1),
            Block(width, 2 * width, stride=2),
            Block(2 * width, 2 * width, stride=1),
            Block(2 * width, 4 * width, stride=2),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(4 * width, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.relu(self.bn(self.conv(x))))
        return self.fc(self.flatten(self.pool(x)))


class QuantBlock(nn.Module):
    """`Block` with its layers in QWrappers and its addition in a QOp."""

    def __init__(
        self, block: Block, weight: QuantizerFactory, acts: QuantizerFactory, fold_bn: bool | str = True
    ) -> None:
        super().__init__()

        def wrap(*layers: nn.Module) -> QWrapper:
            return QWrapper(layers, weight(layers[0]), acts(layers[0]), fold_bn)

        self.conv1 = wrap(block.conv1, block.bn1, block.relu)
        self.conv2 = wrap(block.conv2, block.bn2)
        self.downsample = None if block.downsample is None else wrap(*block.downsample)
        self.add = QOp(operator.add, acts(block), activation=nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.add(shortcut, self.conv2(self.conv1(x)))


class QuantSmallResNet(FloatCheckpoints):
    """A `SmallResNet` that can quantize: same weights (copied), same output until its state is changed.

    `weight_quantizer` and `acts_quantizer` are called once per site with the module at that site and
    return its quantizer. The image is quantized too; the class scores stay float. Checkpoints of the
    float network load.

    >>> import torch
    >>> from torchquant import AffineQuantizer, BatchMinMax, ExpAvgMinMax
    >>> network = SmallResNet().eval()
    >>> quant_network = QuantSmallResNet(
    ...     network,
    ...     weight_quantizer=lambda module: AffineQuantizer(8, BatchMinMax(axis=0), symmetric="narrow"),
    ...     acts_quantizer=lambda module: AffineQuantizer(8, ExpAvgMinMax()),
    ... ).eval()
    >>> x = torch.randn(2, 1, 16, 16)
    >>> torch.equal(quant_network(x), network(x))
    True
    """

    def __init__(
        self,
        network: SmallResNet,
        weight_quantizer: QuantizerFactory,
        acts_quantizer: QuantizerFactory,
        fold_bn: bool | str = True,
    ) -> None:
        super().__init__()
        net = copy.deepcopy(network)
        weight, acts = weight_quantizer, acts_quantizer
        stem = [net.conv, net.bn, net.relu]
        self.conv = QWrapper(stem, weight(net.conv), acts(net.conv), fold_bn, input_quantizer=acts(net.conv))
        blocks = [QuantBlock(block, weight, acts, fold_bn) for block in net.blocks]  # type: ignore[arg-type]
        self.blocks = nn.Sequential(*blocks)
        self.pool = QOp(net.pool, acts(net.pool))
        self.flatten = net.flatten
        self.fc = QWrapper(net.fc, weight(net.fc), acts_quantizer=None)
        self.link_float_state(net)
        self.train(network.training)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.flatten(self.pool(self.blocks(self.conv(x)))))
