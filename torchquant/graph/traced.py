"""Modules that run a graph when they quantize, and the forward of their class when they do not."""

from __future__ import annotations

import copy
import inspect
import linecache
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from types import FunctionType
from typing import Any

import torch
from torch import fx, nn

from torchquant._modes import has_hooks
from torchquant.graph.calls import Signature, fits, leaves
from torchquant.graph.flat import flattened, unflattened
from torchquant.graph.guards import Unseen, found_global, found_on, read_global, read_now
from torchquant.qmodule.aside import aside
from torchquant.qmodule.state import QModule, QModuleState

_numbers = count()
_always_graphs = False
_STEADY = (bool, int, float, complex, str, bytes, type(None), nn.Module, torch.Tensor, FunctionType, property, type)
_ATOMS = {f"builtins.{kind.__name__}" for kind in (bool, int, float, str, type(None))}


@contextmanager
def graphs_running() -> Iterator[None]:
    """Let every traced module run its graph, also in BYPASSED, to compare the graph with the forward."""
    global _always_graphs
    former, _always_graphs = _always_graphs, True
    try:
        yield
    finally:
        _always_graphs = former


def always_graphs() -> bool:
    """Tell whether modules run what quantizes also in BYPASSED."""
    return _always_graphs


@dataclass
class Held:
    """A guard of a graph in the model it runs in. `module`: None for a global name of the Python module `where`."""

    module: nn.Module | None
    where: str
    name: str
    value: Any
    seen: Any = field(default=Unseen, repr=False, compare=False)
    """The object that was found last, if an identical object means that nothing has changed."""

    def holds(self) -> bool:
        """Tell whether the current value still has the recorded fingerprint."""
        found = found_global(self.where, self.name) if self.module is None else found_on(self.module, self.name)
        if found is self.seen:
            return True
        now = read_global(self.where, self.name) if self.module is None else read_now(self.module, self.name)
        if now != self.value:
            return False
        self.seen = found if isinstance(found, _STEADY) else Unseen
        return True

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "seen": Unseen}

    def __str__(self) -> str:
        of = f"the global '{self.name}' of {self.where}" if self.module is None else f"attribute '{self.name}'"
        return of if self.module is None else f"{of} of {self.where or 'the model'}"


