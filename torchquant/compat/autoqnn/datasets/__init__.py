"""AutoQNN's data: CIFAR and ImageNet from folders of yours, augmentation, loaders that read ahead."""

from torchquant.compat.autoqnn._refused import refused_names
from torchquant.compat.autoqnn.datasets import autoaugment as autoaugment
from torchquant.compat.autoqnn.datasets import cifar as cifar
from torchquant.compat.autoqnn.datasets import cutout as cutout
from torchquant.compat.autoqnn.datasets import imagenet as imagenet
from torchquant.compat.autoqnn.datasets.base import DataLoaderX as DataLoaderX
from torchquant.compat.autoqnn.datasets.base import data_prefetcher as data_prefetcher

__getattr__ = refused_names(
    __name__,
    {"tfrecord_read": "AutoQNN's own does not run, as names lack in its imports; take imagenet.get_dataset for images"},
)

__all__ = ["DataLoaderX", "autoaugment", "cifar", "cutout", "data_prefetcher", "imagenet"]
