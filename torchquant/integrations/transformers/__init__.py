"""Models of transformers: quantized as they are loaded, saved as codes, trained with `Trainer`.

Importing this registers the method "torchquant" with transformers.
"""

from torchquant.integrations.transformers.callback import TorchquantCallback as TorchquantCallback
from torchquant.integrations.transformers.config import TorchquantConfig as TorchquantConfig
from torchquant.integrations.transformers.hf_quantizer import TorchquantHfQuantizer as TorchquantHfQuantizer
