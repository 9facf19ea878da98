"""The API of AutoQNN: `import torchquant.compat.autoqnn as autoqnn`."""

from torchquant.compat.autoqnn import core as core
from torchquant.compat.autoqnn import datasets as datasets
from torchquant.compat.autoqnn import models as models
from torchquant.compat.autoqnn import modules as modules
from torchquant.compat.autoqnn import quantizers as quantizers
from torchquant.compat.autoqnn import utils as utils

__all__ = ["core", "datasets", "models", "modules", "quantizers", "utils"]
