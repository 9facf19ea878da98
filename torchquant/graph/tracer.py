"""Trace a forward with torch.fx, and detect everything that a graph of it would lose.

A graph only repeats the operators on its values. Everything else that Python does in a forward is watched here:
attributes that are read become `Guard`s, under which the graph holds; if a module writes attributes, draws random
numbers in Python, switches gradients off or uses tensors from elsewhere, it is called as a whole.
"""

from __future__ import annotations

import math
import operator
import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from torchquant._modes import has_hooks
from torchquant.graph.calls import Signature, filled, names_of
from torchquant.graph.guards import STORES, Guard, read_global, read_now
from torchquant.graph.hooks import run_hooks, run_pre_hooks
from torchquant.graph.ops import about_tensors, is_of_torch, name_of, tells_of_tensors
from torchquant.graph.outside import globals_kept, globals_of, random_states, random_states_kept

_FACTORIES = (
    *("zeros", "ones", "full", "empty", "arange", "linspace", "logspace", "eye", "rand", "randn", "randint"),
    *("randperm", "tensor", "as_tensor", "normal", "tril_indices", "triu_indices", "hann_window"),
)
"""Functions of torch that do not take a traced size as an argument."""
_OF_MODULE = frozenset(dir(nn.Module())) - {"training", "forward"}
_CHILDREN = {"_modules", "children", "named_children", "modules", "named_modules"}
_TORCH = os.path.dirname(torch.__file__)
_NUMBERS = {"tolist", "item"}
_SEVERAL = {"chunk", "split", "unbind", "topk", "max", "min", "sort", "tensor_split", "meshgrid", "where", "nonzero"}


class NotTraceable(Exception):  # noqa: N818 - not an error: the caller has an alternative
    """Raised with the reason why a forward has no graph."""


@dataclass
class Traced:
    """A forward as a graph, with the guards it depends on.

    `inlined`: paths of the modules whose forwards are in the graph. `walked`: paths of the modules whose children
    Python iterated over.
    """

    graph: fx.Graph
    guards: tuple[Guard, ...]
    inlined: tuple[str, ...]
    walked: frozenset[str] = frozenset()


class _Value(fx.Proxy):
    """A value in a graph. A tensor passes isinstance checks for Tensor, so that forwards take the right path."""

    @property
    def __class__(self) -> type:
        node = self.__dict__["node"]
        return Tensor if _is_tensor(node) else _Value

    @__class__.setter
    def __class__(self, value: type) -> None:
        raise TypeError("the class of a traced value cannot be set")


def _in_place(name: str) -> Callable[[_Value, Any], Any]:
    """Make `x += y` and similar operators: in place if x is a tensor, a new number if it is a size."""
    write, compute = getattr(operator, f"i{name}"), getattr(operator, name)

    def operate(self: _Value, other: Any) -> Any:
        is_size = self.node in about_tensors(self.tracer.graph)
        return self.tracer.create_proxy("call_function", compute if is_size else write, (self, other), {})

    return operate


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul"):
    setattr(_Value, f"__i{_name}__", _in_place(_name))


def _is_tensor(node: fx.Node) -> bool:
    """Tell whether the value of a node certainly is a tensor, as far as its operator shows."""
    name = name_of(node)
    if node.op in ("placeholder", "get_attr"):
        return True
    if node.op == "call_method":
        return name not in _NUMBERS | _SEVERAL and not tells_of_tensors(name)
    if node.op == "call_function" and is_of_torch(node) and name not in _SEVERAL | {"getattr", "getitem"}:
        return any(_is_tensor(source) for source in node.all_input_nodes)
    return False


