"""Let a layer quantize its own input, which the graphs of its model quantize before it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import fx, nn

from torchquant.errors import ConfigError
from torchquant.graph.flat import flattened, unflattened
from torchquant.graph.traced import TracedModule
from torchquant.qmodule.input_slots import InputSlots
from torchquant.quantizers import Quantizer
from torchquant.utils import qmodules


def input_quantizer_of(model: nn.Module, path: str) -> Quantizer | None:
    """Return the quantizer of a layer's input: its own, or one that stands before it in the graphs; None if neither.

    A layer that reads the quantized output of another site has none.
    """
    wrapper = model.get_submodule(path)
    if isinstance(wrapper, InputSlots) and wrapper.input_quantizer is not None:
        return wrapper.input_quantizer
    return next((reads.op.acts_quantizer for reads in _reads(model, path)), None)


def read_own_input(model: nn.Module, path: str) -> None:
    """Let the layer at this path read the real value before it, and quantize it itself with a copy of the quantizer.

    From then on its slots stand between the real value and the quantizer. A quantizer in the graphs that nothing reads
    any more is removed; other layers go on reading it. A layer whose input is quantized nowhere, or at the output of
    the site before, stays as it is.
    """
    wrapper = model.get_submodule(path)
    assert isinstance(wrapper, InputSlots)
    touched = []
    for traced in {id(reads.traced): reads.traced for reads in _reads(model, path)}.values():
        _take_over(traced, wrapper, path.removeprefix(_prefix(model, traced)))
        touched.append(traced)
    for traced in touched:
        traced.followed.seal(traced)


class _ReadsQuantized:
    """A call of a layer in a graph behind an input quantizer of the graph."""

    def __init__(self, traced: TracedModule, source: fx.Node) -> None:
        self.traced, self.source = traced, source

    @property
    def op(self) -> Any:
        return self.traced.get_submodule(str(self.source.target))


def _prefix(model: nn.Module, traced: TracedModule) -> str:
    path = next(path for path, module in model.named_modules() if module is traced)
    return f"{path}." if path else ""


def _reads(model: nn.Module, path: str) -> Iterator[_ReadsQuantized]:
    """Yield the calls of the layer, in all graphs, behind a quantizer that the graphs have for inputs."""
    for region, module in model.named_modules():
        if isinstance(module, TracedModule) and path.startswith(f"{region}." if region else ""):
            local = path.removeprefix(f"{region}." if region else "")
            for variant in module.followed.variants:
                for _, source in _calls(module, variant.graph, local):
                    yield _ReadsQuantized(module, source)


def _calls(traced: TracedModule, graph: fx.Graph, local: str) -> list[tuple[fx.Node, fx.Node]]:
    """Return the calls of a layer behind an input quantizer, and the calls of the quantizer."""
    inputs = traced.followed.inputs.values()
    found = []
    for call in graph.nodes:
        source = call.args[0] if call.op == "call_module" and call.target == local and call.args else None
        if isinstance(source, fx.Node) and source.op == "call_module" and str(source.target) in inputs:
            found.append((call, source))
    return found


def _take_over(traced: TracedModule, wrapper: InputSlots, local: str) -> None:
    """Edit copies of the graphs of one traced module; copies of the model share the graphs themselves."""
    followed = traced.followed
    for variant in followed.variants:
        graph = unflattened(flattened(variant.graph))
        for call, source in _calls(traced, graph, local):
            if wrapper.input_quantizer is None:
                op: Any = traced.get_submodule(str(source.target))
                wrapper.input_quantizer = copy.deepcopy(op.acts_quantizer)
            call.args = (source.args[0], *call.args[1:])
            if not source.users:
                graph.erase_node(source)
        variant.replace_graph(graph)
    followed.input_specs.pop(local, None)
    called = {str(n.target) for v in followed.variants for n in v.graph.nodes if n.op == "call_module"}
    for key, path in list(followed.inputs.items()):
        if path not in called:
            del followed.inputs[key]
            if path not in followed.inputs.values():
                owner, _, name = path.rpartition(".")
                traced.get_submodule(owner)._modules.pop(name, None)


def expect_slots(model: nn.Module, state_dict: Mapping[str, Any], prefix: str = "") -> None:
    """Give the layers of a model the slots that a saved state has, before it is loaded.

    A layer that gets a slot quantizes its own input, as it did where the state was saved. Raises ConfigError if a layer
    has a slot that the state lacks.
    """
    for path, module in list(qmodules(model)):
        if not isinstance(module, InputSlots):
            continue
        place = f"{prefix}{path}." if path else prefix
        if why := module.why_not_loaded(state_dict, place):
            raise ConfigError(why)
        if not module.has_slots and any(module.saved_slots(state_dict, place)):
            read_own_input(model, path)
        module.expect_slots(state_dict, place)
