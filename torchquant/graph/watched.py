"""Modules whose forwards are not traced, and whose products are quantized as they are called."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchquant.errors import ConfigError
from torchquant.graph.called import FAMILIES, SOFTMAX, CalledProduct, learn_functions, with_operands
from torchquant.graph.traced import always_graphs, subclass_with_forward
from torchquant.qmodule.aside import WatchedCalls
from torchquant.qmodule.state import QModule, QModuleState


@dataclass
class WatchedProduct:
    """A product, or a softmax, and the children of its module that look after it.

    `site`: the child that computes it; `operands`: those that quantize the operands, or the result of a softmax; ""
    where there is none.
    """

    product: CalledProduct
    site: str = ""
    operands: tuple[str, ...] = ()

    @property
    def children(self) -> tuple[str, ...]:
        """The names of the children."""
        return tuple(name for name in (self.site, *self.operands) if name)


class WatchedModule(nn.Module):
    """A module that runs the forward of its class, in which products are computed by children that quantize.

    Products are told apart by the order in which they are called, so a forward must call the same ones each time, once
    or in several rounds. In BYPASSED nothing is watched. `watch` turns a module into a WatchedModule in place, by
    giving it a subclass of its own. It can be copied and pickled.
    """

    watched: list[WatchedProduct]

    def run_watched(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the forward; its products are quantized if anything observes or quantizes."""
        if self._runs_float():
            return self._float_forward(*args, **kwargs)  # type: ignore[operator]
        calls = _Calls(self)
        with calls:
            result = self._float_forward(*args, **kwargs)  # type: ignore[operator]
        n_watched = len(calls.watched)
        if calls.n_calls != n_watched and (calls.n_calls % n_watched or not calls.watched[0].product.loops):
            raise calls.other("it stopped")
        return result

    def _runs_float(self) -> bool:
        for watched in self.__dict__["watched"]:
            for name in watched.children:
                child = self._modules[name]
                if not isinstance(child, QModule) or child._state is not QModuleState.BYPASSED or always_graphs():
                    return False
        return True

    def __reduce__(self) -> tuple[Any, ...]:
        return empty_watched, (type(self).__mro__[2],), self.__dict__


class _Calls(WatchedCalls):
    """The calls of one forward. `n_calls`: the number of products and softmaxes so far."""

    def __init__(self, module: WatchedModule) -> None:
        super().__init__()
        self.module, self.watched, self.n_calls = module, module.__dict__["watched"], 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.paused or func not in FAMILIES:
            return func(*args, **kwargs)
        watched = self.watched[self.n_calls % len(self.watched)]
        operator = watched.product.operator
        if FAMILIES[func] != operator:
            raise self.other(f"it calls {FAMILIES[func]}")
        self.n_calls += 1
        if operator == SOFTMAX:
            value = func(*args, **kwargs)
            return self._quantized(watched, 0, value) if watched.operands else value
        if not watched.site:
            return func(*args, **kwargs)
        args, kwargs = with_operands(operator, args, kwargs, lambda i, x: self._quantized(watched, i, x))
        return self.module._modules[watched.site](*args, **kwargs)  # type: ignore[misc]

    def _quantized(self, watched: WatchedProduct, i: int, x: Tensor) -> Tensor:
        name = watched.operands[i]
        if not name:
            return x
        quantized: Tensor = self.module._modules[name](x)  # type: ignore[misc]
        return quantized

    def other(self, what: str) -> Exception:
        """Make the error for a forward that calls other products than on the example."""
        known = ", ".join(watched.product.operator for watched in self.watched)
        kind = RuntimeError if torch.compiler.is_compiling() else ConfigError  # dynamo knows no classes of our own
        return kind(
            f"{type(self.module).__name__} calls other products than when it was quantized: {known}; now {what} after "
            f"{self.n_calls}, so that it is not known which quantizers belong to them. Quantize the float model with "
            "an example of this call, with the same attention implementation, or skip its sites: "
            '{"types": ["matmul", "attention"], "skip": True}'
        )


def watch(module: nn.Module, watched: list[WatchedProduct]) -> None:
    """Let children of the module compute its products from now on."""
    learn_functions()
    module.__class__ = _watched_class(type(module))
    module.__dict__["watched"] = watched


def unwatch(module: WatchedModule, removes: bool = False) -> None:
    """Let the module run only the forward of its class again. `removes`: remove the children that were added too."""
    for watched in module.__dict__.pop("watched"):
        for name in watched.children if removes else ():
            module._modules.pop(name, None)
    module.__class__ = type(module).__mro__[2]


def empty_watched(kind: type[nn.Module]) -> nn.Module:
    """Make a WatchedModule without its state."""
    learn_functions()
    made = _watched_class(kind)
    return made.__new__(made)


def _watched_class(kind: type[nn.Module]) -> type[nn.Module]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.run_watched(args, kwargs)

    return subclass_with_forward(WatchedModule, kind, forward)