@dataclass
class Variant:
    """One path through a forward: a graph, for calls of one pattern, under the guards of its trace.

    `run`: the graph as a function. `atoms`: the plain values among the guards, as compiled code checks them.
    """

    pattern: tuple[Any, ...] | None
    guards: list[Held]
    graph: fx.Graph
    run: Callable[..., Any] = field(init=False, repr=False)
    atoms: list[tuple[nn.Module, str, Any]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.run = compiled(self.graph)
        self._find_atoms()

    def replace_graph(self, graph: fx.Graph) -> None:
        """Run another graph from now on; copies of the model keep the former one."""
        self.graph, self.run = graph, compiled(graph)

    def _find_atoms(self) -> None:
        plain = [g for g in self.guards if g.module is not None and g.value[0] in _ATOMS]
        self.atoms = [(guard.module, guard.name, guard.value[1]) for guard in plain if guard.module is not None]

    def __getstate__(self) -> dict[str, Any]:
        return {"pattern": self.pattern, "guards": self.guards, "graph": flattened(self.graph)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.pattern, self.guards = state["pattern"], state["guards"]
        self.graph = unflattened(state["graph"])
        self.__post_init__()

    def __deepcopy__(self, memo: dict[int, Any]) -> Variant:
        copied = object.__new__(Variant)
        copied.pattern, copied.graph, copied.run = self.pattern, self.graph, self.run
        copied.guards = copy.deepcopy(self.guards, memo)
        copied._find_atoms()
        return copied

    def broken(self) -> Held | None:
        """Return the first guard that no longer holds, if any."""
        return next((held for held in self.guards if not held.holds()), None)

    def holds_in_one_graph(self) -> bool:
        """Check the guards that torch.compile and torch.export can trace: those on plain values."""
        return all(getattr(module, name, None) == value for module, name, value in self.atoms)


@dataclass
class Followed:
    """All data of a traced forward.

    `node_names`, `op_paths`: the names of nodes and operators in every variant. `fused`: path of a site with a QModule
    -> the parts fused into it; `places`: that path and the QModule. `known`: paths of all sites. `inputs`: (node, spec)
    -> path of the quantizer of a value that nothing had quantized; `input_specs`: path of a site -> this spec,
    `softmax_specs`: -> the spec of its probabilities.
    `structure`: (module, name, child) of all modules that the graphs call or contain; `walks`: whether Python iterates
    over children of a module to which operators were added; `inlined`: the modules whose forwards are in the graphs,
    and whether they have hooks.
    """

    signature: Signature
    variants: list[Variant] = field(default_factory=list)
    node_names: dict[Any, str] = field(default_factory=dict)
    op_paths: dict[str, str] = field(default_factory=dict)
    fused: dict[str, tuple[tuple[str, str], ...]] = field(default_factory=dict)
    known: set[str] = field(default_factory=set)
    inputs: dict[tuple[str, str], str] = field(default_factory=dict)
    input_specs: dict[str, str] = field(default_factory=dict)
    structure: list[tuple[nn.Module, str, nn.Module]] = field(default_factory=list)
    inlined: list[tuple[str, nn.Module, bool]] = field(default_factory=list)
    qmodules: list[tuple[nn.Module, str, QModule]] = field(default_factory=list)
    walks: bool = False
    places: list[tuple[str, QModule]] = field(default_factory=list)
    softmax_specs: dict[str, str] = field(default_factory=dict)

    def specs_of(self, path: str) -> dict[str, str]:
        """Return slot -> spec of what a site reads, "input" and "probabilities"."""
        of_softmax = self.__dict__.get("softmax_specs", {})  # old pickles do not have it
        slots = {"input": self.input_specs.get(path), "probabilities": of_softmax.get(path)}
        return {slot: spec for slot, spec in slots.items() if spec is not None}

    def seal(self, root: nn.Module, inlined: tuple[str, ...] = ()) -> None:
        """Record the modules of `root`: a later change of them is a change of the forward."""
        paths = {path for path, *_ in self.inlined} | set(inlined)
        called = {str(n.target) for v in self.variants for n in v.graph.nodes if n.op == "call_module"}
        self.inlined = [(path, m, has_hooks(m)) for path in sorted(paths) for m in [root.get_submodule(path)]]
        self.structure, seen = [], set()
        for path in sorted(paths | called):
            owner, parts = root, path.split(".") if path else []
            for i, name in enumerate(parts):
                child = owner._modules[name]
                assert child is not None
                if (key := ".".join(parts[: i + 1])) not in seen:
                    seen.add(key)
                    self.structure.append((owner, name, child))
                owner = child
        self.qmodules = [(owner, name, m) for owner, name, m in self.structure if isinstance(m, QModule)]

    def runs_float(self) -> bool:
        """Tell whether nothing in the graph observes or quantizes."""
        if _always_graphs or self.walks or not self.qmodules:
            return False
        for owner, name, module in self.qmodules:
            if module._state is not QModuleState.BYPASSED and owner._modules.get(name) is module:
                return False
        return True

    def changed(self) -> str:
        """Describe a module that was replaced, or whose hooks were added or removed; "" if there is none."""
        for owner, name, child in self.structure:
            if owner._modules.get(name) is not child:
                return f"the module '{name}' of {type(owner).__name__} was replaced"
        for path, module, had_hooks in self.inlined:
            if path and has_hooks(module) is not had_hooks:
                return f"{path} has {'got' if not had_hooks else 'lost'} its hooks"
        return ""


class TrainingFlag(nn.Module):
    """Returns `self.training` in a graph of version 0.1."""

    def forward(self) -> bool:
        """Return whether the model trains."""
        return self.training


class TracedModule(nn.Module):
    """A module that runs a graph while something in it observes or quantizes; otherwise it behaves as its class.

    In BYPASSED it runs the forward of its class, so that it *is* the float module. A graph holds for one path through
    the forward: for a call of another pattern, or if a value that Python read during the trace has changed, the forward
    is traced again. `install` turns a module into a TracedModule in place, by giving it a subclass of its own. It can
    be copied and pickled.
    """

    followed: Followed

    def run_followed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the traced graph, or the float forward if nothing observes or quantizes."""
        followed: Followed = self.__dict__["followed"]
        if followed.runs_float():
            return self._float_forward(*args, **kwargs)  # type: ignore[operator]
        values = followed.signature.bind(args, kwargs)
        if values is None:
            return self._float_forward(*args, **kwargs)  # type: ignore[operator] # which raises what Python raises
        for variant in followed.variants:
            if variant.pattern is None:  # a graph of version 0.1
                return variant.run(self, *values[:-2])
            if fits(variant.pattern, values) and self._holds(variant):
                return variant.run(self, *leaves(variant.pattern, values))
        return self._another_way(followed, values)

    def _holds(self, variant: Variant) -> bool:
        if torch.compiler.is_compiling():
            return variant.holds_in_one_graph()
        return variant.broken() is None and not self.__dict__["followed"].changed()

    def _another_way(self, followed: Followed, values: tuple[Any, ...]) -> Any:
        if torch.compiler.is_compiling():
            raise RuntimeError(  # torch.compile cannot raise errors of our own classes
                f"{type(self).__name__} is called in a way it was not traced for: another mode, argument or attribute. "
                "Call it once in this way, uncompiled, in the state that you need, then compile it"
            )
        variant = _followers[-1](self, followed, values)
        return variant.run(self, *leaves(variant.pattern, values))

    def __reduce__(self) -> tuple[Any, ...]:
        return empty_traced, (type(self).__mro__[2], None), self.__dict__


FollowAgain = Callable[[TracedModule, Followed, tuple[Any, ...]], Variant]
_followers: list[FollowAgain] = []


def follows_again(function: FollowAgain) -> FollowAgain:
    """Register the function that traces forwards again when they take a new path."""
    _followers.append(function)
    return function


def install(module: nn.Module, followed: Followed) -> None:
    """Let the module run graphs."""
    for variant in followed.variants:
        variant.graph.lint()
    module.__class__ = _traced_class(type(module))
    module.__dict__["followed"] = followed


def remove(module: nn.Module) -> None:
    """Let the module run only the forward of its class again."""
    assert isinstance(module, TracedModule)
    module._modules.pop("training_flag", None)
    module.__dict__.pop("followed", None)
    module.__class__ = type(module).__mro__[2]


def reseal(model: nn.Module) -> None:
    """Accept the current modules that graphs of the model call: they were replaced on purpose."""
    for module in model.modules():
        if isinstance(module, TracedModule):
            module.followed.seal(module)


def empty_traced(kind: type[nn.Module], flat: list[tuple[Any, ...]] | None) -> nn.Module:
    """Make a TracedModule without its state; `flat` is the graph of a module that version 0.1 pickled."""
    made = _traced_class(kind)
    module = made.__new__(made)
    if flat is not None:
        names = tuple(name for name, op, *_ in flat if op == "placeholder")
        empty = inspect.Parameter.empty
        defaults = tuple(entry[3][0] if entry[3] else empty for entry in flat if entry[1] == "placeholder")
        signature = Signature(names, defaults)
        module.__dict__["followed"] = Followed(signature, [Variant(None, [], unflattened(flat))])
    return module


def _traced_class(kind: type[nn.Module]) -> type[nn.Module]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.run_followed(args, kwargs)

    return subclass_with_forward(TracedModule, kind, forward)


def subclass_with_forward(base: type[nn.Module], kind: type[nn.Module], forward: Any) -> type[nn.Module]:
    """Make a subclass of `base` and of a class that looks like the class, with another forward.

    The forward of the class is its `_float_forward`.
    """
    forward.__doc__ = kind.forward.__doc__
    forward.__signature__ = inspect.signature(kind.forward)  # type: ignore[attr-defined]
    members = {
        "forward": aside(forward),
        "_float_forward": kind.forward,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
    }
    return type(kind.__name__, (base, kind), members)


def compiled(graph: fx.Graph) -> Callable[..., Any]:
    """Return the graph as a function whose first argument is the module that it reads from."""
    code = graph.python_code("self")
    name = f"<torchquant graph {next(_numbers)}>"
    linecache.cache[name] = (len(code.src), None, code.src.splitlines(keepends=True), name)
    scope = dict(code.globals)
    exec(compile(code.src, name, "exec"), scope)
    function = scope["forward"]
    assert isinstance(function, FunctionType)
    return function
