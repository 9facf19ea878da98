"""AutoQNN's networks for 32 x 32 pictures, under its names; their checkpoints load."""

from torchquant.compat.autoqnn.models import resnet as resnet
from torchquant.compat.autoqnn.models import vgg as vgg
from torchquant.compat.autoqnn.models.resnet import ResNet14 as ResNet14
from torchquant.compat.autoqnn.models.resnet import ResNet18 as ResNet18
from torchquant.compat.autoqnn.models.vgg import vgg7_64 as vgg7_64
from torchquant.compat.autoqnn.models.vgg import vgg7_64_plane as vgg7_64_plane

__all__ = ["resnet", "vgg"]
