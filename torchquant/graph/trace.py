"""A module's forward as a torch.fx graph that runs the same in training and in evaluation.

`traced_graph` gives the graph, or the reason why there is none; `install_graph` lets the module run it.
"""

from __future__ import annotations

import importlib
import inspect
import linecache
import math
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, zip_longest
from typing import Any

from torch import fx, nn

from torchquant.qmodule.patterns import LayerRow, row_of

MAX_RETRIES = 50
FLAG = "training_flag"
"""Where a module keeps the TrainingFlag of its graph."""
_ONE_THING = re.compile("Norm|Activation|GELU|Swish|Softmax|Rotary")
"""Classes of other packages that compute one function, though they may write it with several operators."""
_numbers = count()


class TrainingFlag(nn.Module):
    """Answers `self.training` in a graph."""

    def forward(self) -> bool:
        """Whether the model trains."""
        return self.training


class NotTraceable(Exception):  # noqa: N818 - not an error: the caller goes another way
    """Why a forward has no graph, in words."""


def constant_arguments(module: nn.Module) -> dict[str, Any]:
    """The arguments that keep their default in a graph; those without one are tensors. Raises NotTraceable."""
    parameters = inspect.signature(module.forward).parameters.values()
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        raise NotTraceable("its forward takes *args or **kwargs")
    if all(p.default is not p.empty for p in parameters):
        raise NotTraceable("its forward has no argument without a default")
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def has_hooks(module: nn.Module) -> bool:
    """Whether someone watches the calls of the module."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def stays_whole(module: nn.Module) -> bool:
    """Whether a graph calls the module and does not look into it."""
    if has_hooks(module) or row_of(module) is not None:
        return True
    kind = type(module)
    if kind.__module__.startswith("torch.nn") and not isinstance(module, nn.Sequential):
        return True
    is_one_thing = _ONE_THING.search(kind.__name__) is not None
    return is_one_thing and not any(isinstance(row_of(m), LayerRow) for m in module.modules())


class _Tracer(fx.Tracer):
    """Remembers the innermost module whose forward could not be followed."""

    def __init__(self, whole: set[type[nn.Module]]) -> None:
        super().__init__(autowrap_modules=(math,), autowrap_functions=_functions_of_timm())
        self.whole = whole
        self.culprit: nn.Module | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in self.whole or stays_whole(m)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.culprit = self.culprit or m
            raise


def _functions_of_timm() -> tuple[Callable[..., Any], ...]:
    """What timm marks as not to be traced, if timm is in use."""
    features = sys.modules.get("timm.layers._fx") or sys.modules.get("timm.models._features_fx")
    listed = getattr(features, "get_notrace_functions", None)
    return tuple(listed()) if listed is not None else ()


def traced_graph(module: nn.Module) -> fx.Graph:
    """The forward of the module as a graph; parts that cannot be followed stay calls of whole modules.

    Raises NotTraceable if the module's own forward cannot be followed, or does other things in training
    than in evaluation.
    """
    constants = constant_arguments(module)
    whole: set[type[nn.Module]] = set()
    for _ in range(MAX_RETRIES):
        tracer = _Tracer(whole)
        try:
            in_training = _trace(tracer, module, constants, True)
            in_evaluation = _trace(tracer, module, constants, False)
        except Exception as error:
            if tracer.culprit is None or type(tracer.culprit) in whole:
                raise NotTraceable(f"torch.fx cannot follow its forward ({_first_line(error)})") from error
            whole.add(type(tracer.culprit))
            continue
        different = _unify(in_training, in_evaluation)
        if different is None:
            _drop_identities(module, in_training)
            return in_training
        culprit = _innermost(module, different)
        if culprit is None or type(culprit) in whole:
            raise NotTraceable("it does other things in training than in evaluation")
        whole.add(type(culprit))
    raise NotTraceable(f"more than {MAX_RETRIES} kinds of modules in it cannot be followed")


def _drop_identities(module: nn.Module, graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if node.op == "call_module" and node.target != FLAG:
            called = module.get_submodule(str(node.target))
            if type(called) is nn.Identity and not has_hooks(called):
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _trace(tracer: _Tracer, module: nn.Module, constants: dict[str, Any], training: bool) -> fx.Graph:
    with in_mode(training, module):
        return tracer.trace(module, concrete_args=constants or None)


@contextmanager
def in_mode(training: bool, *models: nn.Module) -> Iterator[None]:
    """Every module in training or in evaluation, each back in its own mode after that."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = training
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _innermost(module: nn.Module, node: fx.Node) -> nn.Module | None:
    """The module in whose forward the node stands, if that is not `module` itself."""
    path = module_path(node)
    return module.get_submodule(path) if path else None


def module_path(node: fx.Node) -> str:
    """Path of the module in whose forward the node stands."""
    stack = node.meta.get("nn_module_stack") or {"": ("", None)}
    return next(reversed(stack.values()))[0]


