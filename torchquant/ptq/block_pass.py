"""One pass over all blocks of a model: each with its calls on all batches, before it is changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from torchquant.errors import ConfigError
from torchquant.graph.recording import call_with
from torchquant.graph.segments import Segment, in_segments
from torchquant.graph.traced import graphs_running
from torchquant.ptq.block import BlockCall, BlockData
from torchquant.ptq.blocks import BlockPlace
from torchquant.ptq.overflow import Overflow
from torchquant.ptq.padding import Padding
from torchquant.ptq.ranks import errors_on_all_ranks
from torchquant.ptq.streams import Pass, meetings, passes
from torchquant.qmodule import QModule
from torchquant.qmodule.state import is_real
from torchquant.utils import qmodules


@dataclass
class BlockPass:
    """The pass. `reference`: the float model. `paddings`: of each batch.

    `overflow`: limits the memory of what forwards wait with. `generator`: makes the one of a block. `is_done`: whether
    a block needs no data, since its result is saved. `again`: gets the paths of blocks that are called again.
    """

    model: nn.Module
    reference: nn.Module
    inputs: Sequence[Any]
    paddings: Sequence[Padding]
    overflow: Overflow | None
    generator: Callable[[str], torch.Generator]
    is_done: Callable[[str], bool]
    again: set[str]

    def run(self, places: Sequence[BlockPlace]) -> Iterator[tuple[BlockPlace, dict[str, QModule], BlockData]]:
        """Yield each block that a batch reaches, what quantizes in it, and its data; it may be changed then."""
        named = {place.path: place for place in places}
        with (
            graphs_running(),
            in_segments(self.model, named) as modules,
            in_segments(self.reference, named) as float_modules,
            passes(modules, [self._call(self.model, batch) for batch in self.inputs], self.overflow) as now,
            passes(float_modules, [self._call(self.reference, b) for b in self.inputs], self.overflow) as floats,
        ):
            for path in meetings(list(named), now, floats, self.again):
                data = BlockData(path, self.generator(path))
                if not self.is_done(path):
                    data = self._data(path, modules[path], now, floats)
                yield named[path], self._qmodules(path, modules[path]), data

    def _call(self, model: nn.Module, batch: Any) -> Callable[[], object]:
        return lambda: call_with(model, batch, "a batch")

    def _qmodules(self, path: str, modules: Sequence[nn.Module]) -> dict[str, QModule]:
        """Find what quantizes in a block: all below its module, or what the segments of the graph call."""
        called = {inner for module in modules if isinstance(module, Segment) for inner in module.calls}
        return {
            at: module
            for at, module in qmodules(self.model)
            if at in called or (not called and f"{at}.".startswith(f"{path}."))
        }

    def _data(self, path: str, modules: Sequence[nn.Module], now: Sequence[Pass], floats: Sequence[Pass]) -> BlockData:
        reached = [i for i, one in enumerate(now) if one.at == path]
        with errors_on_all_ranks():
            if apart := [i for i in reached if floats[i].at != path]:
                raise ConfigError(
                    f"{path}: batch {apart[0]} does not reach it in the float model as it does in the quantized one, "
                    "so there is no output to match; leave its layers out with skip"
                )
        return BlockData(
            path,
            self.generator(path),
            [_call_of(now[i]) for i in reached],
            [_call_of(floats[i]) for i in reached],
            [self.paddings[i].at(path) for i in reached],
            lambda: [self._gradients(path, modules, self.inputs[i]) for i in reached],
        )

    def _gradients(self, path: str, modules: Sequence[nn.Module], batch: Any) -> list[Tensor]:
        """Compute the gradients, for a block's outputs, of the divergence of the model from the float one."""
        leaves: list[Tensor] = []

        def watched(x: Tensor) -> Tensor:
            if not is_real(x):
                return x
            leaves.append(x.detach().requires_grad_())
            return leaves[-1].clone()

        def hook(module: nn.Module, args: Any, result: Any) -> Any:
            return None if leaves else tree_map_only(Tensor, watched, result)

        handles = [module.register_forward_hook(hook) for module in modules]
        try:
            with torch.enable_grad():
                found = prediction(call_with(self.model, batch, "a batch"))
                wanted = prediction(call_with(self.reference, batch, "a batch")).detach()
                axis = 1 if found.ndim != 3 else 2
                loss = F.kl_div(found.log_softmax(axis), wanted.log_softmax(axis), reduction="sum", log_target=True)
                gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
        finally:
            for handle in handles:
                handle.remove()
        return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=True)]


def _call_of(one: Pass) -> BlockCall:
    assert one.module is not None
    return BlockCall(one.module, one.args, dict(one.kwargs))


def prediction(result: Any) -> Tensor:
    """Return the logits in the result of a model: its `logits`, or its first tensor of real numbers."""
    logits = result.get("logits") if isinstance(result, Mapping) else None
    found: Tensor = next(leaf for leaf in tree_leaves(result if logits is None else logits) if is_real(leaf))
    return found.to(torch.float32)
