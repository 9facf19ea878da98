"""Run copies of a model on an example, and record the values in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from torchquant._modes import in_mode
from torchquant._shown import running, shown
from torchquant.errors import ConfigError
from torchquant.graph.called import Event, Recorder
from torchquant.graph.calls import Signature, arguments_of, fits, leaves
from torchquant.graph.copies import copy_model
from torchquant.graph.outside import globals_kept, random_states_kept
from torchquant.graph.sites import Captured, Region, Site, looked_after
from torchquant.qmodule.state import is_real

Note = Callable[[Region, fx.Node, tuple[Any, ...], Any], None]


def call_with(model: nn.Module, example_inputs: Any, what: str = "example_inputs") -> Any:
    """Call the model with a tensor, a tuple of arguments, or a dictionary of keyword arguments.

    Raises ConfigError with the model's own error if it fails; `what` names the inputs in the message.
    """
    with running(model, what, example_inputs):
        args, kwargs = arguments_of(example_inputs)
        return model(*args, **kwargs)


def call_with_copies(model: nn.Module, example_inputs: Any) -> Any:
    """Do the same as `call_with`, with copies of the tensors: a forward may write to its inputs."""
    try:
        copies = tree_map_only(Tensor, lambda x: x.detach().clone(), example_inputs)
    except RecursionError:
        raise ConfigError(
            f"example_inputs must be tensors in tuples, lists or dictionaries; got {shown(example_inputs)}"
        ) from None
    return call_with(model, copies)


@contextmanager
def undisturbed(twin: nn.Module, training: bool) -> Iterator[None]:
    """Run a copy in one mode; restore random states and globals at the end of the context."""
    with in_mode(training, twin), random_states_kept(), globals_kept(twin):
        yield


def _call_hooked(twin: nn.Module, example_inputs: Any, handles: Iterable[RemovableHandle]) -> None:
    """Run the copy on the example once, and remove the hooks."""
    try:
        call_with_copies(twin, example_inputs)
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Calls:
    """Records how the modules of a model are called on an example.

    `values`: path -> the arguments of the first call, as `Signature.bind` returns them. `counts`: path -> number of
    calls, for modules that are called more than once. `events`: the products and softmaxes.
    """

    values: dict[str, tuple[Any, ...]]
    counts: dict[str, int]
    events: list[Event] = field(default_factory=list)


@torch.no_grad()
def recorded_calls(twin: nn.Module, example_inputs: Any) -> Calls:
    """Record the calls in a throw-away copy of a model. Raises ConfigError if it fails on the example."""
    values: dict[str, tuple[Any, ...]] = {}
    counts: Counter[str] = Counter()
    handles = []
    for path, module in twin.named_modules():

        def keep(m: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
            counts[path] += 1
            if path not in values and (path == "" or next(m.children(), None) is not None):
                bound = Signature.of(type(m).forward).bind(args, kwargs)
                values.update({} if bound is None else {path: bound})

        handles.append(module.register_forward_pre_hook(keep, with_kwargs=True))
    recorder = Recorder(twin)
    handles.extend(recorder.hooks())
    with undisturbed(twin, training=False), recorder:
        _call_hooked(twin, example_inputs, handles)
    return Calls(values, {path: n for path, n in counts.items() if n > 1}, recorder.events)


def real_values(twin: nn.Module, regions: Mapping[str, Region], example_inputs: Any) -> dict[tuple[str, str], bool]:
    """Find (region, node) -> whether its value is a tensor of real numbers, for the nodes that ran in either mode."""
    found: dict[tuple[str, str], bool] = {}

    def note(region: Region, node: fx.Node, args: tuple[Any, ...], value: Any) -> None:
        found[region.path, node.name] = is_real(value) or isinstance(value, tuple | list)

    for training in (False, True) if any(len(region.ways) > 1 for region in regions.values()) else (False,):
        try:
            _run_watched(twin, regions, example_inputs, {}, note, training=training)
        except Exception:  # a model that cannot train on the example: the evaluation run has to suffice
            if not training:
                raise
    return found


def watch_values(captured: Captured, example_inputs: Any) -> dict[str, list[tuple[tuple[Any, ...], Any]]]:
    """Record site -> (its arguments, its result) for each of its calls on the example."""
    found: dict[str, list[tuple[tuple[Any, ...], Any]]] = {}
    operators = {
        (site.region, site.nodes[0]): site.path for site in captured.sites if site.module is None and site.nodes
    }
    twin = copy_model(captured.model)
    names = {module: path for path, module in captured.model.named_modules()}
    modules = {twin.get_submodule(names[site.module]): site.path for site in captured.sites if site.module is not None}

    def note(region: Region, node: fx.Node, args: tuple[Any, ...], value: Any) -> None:
        path = operators.get((region.path, node.name))
        if path is not None:
            found.setdefault(path, []).append((args, value))

    def note_module(path: str, args: tuple[Any, ...], value: Any) -> None:
        found.setdefault(path, []).append((args, value))

    _run_watched(twin, captured.regions, example_inputs, modules, note, note_module)
    _watch_called(captured, example_inputs, found)
    return found


def _watch_called(captured: Captured, example_inputs: Any, found: dict[str, list[tuple[tuple[Any, ...], Any]]]) -> None:
    """Add the products in forwards that are not traced to what `watch_values` records."""
    sites = {(site.region, site.called): site.path for site in captured.sites if site.called is not None}
    if not sites:
        return
    n_calls: Counter[Any] = Counter()
    others = looked_after(captured.sites, captured.regions.values())

    def note(args: tuple[Any, ...], value: Any) -> None:
        owner = recorder.events[-1].owner(captured.products, others)
        if owner is not None:
            path = sites.get((owner[0], n_calls[owner] % len(captured.products[owner[0]])))
            n_calls[owner] += 1
            if path is not None:
                found.setdefault(path, []).append((args, value))

    twin = copy_model(captured.model)
    recorder = Recorder(twin, note)
    handles = list(recorder.hooks())
    with undisturbed(twin, training=False), recorder:
        _call_hooked(twin, example_inputs, handles)


def watch_products(
    captured: Captured,
    example_inputs: Any,
    of_layer: Callable[[Site, tuple[Any, ...], Any], None],
    of_function: Callable[[str, Any, tuple[Any, ...], Any], None],
) -> None:
    """Run a copy on the example and call back for each product as it is computed.

    `of_layer` gets, for each call of a layer that is a site, its arguments and its result. `of_function` gets, for each
    call of a torch function elsewhere, the path of the calling module, the function, its arguments and its result.
    """
    twin = copy_model(captured.model)
    names = {module: path for path, module in captured.model.named_modules()}
    layers = {names[site.module]: site for site in captured.sites if site.module is not None and site.is_layer}
    running: list[str] = []
    inside: list[str] = []
    handles = []
    for path, module in twin.named_modules():

        def enter(m: nn.Module, args: Any, path: str = path) -> None:
            running.append(path)
            inside.extend([path] if path in layers else [])

        def leave(m: nn.Module, args: Any, kwargs: Any, value: Any, path: str = path) -> None:
            running.pop()
            if path in layers:
                inside.pop()
                of_layer(layers[path], (*args, *kwargs.values()), value)

        handles.append(module.register_forward_pre_hook(enter, prepend=True))
        handles.append(module.register_forward_hook(leave, with_kwargs=True))

    class Functions(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            value = func(*args, **kwargs)
            if running and not inside:
                of_function(running[-1], func, (*args, *kwargs.values()), value)
            return value

    with undisturbed(twin, training=False), Functions():
        _call_hooked(twin, example_inputs, handles)


def _run_watched(
    twin: nn.Module,
    regions: Mapping[str, Region],
    example_inputs: Any,
    modules: Mapping[nn.Module, str],
    note: Note,
    note_module: Callable[[str, tuple[Any, ...], Any], None] | None = None,
    training: bool = False,
) -> None:
    """Run the copy on the example; call back for each call of `modules`, and for every node of the graphs."""

    class Watch(fx.Interpreter):
        def __init__(self, region: Region) -> None:
            way = region.ways[-1 if training else 0]
            super().__init__(twin.get_submodule(region.path), graph=way.graph)
            self.region = region

        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            note(self.region, n, (*args, *kwargs.values()), value)
            return value

    calls: list[tuple[Region, tuple[Any, ...]]] = []
    handles = []
    for region in regions.values():
        if region.ways:

            def keep(m: nn.Module, args: Any, kwargs: Any, region: Region = region) -> None:
                values = Signature.of(type(m).forward).bind(args, kwargs)
                if values is not None and fits(region.pattern, values):
                    calls.append((region, values))

            module = twin.get_submodule(region.path)
            handles.append(module.register_forward_pre_hook(keep, with_kwargs=True))
    for module, path in modules.items():

        def tell(m: nn.Module, args: Any, kwargs: Any, value: Any, path: str = path) -> None:
            assert note_module is not None
            note_module(path, (*args, *kwargs.values()), value)

        handles.append(module.register_forward_hook(tell, with_kwargs=True))
    with undisturbed(twin, training):
        _call_hooked(twin, example_inputs, handles)
        done: set[str] = set()
        for region, values in calls:
            if region.path not in done:
                done.add(region.path)
                Watch(region).run(*leaves(region.pattern, values))
