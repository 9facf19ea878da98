"""Running a model on an example, and seeing what goes through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, fx, nn

from torchquant._shown import running
from torchquant.graph.sites import Captured, Region
from torchquant.graph.trace import FLAG, in_mode
from torchquant.qmodule.state import is_real


def call_with(model: nn.Module, example_inputs: Any, what: str = "example_inputs") -> Any:
    """The model on a tensor, a tuple of arguments, or a dictionary of keyword arguments.

    Raises ConfigError with the model's own words where it does not run; `what` is what the inputs are called there.
    """
    with running(model, what, example_inputs):
        if isinstance(example_inputs, Mapping):
            return model(**example_inputs)
        return model(*example_inputs) if isinstance(example_inputs, tuple | list) else model(example_inputs)


def real_values(model: nn.Module, regions: Mapping[str, Region], example_inputs: Any) -> dict[tuple[str, str], bool]:
    """(region, node) -> whether its value is a tensor of real numbers, for the nodes that ran."""
    found: dict[tuple[str, str], bool] = {}

    def note(region: Region, node: fx.Node, args: tuple[Any, ...], value: Any) -> None:
        found[region.path, node.name] = is_real(value) or isinstance(value, tuple | list)

    _run_watched(model, regions, example_inputs, {}, note)
    return found


def watch_values(captured: Captured, example_inputs: Any) -> dict[str, list[tuple[list[Tensor], Any]]]:
    """Site -> (the tensors it takes in, what it gives) for each of its calls on the example."""
    found: dict[str, list[tuple[list[Tensor], Any]]] = {}
    operators = {
        (site.region, site.nodes[0]): site.path for site in captured.sites if site.module is None and site.nodes
    }
    modules = {site.module: site.path for site in captured.sites if site.module is not None}

    def note(region: Region, node: fx.Node, args: tuple[Any, ...], value: Any) -> None:
        path = operators.get((region.path, node.name))
        if path is not None:
            found.setdefault(path, []).append((list(tensors_in(args)), value))

    def note_module(path: str, args: tuple[Any, ...], value: Any) -> None:
        found.setdefault(path, []).append((list(tensors_in(args)), value))

    _run_watched(captured.model, captured.regions, example_inputs, modules, note, note_module)
    return found


def _run_watched(
    model: nn.Module,
    regions: Mapping[str, Region],
    example_inputs: Any,
    modules: Mapping[nn.Module, str],
    note: Callable[[Region, fx.Node, tuple[Any, ...], Any], None],
    note_module: Callable[[str, tuple[Any, ...], Any], None] | None = None,
) -> None:
    """Run the model on the example in evaluation mode; tell of the calls of `modules`, then of every node."""

    class Watch(fx.Interpreter):
        def __init__(self, region: Region) -> None:
            super().__init__(region.module, graph=region.graph)
            self.region = region

        def run_node(self, n: fx.Node) -> Any:
            value = False if n.target == FLAG else super().run_node(n)
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            note(self.region, n, (*args, *kwargs.values()), value)
            return value

    calls: list[tuple[Region, tuple[Any, ...], dict[str, Any]]] = []
    handles = []
    for region in regions.values():
        if region.graph is not None:

            def keep(module: nn.Module, args: Any, kwargs: Any, region: Region = region) -> None:
                calls.append((region, args, kwargs))

            handles.append(region.module.register_forward_pre_hook(keep, with_kwargs=True))
    for module, path in modules.items():

        def tell(m: nn.Module, args: Any, kwargs: Any, value: Any, path: str = path) -> None:
            assert note_module is not None
            note_module(path, (*args, *kwargs.values()), value)

        handles.append(module.register_forward_hook(tell, with_kwargs=True))
    with in_mode(False, model):
        try:
            call_with(model, example_inputs)
        finally:
            for handle in handles:
                handle.remove()
        done: set[str] = set()
        for region, args, kwargs in calls:
            if region.path not in done:
                done.add(region.path)
                Watch(region).run(*_bound(region, args, kwargs))


def _bound(region: Region, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """The values of the graph's inputs in a call."""
    assert region.graph is not None
    values: list[Any] = []
    for i, node in enumerate(n for n in region.graph.nodes if n.op == "placeholder"):
        default = node.args[0] if node.args else None
        values.append(args[i] if i < len(args) else kwargs.get(str(node.target), default))
    return values


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors_in(part)
