"""EfficientNet of efficientnet_pytorch, b0 to b7, with every layer wrapped."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, nn

from torchquant.errors import ConfigError, require
from torchquant.models._base import FusedModel, Recipe, check_kind


def excite(x: Tensor, squeezed: Tensor) -> Tensor:
    """Multiply x (B, C, H, W) by the sigmoid of squeezed (B, C, 1, 1)."""
    return torch.sigmoid(squeezed) * x


class FusedSqueezeExcitation(nn.Module):
    """Squeeze and excitation: pool, reduce, expand, excite."""

    def __init__(self, block: Any, recipe: Recipe) -> None:
        super().__init__()
        self.adaptive_pool = recipe.op(nn.AdaptiveAvgPool2d(1), block._depthwise_conv)
        self.se_reduce = recipe.wrap([block._se_reduce, block._swish])
        self.se_expand = recipe.wrap([block._se_expand])
        self.excitation = recipe.op(excite, block._se_expand)

    def forward(self, x: Tensor) -> Tensor:
        return self.excitation(x, self.se_expand(self.se_reduce(self.adaptive_pool(x))))


class FusedMBConvBlock(nn.Module):
    """Expansion, depthwise convolution, squeeze and excitation, projection; with drop-connect and a skip connection.

    `drop_connect_rate`: drop probability of this block, None or 0 for none.
    """

    def __init__(self, block: Any, recipe: Recipe, drop_connect_rate: float | None) -> None:
        super().__init__()
        args = block._block_args
        layers: list[nn.Module] = []
        if args.expand_ratio != 1:
            layers.append(recipe.wrap([block._expand_conv, block._bn0, block._swish]))
        layers.append(recipe.wrap([block._depthwise_conv, block._bn1, block._swish]))
        if block.has_se:
            layers.append(FusedSqueezeExcitation(block, recipe))
        layers.append(recipe.wrap([block._project_conv, block._bn2]))
        self.body = nn.Sequential(*layers)
        has_skip = block.id_skip and args.stride == 1 and args.input_filters == args.output_filters
        self.id_add = recipe.op(operator.add, block._project_conv) if has_skip else None
        self.drop_connect_rate = drop_connect_rate
        self.drop_connect = require("efficientnet_pytorch.utils", "all").drop_connect

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        if self.id_add is None:
            return y
        if self.drop_connect_rate:
            y = self.drop_connect(y, p=self.drop_connect_rate, training=self.training)
        return self.id_add(y, x)


class FusedEfficientNet(FusedModel):
    """A copy of an efficientnet_pytorch EfficientNet, ready to quantize.

    `net`: the float model, which is not changed. `weight_quantizer`, `acts_quantizer`: functions that make
    the quantizer of a site from its layer, or return None to leave it float. An operation without a
    weight (addition, excitation, pooling) gets the layer before it.

    `quantize_first`: also the first convolution, by default. `quantize_fc`: also the last layer and the pooling
    before it, with `fc_weight_quantizer`, `fc_acts_quantizer`, `avg_pool_quantizer`, each given the
    last layer; where one is None, the quantizer of the model is used. `fold_bn`: as in QWrapper. `input_quantizer`: for
    the tensor that the first quantized layer reads.

    forward: (B, 3, H, W) -> (B, classes), or (B, C, 1, 1) from a net with `include_top=False`, which has
    no last layer. Raises ConfigError, UnsupportedPatternError, MissingDependencyError without
    efficientnet_pytorch.
    """

    def _check(self, net: Any) -> None:
        model = require("efficientnet_pytorch.model", "all")
        check_kind("FusedEfficientNet", net, (model.EfficientNet,), "forward", "extract_features")
        for block in net._blocks:
            check_kind("FusedEfficientNet's block", block, (model.MBConvBlock,), "forward")

    def _fuse(self, net: Any, recipe: Recipe) -> None:
        rate, n_blocks = net._global_params.drop_connect_rate, len(net._blocks)
        rates = [rate * (float(i) / n_blocks) if rate else None for i in range(n_blocks)]
        self.conv_stem = recipe.stem([net._conv_stem, net._bn0, net._swish], net._blocks)
        self.blocks = nn.Sequential(
            *(FusedMBConvBlock(block, recipe, rate) for block, rate in zip(net._blocks, rates, strict=True))
        )
        self.conv_head = recipe.wrap([net._conv_head, net._bn1, net._swish])
        self.avg_pool: nn.Module = net._avg_pooling
        self.classifier: nn.Module | None = None
        if recipe.quantize_fc and not net._global_params.include_top:
            raise ConfigError("quantize_fc=True needs a last layer; this EfficientNet was built with include_top=False")
        if net._global_params.include_top:
            self.avg_pool, fc = recipe.head(net._avg_pooling, net._fc)
            self.classifier = nn.Sequential(net._dropout, fc)

    def forward(self, x: Tensor) -> Tensor:
        x = self.avg_pool(self.conv_head(self.blocks(self.conv_stem(x))))
        return x if self.classifier is None else self.classifier(x.flatten(1))
