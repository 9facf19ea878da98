"""AutoQNN's networks for 32 x 32 pictures, under its names; their checkpoints load."""

from torchquant.compat.autoqnn.models import resnet as resnet
from torchquant.compat.autoqnn.models import vgg as vgg

__all__ = ["resnet", "vgg"]