def _unify(graph: fx.Graph, other: fx.Graph) -> fx.Node | None:
    """Let `graph` ask for the mode where `other`, of the other mode, differs; or the first node that is another."""
    flagged: list[tuple[fx.Node, Any, Any]] = []
    for node, twin in zip_longest(graph.nodes, other.nodes):
        if node is None or twin is None or (node.op, node.target, node.name) != (twin.op, twin.target, twin.name):
            return node or twin
        if str(node.args) != str(twin.args) or str(node.kwargs) != str(twin.kwargs):
            flagged.append((node, twin.args, twin.kwargs))
    flag: fx.Node | None = None
    for node, args, kwargs in flagged:
        if not (_differ_by_mode(node.args, args) and _differ_by_mode(node.kwargs, kwargs)):
            return node
        if flag is None:
            first = next(n for n in graph.nodes if n.op != "placeholder")
            with graph.inserting_before(first):
                flag = graph.call_module(FLAG)
        node.args = _with_flag(node.args, args, flag)
        node.kwargs = _with_flag(node.kwargs, kwargs, flag)
    return None


def _differ_by_mode(value: Any, other: Any) -> bool:
    """Whether the two are the same but for True in training where the other has False."""
    if isinstance(value, tuple | list) and isinstance(other, tuple | list):
        return len(value) == len(other) and all(map(_differ_by_mode, value, other))
    if isinstance(value, dict) and isinstance(other, dict):
        return value.keys() == other.keys() and all(_differ_by_mode(value[k], other[k]) for k in value)
    return (value is True and other is False) or str(value) == str(other)


def _with_flag(value: Any, other: Any, flag: fx.Node) -> Any:
    if isinstance(value, tuple | list):
        return type(value)([_with_flag(v, o, flag) for v, o in zip(value, other, strict=True)])
    if isinstance(value, dict):
        return {k: _with_flag(v, other[k], flag) for k, v in value.items()}
    return flag if value is True and other is False else value


class TracedModule(nn.Module):
    """A module that runs a graph in place of its class' forward; all else of its class stays.

    `install_graph` makes one of a module, in place, by giving it a subclass of its own. Copies and pickles.
    """

    graph: fx.Graph

    def __reduce__(self) -> tuple[Any, ...]:
        rest = {name: value for name, value in self.__dict__.items() if name != "graph"}
        return _empty_traced, (type(self).__mro__[2], _flat(self.graph)), rest


@dataclass(frozen=True)
class _NodeRef:
    """A node, by name: a graph pickled as it is recurses as deep as it is long."""

    name: str


def _flat(graph: fx.Graph) -> list[tuple[Any, ...]]:
    def refer(value: Any) -> Any:
        return fx.node.map_arg(value, lambda node: _NodeRef(node.name))  # type: ignore[arg-type, return-value]

    return [(n.name, n.op, _named(n.target), refer(n.args), refer(n.kwargs), n.type) for n in graph.nodes]


@dataclass(frozen=True)
class _FunctionRef:
    """A function by where it can be found: pickle does not find F.max_pool2d, which is made inside another."""

    module: str
    name: str


def _named(target: Any) -> Any:
    if "<locals>" not in getattr(target, "__qualname__", ""):
        return target
    return _FunctionRef(target.__module__, target.__name__)


def _unflat(flat: list[tuple[Any, ...]]) -> fx.Graph:
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}

    def resolve(value: Any) -> Any:
        if isinstance(value, _NodeRef):
            return nodes[value.name]
        if isinstance(value, tuple | list):
            parts = [resolve(v) for v in value]
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        if isinstance(value, dict):
            return {k: resolve(v) for k, v in value.items()}
        if isinstance(value, slice):
            return slice(resolve(value.start), resolve(value.stop), resolve(value.step))
        return value

    for name, op, target, args, kwargs, kind in flat:
        if isinstance(target, _FunctionRef):
            target = getattr(importlib.import_module(target.module), target.name)
        nodes[name] = graph.create_node(op, target, resolve(args), resolve(kwargs), name, kind)
    return graph


def _empty_traced(kind: type[nn.Module], flat: list[tuple[Any, ...]]) -> nn.Module:
    graph = _unflat(flat)
    made = _traced_class(kind, graph)
    module = made.__new__(made)
    module.__dict__["graph"] = graph
    return module


def _traced_class(kind: type[nn.Module], graph: fx.Graph) -> type[nn.Module]:
    code = graph.python_code("self")
    name = f"<torchquant graph {next(_numbers)} of {kind.__name__}>"
    linecache.cache[name] = (len(code.src), None, code.src.splitlines(keepends=True), name)
    scope = dict(code.globals)
    exec(compile(code.src, name, "exec"), scope)
    members = {"forward": scope["forward"], "__module__": kind.__module__, "__doc__": kind.__doc__}
    return type(kind.__name__, (TracedModule, kind), members)


def install_graph(module: nn.Module, graph: fx.Graph) -> None:
    """Let the module run the graph from now on."""
    uses_flag = any(node.op == "call_module" and node.target == FLAG for node in graph.nodes)
    if uses_flag:
        flag = TrainingFlag()
        flag.training = module.training
        module.add_module(FLAG, flag)
    graph.lint()
    module.__class__ = _traced_class(type(module), graph)
    module.__dict__["graph"] = graph


def remove_graph(module: nn.Module) -> None:
    """Let the module run the forward of its class again."""
    assert isinstance(module, TracedModule)
    module._modules.pop(FLAG, None)
    del module.graph
    module.__class__ = type(module).__mro__[2]
