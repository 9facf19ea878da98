"""Layers that read one value, found by the tensor that arrives at them, and their output error behind a transform."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchquant.graph.own_inputs import input_quantizer_of
from torchquant.ptq.padding import Padding
from torchquant.ptq.ranks import errors_on_all_ranks, is_any, joined_groups, total
from torchquant.ptq.shifted_scale import ShiftedScale
from torchquant.ptq.streams import meetings, passes
from torchquant.qmodule.input_slots import InputSlots, product_with
from torchquant.qmodule.input_transform import InputTransform, by_input_channel, on_input_channels
from torchquant.quantizers import Quantizer
from torchquant.range_observers._distributed import reduce_max, reduce_sum
from torchquant.range_observers._statistics import StatisticTracker

MOST_ROWS = 2048
"""The largest number of rows (tokens, positions) on which the error of a transform is measured."""
Call = Callable[[], object]
Change = Callable[[Tensor], Tensor]


@dataclass
class Readers:
    """Layers that read the same value. `values`: the value in each batch that reached them, without padding tokens.

    `input_quantizers`: those that will quantize what the layers read, None for inputs that stay float, or that are
    quantized before a transform can change them. `generator`: for random numbers. `channels`: (K,), equal numbers for
    channels that only one factor can scale; None if each can have its own. `can_shift`: whether what gives the channels
    and all readers have biases that can make good a shift.
    """

    wrappers: dict[str, InputSlots]
    values: list[Tensor]
    input_quantizers: dict[str, Quantizer | None]
    generator: torch.Generator
    channels: Tensor | None = None
    can_shift: bool = False

    def __post_init__(self) -> None:
        self.first = next(iter(self.wrappers.values()))
        self.axis = self.first.channel_axis
        self.n_rows = total(sum(x.numel() // x.shape[self.axis] for x in self.values))
        self.sample = _sample(self.values, self.axis)
        self.wanted = {
            path: [product_with(w.row, w.layer, x, self._seen(w)) for x in self.sample]
            for path, w in self.wrappers.items()
        }

    def _nothing(self) -> Tensor:
        """Return a value without rows, which a rank observes that no batch of its own gives one."""
        return self._seen(self.first).new_zeros(0, self.n_channels, *[1] * (-1 - self.axis))

    @staticmethod
    def _seen(wrapper: InputSlots) -> Tensor:
        return wrapper.weight_slots()[0].seen().detach()

    @property
    def n_groups(self) -> int:
        """The groups of channels that no transform may mix, the most of any layer."""
        return math.lcm(*(w.weight_slots()[0].n_groups for w in self.wrappers.values()))

    @property
    def n_channels(self) -> int:
        """The channels of the value."""
        slot = self.first.weight_slots()[0]
        return int(self._seen(self.first).shape[1]) * slot.n_groups

    def format_blocks(self) -> list[int]:
        """Return the sizes of the blocks that have a scale of their own, of formats such as MX."""
        quantizers = [w.weight_slots()[0].quantizer for w in self.wrappers.values()]
        found = (getattr(q, "block", None) for q in (*quantizers, *self.input_quantizers.values()))
        return [size for size in found if isinstance(size, int)]

    def _over_channels(self, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        """Reduce the rows of each value, (batches, K); one row of zeros where this rank has no values."""
        found = [reduce(x.movedim(self.axis, -1).flatten(0, -2)) for x in self.values]
        return torch.stack(found or [self._seen(self.first).new_zeros(self.n_channels)])

    def input_max(self) -> Tensor:
        """Return the largest magnitude of each channel, (K,)."""
        return self.shared(reduce_max(self._over_channels(lambda rows: rows.abs().amax(0)).amax(0)), "amax")

    def input_mean(self) -> Tensor:
        """Return the mean magnitude of each channel, (K,)."""
        sums = reduce_sum(self._over_channels(lambda rows: rows.abs().sum(0)).sum(0))
        return self.shared(sums / self.n_rows, "mean")

    def weight_max(self) -> Tensor:
        """Return the largest magnitude of the weights that each channel is multiplied with, (K,)."""
        found = [by_input_channel(self._seen(w), w.weight_slots()[0].n_groups) for w in self.wrappers.values()]
        return self.shared(torch.cat([weight.abs().flatten(0, -2) for weight in found]).amax(0), "amax")

    def input_middle(self) -> Tensor:
        """Return the middle of the range of each channel, (K,)."""
        highest = reduce_max(self._over_channels(lambda rows: rows.amax(0)).amax(0))
        lowest = -reduce_max(self._over_channels(lambda rows: -rows.amin(0)).amax(0))
        return self.shared((highest + lowest) / 2, "mean")

    def shared(self, values: Tensor, how: str) -> Tensor:
        """Give channels of one number one value."""
        if self.channels is None:
            return values
        index = self.channels.to(values.device)
        found = values.new_zeros(int(index.max()) + 1)
        return found.scatter_reduce(0, index, values, how, include_self=False)[index]

    def error(self, transform: InputTransform | None) -> float:
        """Compute the squared error of all outputs over their squares, with everything rounded behind the transform."""
        change, on_weight = (_same, _same) if transform is None else (transform, transform.on_weight)
        shift = transform.shift if isinstance(transform, ShiftedScale) else None
        lost, power = reduce_sum(torch.stack(self._lost(change, on_weight, shift)).detach().double()).tolist()
        return lost / power if power > 0 else 0.0

    def loss(self, change: Change, on_weight: Change, shift: Tensor | None = None) -> Tensor:
        """Compute the error behind any change of the value and its inverse on weights (..., K): (), differentiable.

        `shift`: (K,), what the change takes off each channel first, which biases make good.
        In a process group it is the share of this rank, whose sum over the ranks is the error.
        """
        lost, power = self._lost(change, on_weight, shift)
        return lost / reduce_sum(power.detach()).clamp_min(1e-30)

    def _lost(self, change: Change, on_weight: Change, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
        lost = power = self._seen(self.first).new_zeros(())
        for path, wrapper in self.wrappers.items():
            slot = wrapper.weight_slots()[0]
            weight = self._seen(wrapper)
            if on_weight is not _same:
                weight = on_input_channels(weight, slot.n_groups, on_weight)
            weight = _rounded([weight], [weight], slot.quantizer)[0]
            observed = [change(x) for x in self.values or [self._nothing()]]
            observed = observed if self.input_quantizers[path] is not None else []
            seen = _rounded([change(x) for x in self.sample], observed, self.input_quantizers[path])
            moved = lost.new_zeros(())
            if shift is not None:
                moved = product_with(wrapper.row, wrapper.layer, shift.to(weight), self._seen(wrapper))
            for x, wanted in zip(seen, self.wanted[path], strict=True):
                found = product_with(wrapper.row, wrapper.layer, x, weight) + moved
                lost = lost + (found - wanted).square().sum()
                power = power + wanted.square().sum()
        return lost, power


def _same(x: Tensor) -> Tensor:
    return x


def _rounded(given: Sequence[Tensor], observed: Sequence[Tensor], quantizer: Quantizer | None) -> list[Tensor]:
    """Quantize tensors by a copy of the quantizer that has observed others; gradients reach the tensors."""
    if quantizer is None:
        return list(given)
    own = copy.deepcopy(quantizer)
    own.unpin()
    for part in own.modules():
        if isinstance(part, StatisticTracker):
            part.n_calls = 1
            part.reset()
    if observed:  # as one tensor: ranks may have different numbers of batches
        alike = len({x.shape[1:] for x in observed}) == 1
        with torch.no_grad():
            own.pre_observe(torch.cat([x.detach() if alike else x.detach().flatten() for x in observed]))
    return [own(x) for x in given]


def _sample(values: Sequence[Tensor], axis: int) -> list[Tensor]:
    """Return evenly spaced rows of the values, or whole inputs of a convolution, of about `MOST_ROWS` rows together."""
    n_rows = sum(x.numel() // x.shape[axis] for x in values)
    step = max(1, round(n_rows / MOST_ROWS))
    if axis == -1:
        return [torch.cat([x.flatten(0, -2) for x in values])[::step]] if values else []
    batches = [x if x.ndim > -axis else x[None] for x in values]
    return [batch[::step] for batch in batches]


def same_values(wrappers: Mapping[str, nn.Module], calls: Sequence[Call]) -> list[list[str]]:
    """Group layers by the tensor that arrives at them, in order of execution, by path; no forward names it.

    Each layer is grouped in the first call that reaches it; layers that none reaches are left out.
    """
    groups: list[list[str]] = []
    placed: set[str] = set()
    for call in calls:
        arrived: dict[int, tuple[Any, list[str]]] = {}

        def note(path: str, x: Any, arrived: dict[int, tuple[Any, list[str]]] = arrived) -> None:
            known = arrived.get(id(x))
            if path in placed:
                return
            placed.add(path)
            if known is None or known[0]() is not x:  # the id of a tensor that is gone may come again
                arrived[id(x)] = weakref.ref(x), []
                groups.append(arrived[id(x)][1])
            arrived[id(x)][1].append(path)

        def hook_of(path: str, note: Callable[[str, Any], None] = note) -> Any:
            return lambda module, args, kwargs: note(path, _first_argument(args, kwargs))

        hooks = [w.register_forward_pre_hook(hook_of(path), with_kwargs=True) for path, w in wrappers.items()]
        try:
            call()
        finally:
            for hook in hooks:
                hook.remove()
        if len(placed) == len(wrappers):
            break
    return groups


def each_readers(
    model: nn.Module,
    wrappers: Mapping[str, InputSlots],
    calls: Sequence[Call],
    paddings: Sequence[Padding],
    generator_of: Callable[[str], torch.Generator],
) -> Iterator[Readers]:
    """Yield the readers of each value, when every batch that reaches them has arrived; they may be changed then.

    Without calls each layer is given alone, without values.
    """
    is_run = is_any(bool(calls))
    with errors_on_all_ranks():
        groups = same_values(wrappers, calls) if is_run else [[path] for path in wrappers]
    groups = joined_groups(groups)
    groups = [part for group in groups for part in _alike(group, wrappers)]

    def made(paths: Sequence[str], values: list[Tensor]) -> Readers:
        quantizers = {path: input_quantizer_of(model, path) for path in paths}
        steps = wrappers[paths[0]].input_transform
        values = values if steps is None else [steps(x) for x in values]
        return Readers({path: wrappers[path] for path in paths}, values, quantizers, generator_of(paths[0]))

    if not is_run:
        yield from (made(paths, []) for paths in groups)
        return
    of_first = {paths[0]: paths for paths in groups}
    with passes({path: wrappers[path] for path in of_first}, list(calls)) as now:
        for path in meetings(list(of_first), now, (), set()):
            here = [(one, padding.at(path)) for one, padding in zip(now, paddings, strict=True) if one.at == path]
            yield made(of_first[path], [_unpadded(_first_argument(one.args, one.kwargs), mask) for one, mask in here])


def _alike(paths: Sequence[str], wrappers: Mapping[str, InputSlots]) -> list[list[str]]:
    """Split readers of one value into those with the same transforms before them already."""
    parts: list[tuple[dict[str, Tensor], list[str]]] = []
    for path in paths:
        steps = wrappers[path].input_transform
        own = {} if steps is None else steps.state_dict()
        for other, members in parts:
            if own.keys() == other.keys() and all(torch.equal(own[key], other[key]) for key in own):
                members.append(path)
                break
        else:
            parts.append((own, [path]))
    return [members for _, members in parts]


def _first_argument(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()))


def _unpadded(x: Tensor, mask: Tensor | None) -> Tensor:
    fits = mask is not None and x.ndim == 3 and x.shape[:2] == mask.shape
    return x[mask].detach() if fits else x.detach()
