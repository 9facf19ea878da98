"""Adapters to libraries that models live in; each is loaded when it is asked for, and needs the extra of its name."""

from typing import TYPE_CHECKING

from torchquant._lazy import lazy_names

if TYPE_CHECKING:
    from torchquant.integrations.transformers.callback import TorchquantCallback as TorchquantCallback
    from torchquant.integrations.transformers.config import TorchquantConfig as TorchquantConfig

__all__ = ["TorchquantCallback", "TorchquantConfig"]

_ADAPTERS = dict.fromkeys(__all__, "torchquant.integrations.transformers")
__getattr__ = lazy_names(__name__, _ADAPTERS, ("transformers",))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
