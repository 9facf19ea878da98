"""MobileNetV2 of torchvision with every layer wrapped."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor, nn

from torchquant.errors import require
from torchquant.models._base import FusedModel, Recipe, check_kind


class FusedInvertedResidual(nn.Module):
    """Expansion (if there is one), depthwise convolution, linear projection; with a skip connection at stride 1."""

    def __init__(self, block: Any, recipe: Recipe) -> None:
        super().__init__()
        *inner, projection, bn = block.conv
        self.conv = nn.Sequential(*map(recipe.wrap, inner), recipe.wrap([projection, bn]))
        self.qadd = recipe.op(operator.add, projection) if block.use_res_connect else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y if self.qadd is None else self.qadd(x, y)


class FusedMobileNetV2(FusedModel):
    """A copy of a torchvision MobileNetV2 of any width, ready to quantize.

    `net`: the float model, which is not changed. `weight_quantizer`, `acts_quantizer`: functions that make
    the quantizer of a site from its layer, or return None to leave it float. An addition gets the
    layer before it.

    `quantize_first`: also the first convolution, by default. `quantize_fc`: also the last layer and the pooling
    before it, with `fc_weight_quantizer`, `fc_acts_quantizer`, `avg_pool_quantizer`, each given the
    last layer; where one is None, the quantizer of the model is used. `fold_bn`: as in QWrapper. `input_quantizer`: for
    the tensor that the first quantized layer reads.

    forward: (B, 3, H, W) -> (B, classes). Raises ConfigError, UnsupportedPatternError,
    MissingDependencyError without torchvision.
    """

    def _check(self, net: Any) -> None:
        mobilenet = require("torchvision.models.mobilenetv2", "all")
        check_kind("FusedMobileNetV2", net, (mobilenet.MobileNetV2,), "forward", "_forward_impl")
        for block in net.features[1:-1]:
            check_kind("FusedMobileNetV2's block", block, (mobilenet.InvertedResidual,), "forward")

    def _fuse(self, net: Any, recipe: Recipe) -> None:
        first, *blocks, last = net.features
        self.features = nn.Sequential(
            recipe.stem(first, net.features[1:]),
            *(FusedInvertedResidual(block, recipe) for block in blocks),
            recipe.wrap(last),
        )
        *dropout, fc = net.classifier if isinstance(net.classifier, nn.Sequential) else [net.classifier]
        self.avg_pool, fc = recipe.head(nn.AdaptiveAvgPool2d(1), fc)
        self.classifier = nn.Sequential(*dropout, fc)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avg_pool(self.features(x)).flatten(1))
