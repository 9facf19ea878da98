"""Image models with every layer wrapped, ready to quantize. The packages of the float models load on first use."""

from torchquant.models.efficientnet import FusedEfficientNet as FusedEfficientNet
from torchquant.models.mobilenet import FusedMobileNetV2 as FusedMobileNetV2
from torchquant.models.resnet import FusedResNet as FusedResNet

__all__ = ["FusedEfficientNet", "FusedMobileNetV2", "FusedResNet"]
