"""Changes of structure: an example to run, the check that the float function stays, ranges that start anew."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from torchquant.errors import ConfigError, UnobservedRangeError
from torchquant.graph.called import tensors_in
from torchquant.graph.recording import call_with_copies, undisturbed
from torchquant.graph.rewrite import Conversion
from torchquant.graph.traced import TracedModule
from torchquant.ptq.ends import Columns, End
from torchquant.ptq.folding import fold_for_good
from torchquant.ptq.paths import ChannelSet, ChannelSets
from torchquant.ptq.ranks import errors_on_all_ranks
from torchquant.qmodule import QModule, QModuleState
from torchquant.qmodule.holder import Holder
from torchquant.qmodule.state import ACTIVATIONS
from torchquant.qmodule.weight_slots import LayerSlot
from torchquant.quantizers import Quantizer
from torchquant.range_observers._distributed import reduce_max, reduce_sum
from torchquant.range_observers._statistics import StatisticTracker
from torchquant.utils import qmodule_state, qmodules, weight_slots


def fold_all(model: nn.Module) -> list[str]:
    """Fold every batch norm that the plan folds permanently; return the paths of the layers."""
    return fold_for_good({slot.path: slot.module for slot in weight_slots(model) if isinstance(slot, LayerSlot)})


def example_for(model: nn.Module, batches: Sequence[Any], seed: int = 0) -> Any:
    """Return inputs to run the model on: the first batch, or noise of the shapes that `quantize` was given.

    Raises ConfigError if there is neither.
    """
    if batches:
        return batches[0]
    conversion = getattr(model, "conversion", None)
    example = conversion.example if isinstance(conversion, Conversion) else None
    if example is None:
        raise ConfigError(
            "the model has to run once, and the shape of its inputs is unknown; give a batch, or quantize it with "
            "example_inputs"
        )
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)

    def filled(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return torch.full(x.shape, int(x.dtype == torch.bool), dtype=x.dtype, device=device)
        return torch.randn(x.shape, generator=generator).to(device, x.dtype)

    return tree_map_only(Tensor, filled, example)


def untied(model: nn.Module, wanted: Callable[[], Iterable[Tensor]]) -> list[str]:
    """Give modules that share the table of an embedding a weight of their own; return their paths.

    All stay as they are unless one of the tables is among those that are `wanted` then.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    paths = {getattr(m, "layer", m): p for p, m in qmodules(model)}
    others = [(paths.get(m, p), m) for p, m in model.named_modules() if not isinstance(m, nn.Embedding | QModule)]
    weights = [(p, m, dict(m.named_parameters(recurse=False)).get("weight")) for p, m in others]
    shared = [(p, m, table) for p, m, table in weights if table is not None and id(table) in tables]
    for _, module, table in shared:
        module.weight = nn.Parameter(table.detach().clone(), table.requires_grad)
    kept = {id(table) for table in wanted()} if shared else set()
    for _, module, table in shared:
        if id(table) not in kept:
            module.weight = table
    return [p for p, m, table in shared if m.weight is not table]


@contextmanager
def same_function(
    model: nn.Module, example: Any, ends: Iterable[End], what: str, way_out: str = "leave the stage out"
) -> Iterator[None]:
    """Check that a change of these ends leaves the float model as it is on the example.

    Raises ConfigError if not, with everything as it was; the message ends with the way out.
    """
    kept = [(tensor, tensor.detach().clone()) for end in ends for tensor in end.tensors]
    before = _outputs(model, example)
    yield
    with errors_on_all_ranks():
        errors = [_error(a, b) for a, b in zip(before, _outputs(model, example), strict=True)]
        allowed = max((torch.finfo(a.dtype).eps ** 0.5 for a in before), default=0.0)
        if not all(error <= allowed for error in errors):
            with torch.no_grad():
                for tensor, value in kept:
                    tensor.copy_(value)
            raise ConfigError(
                f"{what} changes what the float model computes, by {max(errors):.2g} of its largest output; it was "
                f"undone. Its forward must read a weight in a way that one run does not show; {way_out}"
            )


def _outputs(model: nn.Module, example: Any) -> list[Tensor]:
    with torch.no_grad(), qmodule_state(model, QModuleState.BYPASSED), undisturbed(model, training=False):
        return [x.detach().clone() for x in tensors_in(call_with_copies(model, example)) if x.is_floating_point()]


def _error(a: Tensor, b: Tensor) -> float:
    top = float(a.abs().max()) if a.numel() else 0.0
    return float((a - b).abs().max()) / top if top > 0 else 0.0


