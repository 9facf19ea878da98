"""Where models that 0.1 loaded from packed files, and were saved whole, look for their quantizers."""

from torchquant.deploy.packed.weight_codes import CodesQuantizer as CodesQuantizer
