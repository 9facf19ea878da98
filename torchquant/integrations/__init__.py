"""Adapters to libraries that models live in; each is loaded when it is asked for, and needs the extra of its name."""

from typing import TYPE_CHECKING

from torchquant._lazy import lazy_names

if TYPE_CHECKING:
    from torchquant.integrations.lightning import QuantizationCallback as QuantizationCallback
    from torchquant.integrations.peft import quantized_lora as quantized_lora
    from torchquant.integrations.transformers.callback import TorchquantCallback as TorchquantCallback
    from torchquant.integrations.transformers.config import TorchquantConfig as TorchquantConfig
    from torchquant.integrations.updates import Packet as Packet
    from torchquant.integrations.updates import UpdateCodec as UpdateCodec

__all__ = [
    "Packet",
    "QuantizationCallback",
    "TorchquantCallback",
    "TorchquantConfig",
    "UpdateCodec",
    "quantized_lora",
]

_MODULES = {
    "lightning": ("QuantizationCallback",),
    "peft": ("quantized_lora",),
    "transformers": ("TorchquantCallback", "TorchquantConfig"),
    "updates": ("Packet", "UpdateCodec"),
}
_ADAPTERS = {name: f"{__name__}.{module}" for module, names in _MODULES.items() for name in names}
__getattr__ = lazy_names(__name__, _ADAPTERS, ("flower", "speechbrain", *_MODULES))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
