"""Old address of the quantizers in models that 0.1 loaded from packed files and that were saved whole."""

from torchquant.deploy.packed.weight_codes import CodesQuantizer as CodesQuantizer
