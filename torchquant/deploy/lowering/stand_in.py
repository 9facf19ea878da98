"""Modules that replace others in a lowered model and answer attribute reads in their place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from torchquant.errors import ExportError
from torchquant.qmodule.aside import RunsAside


class StandIn(RunsAside):
    """A module that answers reads of missing attributes from the module that it replaces, `stands_for`.

    Model code that reads the stride of a layer, or the type of its weight, therefore keeps working. `path` names it in
    messages. `float_module`: the replaced module, until `leave_out` knows which stand-ins run.
    """

    stands_for: ClassVar[str] = "layer"
    runs: ClassVar[dict[str, str]] = {"the module": "", "its layer": "layer"}
    """Parts that it computes without calling them: name in messages -> attribute of the QModule, "" for itself."""

    def __init__(self, path: str, float_module: nn.Module | None) -> None:
        super().__init__()
        self.path = path
        self.__dict__["float_module"] = float_module  # no child: its weights are in no file

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            inside = self.__dict__.get(self.stands_for, self.__dict__.get("_modules", {}).get(self.stands_for))
            if inside is None or name.startswith("__"):
                raise
            return getattr(inside, name)


class PassedOn(StandIn):
    """Replaces a batch norm or an activation that another module runs."""

    stands_for: ClassVar[str] = "part"

    def __init__(self, path: str, part: nn.Module) -> None:
        super().__init__(path, None)
        self.part = part

    def forward(self, x: Any) -> Any:
        return x


class LeftOut(StandIn):
    """Replaces a QModule that is not in the file: reads get the float module, and running it is an error."""

    def __init__(self, path: str, layer: nn.Module | None, error: ExportError) -> None:
        super().__init__(path, None)
        self.layer = layer
        self.error = error

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise self.error


def leave_out(form: nn.Module, run: Callable[[], Any]) -> tuple[str, ...]:
    """Call `run`, and replace each stand-in of a QModule that did not run by `LeftOut`. Returns their paths."""
    there = {m: path for path, m in form.named_modules() if isinstance(m, StandIn) and not isinstance(m, PassedOn)}
    ran: set[nn.Module] = set()
    handles = [module.register_forward_pre_hook(lambda module, args: ran.add(module)) for module in there]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    new = {module: module if isinstance(module, LeftOut) else _left_out(module) for module in there.keys() - ran}
    for owner in list(form.modules()):
        owner._modules.update({name: new[child] for name, child in owner._modules.items() if child in new})
    for module in there:
        module.__dict__["float_module"] = None
    return tuple(module.path for module in there if module in new)


def _left_out(module: Any) -> LeftOut:
    error = ExportError(
        f"{module.path} did not run on the example inputs, so the lowered model leaves it out, but it runs now. Give "
        "example inputs on which the model runs every part that you need"
    )
    return LeftOut(module.path, module.float_module, error)


class PassesForTensor(nn.Module):
    """A module that acts as a tensor: it has the tensor's attributes and methods, and torch functions take it.

    A subclass returns the tensor from `real`, and may return single rows from `rows(index)` without computing the rest.
    """

    def real(self) -> Tensor:
        """Return the tensor."""
        raise NotImplementedError

    def rows(self, index: Tensor) -> Tensor:
        """Return `real()[index]`. index: (*) whole numbers."""
        return self.real()[index]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or not hasattr(Tensor, name):
                raise
            return getattr(self.real(), name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.embedding and isinstance(args[1], PassesForTensor) and kwargs.get("max_norm") is None:
            return args[1].rows(args[0])
        args, kwargs = tree_map_only(PassesForTensor, lambda module: module.real(), (tuple(args), kwargs))
        return func(*args, **kwargs)


def _as_the_tensor(name: str) -> Callable[..., Any]:
    def method(self: PassesForTensor, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map_only(PassesForTensor, lambda module: module.real(), (args, kwargs))
        return getattr(self.real(), name)(*args, **kwargs)

    return method


OF_TENSORS = (
    *("to", "type", "float", "double", "half", "bfloat16", "cpu", "cuda"),  # a module has these too
    *(f"__{side}{name}__" for side in ("", "r") for name in ("add", "sub", "mul", "truediv", "pow", "matmul")),
    *("__neg__", "__abs__", "__getitem__"),
)
for _name in OF_TENSORS:
    setattr(PassesForTensor, _name, _as_the_tensor(_name))
