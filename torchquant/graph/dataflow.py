"""Find which module reads the results of which others, by following the values of one run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from torchquant._modes import in_mode
from torchquant.graph.called import tensors_in
from torchquant.graph.recording import call_with_copies
from torchquant.graph.traced import graphs_running
from torchquant.qmodule import QModuleState
from torchquant.utils import qmodule_state, qmodules


@torch.no_grad()
def site_edges(model: nn.Module, example_inputs: Any) -> list[tuple[str, str]]:
    """Return (from, to) for each QModule that reads a result of another, in the order they run; paths as in `qmodules`.

    Operators between two QModules, float modules and views pass a result on. Reads through values that Python computes
    itself, such as a number taken out of a tensor, are not seen. The model runs in BYPASSED and in eval mode.

    >>> from torchquant.plan import quantize
    >>> net = nn.Sequential(nn.Linear(2, 2), nn.Flatten(), nn.Linear(2, 2))
    >>> site_edges(quantize(net, [{"weight": "affine:8"}]), torch.ones(1, 2))
    [('0', '2')]
    """
    flow = _Flow()
    handles = [handle for path, module in qmodules(model) for handle in flow.watch(path, module)]
    try:
        with in_mode(False, model), qmodule_state(model, QModuleState.BYPASSED), graphs_running(), flow:
            call_with_copies(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    return list(flow.edges)


class _Flow(TorchFunctionMode):
    """Keeps for each tensor the modules whose results it was computed of, no other result in between."""

    def __init__(self) -> None:
        super().__init__()
        self.edges: dict[tuple[str, str], None] = {}
        self.sources = WeakTensorKeyDictionary()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = self._sources_of((args, kwargs or {}))
        value = func(*args, **(kwargs or {}))
        if read:
            for tensor in tensors_in(args[:1] if value is None else value):  # x[i] = y returns nothing, and writes to x
                self.sources[tensor] = read
        return value

    def watch(self, path: str, module: nn.Module) -> Iterator[RemovableHandle]:
        """Hook a module, so that its reads become edges and its results are its own."""

        def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
            self.edges.update({(source, path): None for source in self._sources_of((args, kwargs)) if source != path})

        def leave(_: nn.Module, args: Any, value: Any) -> None:
            for tensor in tensors_in(value):
                self.sources[tensor] = (path,)

        yield module.register_forward_pre_hook(enter, with_kwargs=True)
        yield module.register_forward_hook(leave)

    def _sources_of(self, values: Any) -> tuple[str, ...]:
        found = (source for x in tensors_in(values) for source in self.sources.get(x, ()))
        return tuple(dict.fromkeys(found))
