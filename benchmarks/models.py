"""The float models, how to fuse each, and the targets for the quantized ones."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchquant.errors import require
from torchquant.quantizers import QuantizerFactory


@dataclass(frozen=True)
class ModelCase:
    """A model by name. `target`: QAT step over float; `saved_target`: bytes saved for backward over float."""

    build: Callable[[int], nn.Module]
    fused: tuple[str, str]
    target: float
    saved_target: float


def _torchvision(name: str) -> Callable[[int], nn.Module]:
    def build(size: int) -> nn.Module:
        return getattr(require("torchvision.models", "all"), name)(weights=None)

    return build


def _efficientnet(size: int) -> nn.Module:
    package = require("efficientnet_pytorch", "all")
    return package.EfficientNet.from_name("efficientnet-b0", image_size=size)


MODELS = {
    "resnet18": ModelCase(_torchvision("resnet18"), ("resnet", "FusedResNet"), 1.20, 1.50),
    "mobilenet_v2": ModelCase(_torchvision("mobilenet_v2"), ("mobilenet", "FusedMobileNetV2"), 1.45, 1.05),
    "efficientnet_b0": ModelCase(_efficientnet, ("efficientnet", "FusedEfficientNet"), 1.40, 1.10),
}


def build_float(name: str, size: int, seed: int = 0) -> nn.Module:
    """Build the float model for `size` x `size` images, with random weights that depend on `seed` only."""
    torch.manual_seed(seed)
    return MODELS[name].build(size)


def fuse(net: nn.Module, weight_quantizer: QuantizerFactory, acts_quantizer: QuantizerFactory) -> nn.Module:
    """Fuse the float model, with a quantizer for the weight and the output of every layer. Raises KeyError."""
    by_class = {"ResNet": "resnet18", "MobileNetV2": "mobilenet_v2", "EfficientNet": "efficientnet_b0"}
    module, fused_class = MODELS[by_class[type(net).__name__]].fused
    fused = getattr(importlib.import_module(f"torchquant.models.{module}"), fused_class)
    return fused(net, weight_quantizer, acts_quantizer, quantize_first=True, quantize_fc=True)


def image_batch(batch: int, size: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Return random images (batch, 3, size, size) and labels (batch,) out of 1000."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, 3, size, size, generator=generator)
    return images, torch.randint(1000, (batch,), generator=generator)
