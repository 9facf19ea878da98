"""Find the quantized network in the object that a library trains, and tell whether it is calibrated."""

from __future__ import annotations

from torch import nn

from torchquant._shown import some
from torchquant.errors import ConfigError
from torchquant.utils import qmodules


def quantized_network(owner: nn.Module, name: str = "") -> nn.Module:
    """Return the part of `owner` named `name`; "": its one attribute with quantizers, else `owner` itself.

    Raises ConfigError if nothing in it is quantized.
    """
    if name and name not in dict(owner.named_modules()):
        raise ConfigError(f"{type(owner).__name__} has no module {name!r}; it has {_names(owner)}")
    network = owner.get_submodule(name)
    if not any(qmodules(network)):
        raise ConfigError(
            f"nothing in {name or type(owner).__name__} is quantized; quantize the network before it is trained, as in "
            "self.net = torchquant.quantize(net, 'w4a8', example_inputs)"
        )
    parts = [child for child in owner.children() if any(qmodules(child))]
    return parts[0] if not name and len(parts) == 1 else network


def is_calibrated(network: nn.Module) -> bool:
    """Tell whether every quantizer of the network can quantize."""
    return all(q.is_ready for _, module in qmodules(network) for q in module.quantizers().values())


def _names(owner: nn.Module) -> str:
    return some([name for name, _ in owner.named_children()]) or "none"
