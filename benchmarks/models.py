"""The float models, their batches, how to fuse some, and the targets for the quantized ones."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchquant.errors import require
from torchquant.quantizers import QuantizerFactory

Batch = Callable[[int, int], tuple[Tensor, Tensor]]
TOKENS = 30522
"""The words of BERT's vocabulary."""


def image_batch(batch: int, size: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Return random images (batch, 3, size, size) and labels (batch,) out of 1000."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, 3, size, size, generator=generator)
    return images, torch.randint(1000, (batch,), generator=generator)


def token_batch(batch: int, size: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Return random tokens (batch, size) and labels (batch,) out of 2."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(TOKENS, (batch, size), generator=generator)
    return tokens, torch.randint(2, (batch,), generator=generator)


@dataclass(frozen=True)
class ModelCase:
    """A model by name. `build(size)`: for images of size x size, or that many tokens; `batch(batch, size)`: of these.

    `fused`: module and class of `torchquant.models`, None if there is none. `target`: QAT step over float;
    `saved_target`: bytes saved for backward over float.
    """

    build: Callable[[int], nn.Module]
    fused: tuple[str, str] | None = None
    target: float | None = None
    saved_target: float | None = None
    batch: Batch = image_batch


def _torchvision(name: str, *sized: str) -> Callable[[int], nn.Module]:
    """`sized`: the arguments that take the size of the images."""

    def build(size: int) -> nn.Module:
        make = getattr(require("torchvision.models", "all"), name)
        return make(weights=None, **dict.fromkeys(sized, size))

    return build


def _efficientnet(size: int) -> nn.Module:
    package = require("efficientnet_pytorch", "all")
    return package.EfficientNet.from_name("efficientnet-b0", image_size=size)


def _bert(size: int) -> nn.Module:
    package = require("transformers", "zoo")
    return package.BertForSequenceClassification(package.BertConfig(vocab_size=TOKENS, num_hidden_layers=6))


MODELS = {
    "resnet18": ModelCase(_torchvision("resnet18"), ("resnet", "FusedResNet"), 1.20, 1.50),
    "mobilenet_v2": ModelCase(_torchvision("mobilenet_v2"), ("mobilenet", "FusedMobileNetV2"), 1.45, 1.05),
    "efficientnet_b0": ModelCase(_efficientnet, ("efficientnet", "FusedEfficientNet"), 1.40, 1.10),
    "vit_b_16": ModelCase(_torchvision("vit_b_16", "image_size")),
    "bert": ModelCase(_bert, batch=token_batch),
}
FUSED = [name for name, case in MODELS.items() if case.fused is not None]


def build_float(name: str, size: int, seed: int = 0) -> nn.Module:
    """Build the float model for a size of its inputs, with random weights that depend on `seed` only."""
    torch.manual_seed(seed)
    return MODELS[name].build(size)


def fuse(net: nn.Module, weight_quantizer: QuantizerFactory, acts_quantizer: QuantizerFactory) -> nn.Module:
    """Fuse the float model, with a quantizer for the weight and the output of every layer. Raises KeyError."""
    by_class = {"ResNet": "resnet18", "MobileNetV2": "mobilenet_v2", "EfficientNet": "efficientnet_b0"}
    module, fused_class = MODELS[by_class[type(net).__name__]].fused or ()
    fused = getattr(importlib.import_module(f"torchquant.models.{module}"), fused_class)
    return fused(net, weight_quantizer, acts_quantizer, quantize_first=True, quantize_fc=True)
