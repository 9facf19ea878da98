"""Quantizers at places that are no slot of a QModule: further inputs and outputs of any module, and its other tensors.

A quantizer of an input or output is a child of the module, a `QOp` with the name of the target, which hooks call.
One of a parameter or buffer is a parametrization of torch, so that the module reads the quantized tensor.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import parametrize

from torchquant.errors import ConfigError
from torchquant.qmodule import QOp
from torchquant.qmodule.holder import Holder
from torchquant.quantizers import Quantizer

INPUT, OUTPUT = "_input_", "_output_"


def _held(module: nn.Module) -> nn.Module:
    """Return the module that computes: the one that a QModule holds, or the module itself."""
    while isinstance(module, Holder) and module.held is not None:
        module = module.held
    return module


def argument_names(module: nn.Module) -> list[str]:
    """Return the names of the arguments of a module's forward."""
    return list(inspect.signature(_held(module).forward).parameters)


def _as_it_is(x: Tensor) -> Tensor:
    return x


class TargetOp(QOp):
    """Holds the quantizer of one target."""

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__(_as_it_is, quantizer)


class QuantizedTensor(nn.Module):
    """The parametrization of a tensor that is read quantized."""

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        self.op = TargetOp(quantizer)

    def forward(self, x: Tensor) -> Tensor:
        quantized: Tensor = self.op(x)
        return quantized


class OwnHook:
    """The base of the hooks of NNI's quantizers, which are removed where the model becomes a float one again."""


class _QuantizeInputs(OwnHook):
    """Forward pre-hook that quantizes the inputs for which the module has a child."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        names, values = argument_names(module), dict(kwargs)
        given = list(args)
        for key, op in children_of(module, INPUT).items():
            index = int(key) if key.isdigit() else names.index(key)
            name = names[index] if index < len(names) else ""
            if index < len(given):
                given[index] = _real(op, given[index])
            elif name in values:
                values[name] = _real(op, values[name])
        return tuple(given), values


class _QuantizeOutputs(OwnHook):
    """Forward hook that quantizes the outputs for which the module has a child."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        for key, op in children_of(module, OUTPUT).items():
            if isinstance(output, Tensor) and key == "0":
                output = _real(op, output)
            elif isinstance(output, Mapping):
                name = list(output)[int(key)] if key.isdigit() and int(key) < len(output) else key
                _there(name in output, module, key, f"a dictionary with {', '.join(map(str, output))}")
                output[name] = _real(op, output[name])  # type: ignore[index]
            else:
                is_many = isinstance(output, list | tuple)
                n = len(output) if is_many else 1
                _there(is_many and key.isdigit() and int(key) < n, module, key, f"{n} of type {type(output).__name__}")
                items = [_real(op, item) if i == int(key) else item for i, item in enumerate(output)]
                output = type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
        return output


def _there(found: bool, module: nn.Module, key: str, what: str) -> None:
    if not found:
        raise ConfigError(f"{type(module).__name__} has no output '{OUTPUT}{key}'; it returns {what}")


def _real(op: TargetOp, x: Any) -> Any:
    return op(x) if isinstance(x, Tensor) and x.is_floating_point() else x


def children_of(module: nn.Module, kind: str) -> dict[str, TargetOp]:
    """Map the key of each quantized input, or output, to its QOp. kind: "_input_" or "_output_"."""
    return {
        name.removeprefix(kind): child
        for name, child in module.named_children()
        if name.startswith(kind) and isinstance(child, TargetOp)
    }


def put(module: nn.Module, path: str, target: str, quantizer: Quantizer) -> None:
    """Quantize the target of a module. Raises ConfigError for a tensor that the module itself writes."""
    if target.startswith((INPUT, OUTPUT)):
        kind = INPUT if target.startswith(INPUT) else OUTPUT
        if not children_of(module, kind):
            if kind == INPUT:
                module.register_forward_pre_hook(_QuantizeInputs(), with_kwargs=True)
            else:
                module.register_forward_hook(_QuantizeOutputs())
        module.add_module(target, TargetOp(quantizer).train(module.training))
        return
    if isinstance(module, _NormBase) and target in dict(module.named_buffers(recurse=False)):
        raise ConfigError(
            f"'{target}' of '{path}' cannot be quantized: the batch norm writes it in training. Name the layer and its "
            "batch norm in fuse_names instead, then its statistics are quantized with the weight"
        )
    module = _held(module)
    tensor = getattr(module, target)
    quantizer.allocate(tensor.shape[0] if tensor.ndim else 1)
    parametrize.register_parametrization(
        module, target, QuantizedTensor(quantizer.to(tensor.device)).train(module.training)
    )


def quantizer_at(module: nn.Module, target: str) -> Quantizer | None:
    """Return the quantizer that `put` has put at a target; None if there is none."""
    op: Any = module._modules.get(target)
    chains: Any = getattr(_held(module), "parametrizations", {})
    if op is None and target in chains:
        op = next((each.op for each in chains[target] if isinstance(each, QuantizedTensor)), None)
    return op.acts_quantizer if isinstance(op, TargetOp) else None


def remove_all(model: nn.Module) -> None:
    """Take all these quantizers off again, in place; tensors have their real values."""
    for module in list(model.modules()):
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, OwnHook)]:
                hooks.pop(key)
                module._forward_pre_hooks_with_kwargs.pop(key, None)
        for kind in (INPUT, OUTPUT):
            for name in children_of(module, kind):
                delattr(module, kind + name)
        for name, chain in list(getattr(module, "parametrizations", {}).items()):
            if any(isinstance(each, QuantizedTensor) for each in chain):
                _give_own_class(module)
                parametrize.remove_parametrizations(module, name, leave_parametrized=False)


def _give_own_class(module: nn.Module) -> None:
    """Let a parametrized module not share its class with its copies, from which torch takes a property."""
    kind = type(module)
    own = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    module.__class__ = type(kind.__name__, kind.__bases__, own)


def is_used(model: nn.Module) -> bool:
    """Tell whether the model has such quantizers."""
    return any(
        isinstance(module, QuantizedTensor) or children_of(module, INPUT) or children_of(module, OUTPUT)
        for module in model.modules()
    )