def restart_ranges(model: nn.Module, ends: Iterable[End]) -> None:
    """Let changed weights give new numbers to their quantizers, and forget all ranges of activations."""
    for module in dict.fromkeys(end.slot.module for end in ends if end.slot is not None and end.is_quantized):
        was_ready = all(quantizer.is_ready for quantizer in _of_weights(module))
        for quantizer in _of_weights(module):
            _reset(quantizer)
        if was_ready:
            module.observe_weight()
    for _, module in qmodules(model):
        for name, quantizer in module.quantizers().items():
            if name in ACTIVATIONS:
                _reset(quantizer)


def _of_weights(module: QModule) -> list[Quantizer]:
    return [quantizer for name, quantizer in module.quantizers().items() if name not in ACTIVATIONS]


def _reset(quantizer: Quantizer) -> None:
    for part in quantizer.modules():
        if isinstance(part, StatisticTracker):
            part.reset()


def check_observed(model: nn.Module) -> None:
    """Raise UnobservedRangeError if nothing has been observed of any activation that needs it."""
    sites = [(m.path, name, q) for _, m in qmodules(model) for name, q in m.quantizers().items() if name in ACTIVATIONS]
    parts = [part for _, _, q in sites for part in q.modules() if isinstance(part, StatisticTracker)]
    lost = next(((path, name) for path, name, q in sites if not q.is_ready), None)
    if lost is not None and not any(part.is_observed for part in parts):
        raise UnobservedRangeError(
            f"{lost[0]}: its {lost[1]} has no range yet, nor has any other activation, so that the quantized model "
            "cannot run; put the stage calibrate, or bn_ranges, before this one, or call torchquant.calibrate first"
        )


def channel_maxima(model: nn.Module, batches: Sequence[Any], sets: Sequence[ChannelSet]) -> list[Tensor]:
    """Measure the largest magnitude in each channel of what the readers of each set get: (n,) each."""
    found = [torch.zeros(one.n, dtype=torch.float64) for one in sets]
    handles = []
    for i, one in enumerate(sets):
        for end in one.readers:
            if end.slot is None or not isinstance(end, Columns):
                continue

            def look(m: nn.Module, args: Any, i: int = i, one: ChannelSet = one, end: Columns = end) -> None:
                axis = -1 if end.tensors[0].ndim == 2 else 1 - end.tensors[0].ndim
                largest = args[0].detach().abs().movedim(axis, 0).flatten(1).amax(1)
                found[i] = torch.maximum(found[i], one.gathered(end, largest))

            handles.append(end.slot.module.register_forward_pre_hook(look))
    try:
        for batch in batches:
            _outputs(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return [reduce_max(largest) for largest in found]


def measured_statistics(model: nn.Module, batches: Sequence[Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """Measure mean and deviation of each output channel of the layers without a batch norm, by path: two (C,)."""
    slots = [slot for slot in weight_slots(model) if isinstance(slot, LayerSlot) and slot.module.bn is None]
    sums = {
        slot.path: torch.zeros(3, len(slot.seen()), dtype=torch.float64, device=slot.weight.device) for slot in slots
    }
    handles = []
    for slot in slots:

        def look(m: nn.Module, args: Any, y: Tensor, slot: LayerSlot = slot) -> None:
            axis = -1 if slot.weight.ndim == 2 else 1 - slot.weight.ndim
            rows = y.detach().double().movedim(axis, 0).flatten(1)
            found = torch.stack([torch.full_like(rows[:, 0], rows.shape[1]), rows.sum(1), rows.square().sum(1)])
            sums[slot.path] += found

        handles.append(slot.module.layer.register_forward_hook(look))
    try:
        for batch in batches if handles else ():
            _outputs(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    joined = {path: reduce_sum(found) for path, found in sums.items()}
    moments = {path: (total / n, squares / n) for path, (n, total, squares) in joined.items() if bool(n.any())}
    return {path: (mean, (square - mean.square()).clamp_min(0.0).sqrt()) for path, (mean, square) in moments.items()}


def to_relu(model: nn.Module, found: ChannelSets) -> int:
    """Make a ReLU of each ReLU6 module between layers that share channels, in place; return how many."""
    bounds = dict.fromkeys(b for one in found.sets for b in one.notes.get("bounded", []) if isinstance(b, nn.Module))
    for module in bounds:
        module.__class__ = nn.ReLU
    for module in model.modules():
        if isinstance(module, TracedModule):
            for path, fused in module.followed.fused.items():
                module.followed.fused[path] = tuple(
                    (part, "ReLU" if part and _part(module, part) in bounds else kind) for part, kind in fused
                )
    return len(bounds)


def _part(root: nn.Module, path: str) -> nn.Module | None:
    try:
        found = root.get_submodule(path)
    except AttributeError:
        return None
    return (found.held or found) if isinstance(found, Holder) else found
