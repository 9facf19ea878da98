"""Trace a module's forward as torch.fx graphs, one for each path: in training, in evaluation, with other arguments.

`traced_variants` returns the graphs, or raises the reason why there are none. A submodule that cannot be traced stays a
call of a whole module, which is then traced by itself.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx, nn

from torchquant._modes import has_hooks, in_mode
from torchquant.graph.calls import Signature
from torchquant.graph.copies import copy_model
from torchquant.graph.flat import FunctionRef as _FunctionRef  # noqa: F401 - old pickles look here
from torchquant.graph.flat import NodeRef as _NodeRef  # noqa: F401
from torchquant.graph.operators import OPERATORS
from torchquant.graph.ops import is_norm, name_of
from torchquant.graph.traced import TracedModule as TracedModule
from torchquant.graph.traced import TrainingFlag as TrainingFlag
from torchquant.graph.traced import empty_traced as _empty_traced  # noqa: F401
from torchquant.graph.tracer import NotTraceable as NotTraceable
from torchquant.graph.tracer import Traced, Tracer
from torchquant.graph.writes import order_writes
from torchquant.qmodule.patterns import LayerPattern, row_of
from torchquant.qmodule.weights import weight_names

MAX_RETRIES = 50
_ONE_THING = re.compile("Activation|GELU|Swish|Softmax|Rotary")
"""Classes of other packages that compute one function, though possibly with several operators."""


def stays_whole(module: nn.Module, through_hooks: bool = False) -> bool:
    """Tell whether a graph calls the module without tracing into it. `through_hooks`: hooks alone are no reason."""
    if row_of(module) is not None or weight_names(module) or (has_hooks(module) and not through_hooks):
        return True
    kind = type(module)
    if kind.__module__.startswith("torch.nn") and not isinstance(module, nn.Sequential) or OPERATORS.has_target(kind):
        return True
    is_one_thing = is_norm(module) or _ONE_THING.search(kind.__name__) is not None
    return is_one_thing and not any(isinstance(row_of(m), LayerPattern) for m in module.modules())


def _functions_of_timm() -> tuple[Callable[..., Any], ...]:
    """Return the functions and modules that timm excludes from tracing, if timm is loaded."""
    features = sys.modules.get("timm.layers._fx") or sys.modules.get("timm.models._features_fx")
    listed = getattr(features, "get_notrace_functions", None)
    return tuple(listed()) if listed is not None else ()


def pattern_without_example(module: nn.Module) -> tuple[Any, ...]:
    """Return the default call of a forward: tensors for arguments without default. Raises NotTraceable."""
    pattern = Signature.of(type(module).forward).default_pattern()
    if pattern is None:
        raise NotTraceable("its forward has no argument without a default; give example_inputs")
    return pattern


def traced_graph(module: nn.Module) -> fx.Graph:
    """Trace the forward of the module in evaluation. Raises NotTraceable."""
    (traced,) = traced_variants(module, pattern_without_example(module), (False,))
    return traced.graph


def traced_variants(
    module: nn.Module,
    pattern: tuple[Any, ...],
    modes: Sequence[bool | None] = (False, True),
    through_hooks: bool = False,
) -> list[Traced]:
    """Trace the module's forward in each mode; once, if it does not read the mode. None: in the current modes.

    Each trace uses a new copy of the module, so that a trace does not see Python side effects of another. Raises
    NotTraceable if a forward cannot be traced.
    """
    whole: set[type[nn.Module] | str] = set()
    for _ in range(MAX_RETRIES):
        found: list[Traced] = []
        for mode in modes:
            traced = _traced_once(module, pattern, mode, whole, through_hooks)
            if traced is None:
                break
            found.append(traced)
            if not any(guard.name == "training" for guard in traced.guards):
                return found
        else:
            return found
    raise NotTraceable(f"more than {MAX_RETRIES} kinds of modules in it cannot be traced")


def _traced_once(
    module: nn.Module,
    pattern: tuple[Any, ...],
    mode: bool | None,
    whole: set[type[nn.Module] | str],
    through_hooks: bool,
) -> Traced | None:
    """Trace one graph; None if another kind of module turned out to need a call as a whole."""
    module = copy_model(module, shared=(*module.parameters(), *module.buffers()))
    for part in module.modules():
        row_of(part)  # row_of may run its forward, which must not happen during another trace

    def is_leaf(m: nn.Module) -> bool:
        return type(m) in whole or tracer.paths[id(m)] in whole or stays_whole(m, through_hooks)

    untouched = (*_functions_of_timm(), *OPERATORS.own_functions())
    tracer = Tracer(is_leaf, Signature.of(type(module).forward), pattern, untouched)
    culprit: nn.Module | None = None
    try:
        with in_mode(bool(mode), *([] if mode is None else [module])):
            traced = tracer.follow(module)
    except Exception as error:
        reason = f"torch.fx cannot trace its forward ({tracer.reason or _first_line(error)})"
        culprit = tracer.culprit
        cause: Exception | None = error
    else:
        write = order_writes(traced.graph, module)
        if write is None:
            _drop_identities(module, traced.graph)
            _number(traced.graph)
            return traced
        reason, cause = "it reads a tensor through another view after writing to it in place", None
        culprit = module.get_submodule(owner_path(write))
    path = "" if culprit is None else tracer.paths[id(culprit)]
    if culprit is None or path == "" or path in whole:
        raise NotTraceable(reason) from cause
    is_container = isinstance(culprit, nn.Sequential) or type(culprit) in whole
    whole.add(path if is_container or type(culprit) is type(module) else type(culprit))
    return None


def _drop_identities(module: nn.Module, graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if node.op == "call_module":
            called = module.get_submodule(str(node.target))
            if type(called) is nn.Identity and not has_hooks(called):
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)


def _number(graph: fx.Graph) -> None:
    """Give every node a key in `meta["is"]` that is unique and the same in every graph of the forward."""
    counts: Counter[Any] = Counter()
    for node in graph.nodes:
        key = node.op, name_of(node), node.meta.get("where")
        node.meta["is"] = (*key, counts[key])
        counts[key] += 1


def renamed(graph: fx.Graph, names: dict[Any, str]) -> fx.Graph:
    """Rename the nodes of a graph to their names in `names`; new nodes get names, which are added."""
    taken = set(names.values())
    named, made = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in graph.nodes:
        name = names.get(node.meta["is"])
        if name is None:
            tries = (node.name if i == 0 else f"{node.name}_{i}" for i in range(len(taken) + 1))
            name = names[node.meta["is"]] = next(n for n in tries if n not in taken)
            taken.add(name)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), made.__getitem__)  # type: ignore[misc]
        made[node] = named.create_node(node.op, node.target, args, kwargs, name, node.type)
        made[node].meta = dict(node.meta)
    return named


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def module_path(node: fx.Node) -> str:
    """Return the path of the module whose forward contains the node."""
    stack = node.meta.get("nn_module_stack") or {"": ("", None)}
    return next(reversed(stack.values()))[0]


def owner_path(node: fx.Node) -> str:
    """Return the path of the module whose code makes the call of the node."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if node.op == "call_module":
        stack = stack[:-1]
    return stack[-1][0] if stack else ""