class Tracer(fx.Tracer):
    """Traces one forward with one pattern of arguments, in the current modes of the modules.

    `is_leaf`: whether a module is called as a whole. After a failure `culprit` is the innermost module that cannot be
    traced, and `reason` says why.
    """

    proxy_buffer_attributes = True

    def __init__(
        self,
        is_leaf: Callable[[nn.Module], bool],
        signature: Signature,
        pattern: tuple[Any, ...],
        untouched: tuple[Callable[..., Any], ...] = (),
    ) -> None:
        """Prepare a trace. `untouched`: functions that are called without tracing into them."""
        super().__init__(autowrap_modules=(math,), autowrap_functions=untouched)
        self.is_leaf, self.signature, self.pattern = is_leaf, signature, pattern
        self.culprit: nn.Module | None = None
        self.reason = ""
        self.running: list[nn.Module] = []
        self.reads: dict[tuple[int, str], tuple[nn.Module, str, Any]] = {}
        self.globals: dict[tuple[str, str], Any] = {}
        self.paths: dict[int, str] = {}
        self.inlined: dict[str, None] = {}
        self.walked: set[str] = set()
        self.is_watching = False
        self.in_fx = 0

    def follow(self, module: nn.Module) -> Traced:
        """Trace the module's forward. Raises NotTraceable, or any error of its code."""
        if "forward" in vars(module):
            raise NotTraceable("its forward was replaced on the object and differs from that of its class")
        self.paths = {id(m): path for path, m in module.named_modules(remove_duplicate=False)}
        self.paths[id(module)] = ""
        self.running = [module]
        before = _insides(module)
        state = random_states()
        with random_states_kept(), globals_kept(module):
            graph = self.trace(module)
            changed = random_states() != state
            self._note_globals(module)
        self._note_changes(module, before)
        if self.reason or changed:
            raise NotTraceable(self.reason or "it draws random numbers in Python")
        guards = [Guard(self.paths[id(m)], name, value) for m, name, value in self.reads.values()]
        guards += [Guard(where, name, value, True) for (where, name), value in self.globals.items()]
        return Traced(graph, tuple(guards), tuple(self.inlined), frozenset(self.walked))

    def refuse(self, reason: str, module: nn.Module | None = None) -> None:
        """Record that the running module cannot be traced, even if its code catches the exception."""
        if not self.reason:
            self.reason = reason
            self.culprit = self.culprit or module or self.running[-1]
        raise NotTraceable(reason)

    def _note_changes(self, root: nn.Module, before: dict[int, dict[str, dict[str, Any]]]) -> None:
        """Refuse a forward that changed attributes of modules, or a global, without being noticed during the trace."""
        for module in root.modules():
            for store, entries in before[id(module)].items():
                now = vars(module) if store == "" else vars(module)[store]
                changed = [name for name in {**entries, **now} if now.get(name, self) is not entries.get(name, self)]
                if changed and not self.reason:
                    self.culprit, self.reason = module, f"it writes the attribute '{changed[0]}'"
        for module, name, value in self.reads.values():
            if read_now(module, name) != value and not self.reason:
                self.culprit, self.reason = module, f"it changes the contents of the attribute '{name}'"

    def _note_globals(self, root: nn.Module) -> None:
        for (where, name), value in self.globals.items():
            if read_global(where, name) != value and not self.reason:
                self.culprit, self.reason = root, f"it changes the global '{name}'"

    # the methods that fx calls

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        self.in_fx += 1  # our own reads of a module are not reads of its forward
        try:
            return self.is_leaf(m)
        finally:
            self.in_fx -= 1

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        tensors = [self.create_proxy("placeholder", name, (), {}) for name in names_of(self.signature, self.pattern)]
        args, kwargs = self.signature.unbind(filled(self.pattern, iter(tensors)))

        def run(*args: Any) -> Any:
            with self._watch():
                self._enter(self.root)
                return root_fn(*args, **kwargs)

        return run, [self.root, *args]

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if id(m) not in self.paths:
            self.refuse(f"it calls a {type(m).__name__} that is not one of its registered modules")
        is_leaf = self.is_leaf_module(m, self.paths[id(m)])
        before = None if is_leaf else random_states()
        if not is_leaf:
            self.running.append(m)
            self._enter(m)
        try:
            if is_leaf or not has_hooks(m):
                result = super().call_module(m, forward, args, kwargs)
            else:
                result = self._call_with_hooks(m, args, kwargs)
        except Exception:
            self.culprit = self.culprit or (self.running[-1] if self.running else m)
            raise
        finally:
            if not is_leaf:
                self.running.pop()
        if before is not None and random_states() != before:
            self.refuse("it draws random numbers in Python", m)
        return result

    def _call_with_hooks(self, m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Trace the forward of a module between calls that run the hooks which it has when the graph runs."""
        if m._backward_hooks or m._backward_pre_hooks:
            self.refuse("it has backward hooks", m)
        given: Any = self.create_proxy("call_function", run_pre_hooks, (m, args, kwargs), {})
        args = tuple(given[0][i] for i in range(len(args)))
        kwargs = {name: given[1][name] for name in kwargs}
        result = super().call_module(m, lambda *a, **k: m.forward(*a, **k), args, kwargs)
        return self.create_proxy("call_function", run_hooks, (result, m, args, kwargs), {})

    def _enter(self, module: nn.Module) -> None:
        self.inlined.setdefault(self.paths[id(module)])
        forward = vars(module).get("forward") or type(module).forward
        for where, name, value in globals_of(forward):
            self.globals.setdefault((where, name), value)

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> fx.Node:
        node = super().create_node(kind, target, args, kwargs, *rest, **more)
        if self.is_watching:
            if kind.startswith("call") and _modes() != self.modes:
                self.refuse("it switches gradients, autocast or inference mode")
            node.meta["where"] = _where(), next(reversed(self.module_stack), "")
        return node

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        self.in_fx += 1
        try:
            return super().getattr(attr, attr_val, parameter_proxy_cache)
        finally:
            self.in_fx -= 1

    def create_arg(self, a: Any) -> Any:
        self.in_fx += 1
        try:
            return self._create_arg(a)
        finally:
            self.in_fx -= 1

    def _create_arg(self, a: Any) -> Any:
        kind = type(a)
        if kind is _Value:
            return a.node
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter):
            if not any(a is buffer for buffer in self.root.buffers()) and a not in self.tensor_attrs:
                self.refuse("it uses a tensor that is not a parameter, buffer or attribute of its modules")
        if isinstance(a, dict) and kind not in (dict, OrderedDict):
            return self._create_mapping(a)
        if kind is OrderedDict:
            pairs = [(key, self.create_arg(value)) for key, value in a.items()]
            return self.create_node("call_function", OrderedDict, (pairs,), {})
        if isinstance(a, tuple | list) and kind not in (tuple, list, torch.Size) and not hasattr(a, "_fields"):
            self.refuse(f"it makes a {kind.__name__}")
        return super().create_arg(a)

    def _create_mapping(self, a: Any) -> Any:
        """Record a dictionary of a special class, such as the outputs of models of transformers."""
        if not hasattr(a, "__dataclass_fields__"):
            self.refuse(f"it makes a {type(a).__name__}")
        entries = {key: self.create_arg(value) for key, value in a.items()}
        return self.create_node("call_function", type(a), (), entries)

    def to_bool(self, obj: fx.Proxy) -> bool:
        return self.refuse("it branches on the values of a tensor, or on its size")  # type: ignore[func-returns-value, return-value]

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        try:
            return super().iter(obj)
        except fx.proxy.TraceError:
            self.refuse("it loops over a tensor, or unpacks one")
            raise

    # side effects that are watched

    @contextmanager
    def _watch(self) -> Iterator[None]:
        self.modes = _modes()
        kept = {name: getattr(torch, name) for name in (*_FACTORIES, "is_grad_enabled")}
        setattr_, delattr_ = nn.Module.__setattr__, nn.Module.__delattr__

        def getattribute(module: nn.Module, name: str) -> Any:
            try:
                value = object.__getattribute__(module, name)
            except AttributeError:
                self._note_read(module, name)
                raise
            return self._note_read(module, name, value)

        def write(module: nn.Module, name: str, value: Any) -> None:
            self._refuse_write(module, name)
            setattr_(module, name, value)

        def delete(module: nn.Module, name: str) -> None:
            self._refuse_write(module, name)
            delattr_(module, name)

        def asks_for_gradients() -> bool:
            return self.refuse("it reads whether gradients are recorded")  # type: ignore[func-returns-value, return-value]

        nn.Module.__getattribute__ = getattribute  # type: ignore[method-assign, assignment]
        nn.Module.__setattr__, nn.Module.__delattr__ = write, delete  # type: ignore[method-assign, assignment]
        self.is_watching = True
        try:
            for name in _FACTORIES:
                setattr(torch, name, self._recorded(kept[name]))
            torch.is_grad_enabled = asks_for_gradients
            with _TorchCalls(self):
                yield
        finally:
            self.is_watching = False
            del nn.Module.__getattribute__
            nn.Module.__setattr__, nn.Module.__delattr__ = setattr_, delattr_  # type: ignore[method-assign]
            for name, function in kept.items():
                setattr(torch, name, function)

    def _recorded(self, factory: Callable[..., Any]) -> Callable[..., Any]:
        def make(*args: Any, **kwargs: Any) -> Any:
            if any(type(a) is _Value for a in tree_leaves((args, kwargs))):
                return self.create_proxy("call_function", factory, args, kwargs)
            return factory(*args, **kwargs)

        return make

    def _note_read(self, module: nn.Module, name: str, value: Any = None) -> Any:
        if not self.is_watching or self.in_fx or id(module) not in self.paths:
            return value
        if name in _CHILDREN:
            self.walked.add(self.paths[id(module)])
        if name in _OF_MODULE or name.startswith("__"):
            return value
        key = id(module), name
        if key not in self.reads:
            self.reads[key] = module, name, read_now(module, name)
        if isinstance(value, Tensor) and not isinstance(value, fx.Proxy) and name in vars(module):
            return self.create_proxy("get_attr", ".".join(filter(None, (self.paths[id(module)], name))), (), {})
        return value

    def _refuse_write(self, module: nn.Module, name: str) -> None:
        if self.is_watching and id(module) in self.paths:
            self.refuse(f"it writes the attribute '{name}'")

    def call_without_values(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Handle a torch function without arguments from the graph: run it if it returns a fact, else record it."""
        name = getattr(function, "__name__", "")
        if any(isinstance(a, Tensor) for a in tree_leaves((args, kwargs))):
            if name != "__get__" and not tells_of_tensors(name):
                self.refuse("it uses a tensor that is not a parameter, buffer or attribute of its modules")
            result = function(*args, **kwargs)
            if isinstance(result, Tensor):
                self.refuse("it uses a tensor that is not a parameter, buffer or attribute of its modules")
            return result
        state = torch.get_rng_state()
        result = function(*args, **kwargs)
        if not isinstance(result, Tensor):
            return result
        torch.set_rng_state(state)
        return self.create_proxy("call_function", function, args, kwargs)


class _TorchCalls(TorchFunctionMode):
    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.tracer.is_watching or any(isinstance(a, fx.Proxy) for a in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        return self.tracer.call_without_values(func, args, kwargs)


def _modes() -> tuple[Any, ...]:
    """Return the global switches of torch that a forward can change around its operators."""
    autocast = tuple(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))
    return torch._C.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast, torch.get_default_dtype()


def _insides(root: nn.Module) -> dict[int, dict[str, dict[str, Any]]]:
    """Return the attributes, parameters, buffers and submodules of every module, by the identity of the module."""
    return {
        id(m): {"": dict(vars(m)), **{store: dict(vars(m)[store]) for store in (*STORES, "_modules")}}
        for m in root.modules()
    }


def _where() -> tuple[str, int]:
    """Return function and line of the code that is being traced."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if file != __file__ and not file.startswith(_TORCH):
            return frame.f_code.co_name, frame.f_lineno
        frame = frame.f_back
    return "", 0
