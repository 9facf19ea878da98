"""Adapters to libraries that models live in; each is loaded when it is asked for, and needs the extra of its name."""

from typing import TYPE_CHECKING

from torchquant._lazy import lazy_names

if TYPE_CHECKING:
    from torchquant.integrations.lightning import QuantizationCallback as QuantizationCallback
    from torchquant.integrations.peft import quantized_lora as quantized_lora
    from torchquant.integrations.transformers.callback import TorchquantCallback as TorchquantCallback
    from torchquant.integrations.transformers.config import TorchquantConfig as TorchquantConfig

__all__ = ["QuantizationCallback", "TorchquantCallback", "TorchquantConfig", "quantized_lora"]

_ADAPTERS = {
    "QuantizationCallback": "torchquant.integrations.lightning",
    **dict.fromkeys(("TorchquantCallback", "TorchquantConfig"), "torchquant.integrations.transformers"),
    "quantized_lora": "torchquant.integrations.peft",
}
__getattr__ = lazy_names(__name__, _ADAPTERS, ("lightning", "peft", "transformers"))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
