"""Switch off torch's fused transformer layers, which read weights past the modules that quantize them."""

from __future__ import annotations

from torch import nn

from torchquant.qmodule.state import QModule, QModuleState

_SWITCHES = {nn.TransformerEncoderLayer: "activation_relu_or_gelu", nn.TransformerEncoder: "use_nested_tensor"}
"""Class -> the attribute that it checks before it takes its fused path, and nowhere else."""


class WhileFloat:
    """A number or flag of a module that is false while a QModule inside observes or quantizes."""

    def __init__(self, module: nn.Module, value: object) -> None:
        self.module, self.value = module, value

    def __bool__(self) -> bool:
        if not self.value:
            return False
        for module in self.module.modules():
            if isinstance(module, QModule) and module.state is not QModuleState.BYPASSED:
                return False
        return True

    def __eq__(self, other: object) -> bool:
        return bool(self.value == other)

    def __hash__(self) -> int:
        return hash(self.value)


def watch_fused_paths(model: nn.Module) -> None:
    """Let torch's transformer layers in `model` take their fused path only while every QModule inside is BYPASSED.

    In evaluation without gradients they pass the weights of their layers to one kernel and call none of the layers.
    """
    for module in model.modules():
        for kind, switch in _SWITCHES.items():
            value = getattr(module, switch, None) if isinstance(module, kind) else None
            if value is not None and not isinstance(value, WhileFloat):
                if any(isinstance(inner, QModule) for inner in module.modules()):
                    setattr(module, switch, WhileFloat(module, value))


def unwatch_fused_paths(model: nn.Module) -> None:
    """Undo `watch_fused_paths`."""
    for module in model.modules():
        for switch in _SWITCHES.values():
            value = getattr(module, switch, None)
            if isinstance(value, WhileFloat):
                setattr(module, switch, value.value)
