"""ResNet, ResNeXt and Wide ResNet of torchvision with every layer wrapped."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor, nn

from torchquant.errors import require
from torchquant.models._base import FusedModel, Recipe, check_kind


class FusedBlock(nn.Module):
    """A BasicBlock or Bottleneck: two or three convolutions, the skip, and an addition with ReLU."""

    def __init__(self, block: Any, recipe: Recipe) -> None:
        super().__init__()
        layers = [(block.conv1, block.bn1), (block.conv2, block.bn2)]
        if hasattr(block, "conv3"):
            layers.append((block.conv3, block.bn3))
        *inner, last = layers
        self.body = nn.Sequential(*(recipe.wrap([*pair, block.relu]) for pair in inner), recipe.wrap(last))
        self.downsample = None if block.downsample is None else recipe.wrap(block.downsample)
        self.qadd_relu = recipe.op(operator.add, last[0], block.relu)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return self.qadd_relu(y, x if self.downsample is None else self.downsample(x))


class FusedResNet(FusedModel):
    """A copy of any torchvision ResNet, ResNeXt or Wide ResNet, ready to quantize.

    `net`: the float model, which is not changed. `weight_quantizer`, `acts_quantizer`: functions that make
    the quantizer of a site from its layer, or return None to leave it float. An addition gets the
    layer before it, the skip its convolution.

    `quantize_first`: also the first convolution, not by default. `quantize_fc`: also the last layer and the pooling
    before it, with `fc_weight_quantizer`, `fc_acts_quantizer`, `avg_pool_quantizer`, each given the
    last layer; where one is None, the quantizer of the model is used. `fold_bn`: as in QWrapper. `input_quantizer`: for
    the tensor that the first quantized layer reads.

    forward: (B, 3, H, W) -> (B, classes). Raises ConfigError, UnsupportedPatternError,
    MissingDependencyError without torchvision.
    """

    quantizes_first = False

    def _check(self, net: Any) -> None:
        resnet = require("torchvision.models.resnet", "all")
        check_kind("FusedResNet", net, (resnet.ResNet,), "forward", "_forward_impl")
        for layer in (net.layer1, net.layer2, net.layer3, net.layer4):
            for block in layer:
                check_kind("FusedResNet's block", block, (resnet.BasicBlock, resnet.Bottleneck), "forward")

    def _fuse(self, net: Any, recipe: Recipe) -> None:
        self.fused_1 = recipe.stem([net.conv1, net.bn1, net.relu], net.layer1)
        self.maxpool = net.maxpool
        self.layer1 = nn.Sequential(*(FusedBlock(block, recipe) for block in net.layer1))
        self.layer2 = nn.Sequential(*(FusedBlock(block, recipe) for block in net.layer2))
        self.layer3 = nn.Sequential(*(FusedBlock(block, recipe) for block in net.layer3))
        self.layer4 = nn.Sequential(*(FusedBlock(block, recipe) for block in net.layer4))
        self.avgpool, self.fc = recipe.head(net.avgpool, net.fc)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.fused_1(x))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))
