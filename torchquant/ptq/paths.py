"""Find which weights share their channels: what produces a value, and all that reads it.

The float model runs once, and each call of torch is followed. The output channels of a layer get numbers, and a tensor
of numbers goes along with each value: what moves values is run on the numbers as well, what commutes with a factor for
each channel keeps them, an addition makes those of its operands one, and all else ends the path (`channel_rules.py`).
No name of a module and no graph is asked for, so models that cannot be traced are followed too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from torchquant.graph.called import tensors_in
from torchquant.graph.operators import OPERATORS
from torchquant.graph.recording import call_with_copies, undisturbed
from torchquant.ptq.channel_calls import BOUNDED, FIXED, POSITIVE, Call
from torchquant.ptq.channel_rules import RULES
from torchquant.ptq.channels import NORMED, STOP, Channels
from torchquant.ptq.ends import Columns, End, NormInput, Parameters, Scale
from torchquant.qmodule import QModuleState
from torchquant.qmodule.weight_slots import LayerSlot, WeightSlot
from torchquant.utils import qmodule_state, qmodules, weight_slots


@dataclass(eq=False)
class ChannelSet:
    """Weights that share channels: dividing what `producers` give by a factor that `readers` make good changes nothing.

    `n`: the number of its channels; `index` of an end says which of them its own channels are. `notes`: what a factor
    or a shift must heed: "positive", "fixed", "bounded".
    """

    producers: list[End]
    readers: list[End]
    n: int
    notes: dict[str, list[Any]] = field(repr=False)

    def scale(self, factors: Tensor) -> None:
        """Divide each channel of the value by its factor, (n,): producers give less, and readers take more of it."""
        with torch.no_grad():
            for end in self.producers:
                end.scale(1.0 / factors.double())
            for end in self.readers:
                end.scale(factors.double())

    @property
    def can_shift(self) -> bool:
        """Whether a shift of the channels can go from the bias of the one producer into those of all readers."""
        takes = all(isinstance(end, Columns) and end.has_bias and not end.is_padded for end in self.readers)
        is_passed = not {FIXED, POSITIVE, BOUNDED} & set(self.notes)
        return takes and is_passed and len(self.producers) == 1 and self.producers[0].bias is not None

    def shift(self, shift: Tensor) -> None:
        """Take a shift, (n,), off the channels of the value; the biases of the readers make it good."""
        with torch.no_grad():
            for end in (*self.producers, *self.readers):
                own = torch.where(end.index < 0, 0.0, shift[end.index])
                if isinstance(end, Columns):
                    end.absorb(own)
                elif end.bias is not None:
                    end.bias.sub_(own.to(end.bias))

    def gathered(self, end: End, values: Tensor) -> Tensor:
        """Bring values of an end's channels, (C,), >= 0, to the set's: the largest of each, (n,), 0 if it has none."""
        known = end.index >= 0
        found = torch.zeros(self.n, dtype=torch.float64)
        return found.scatter_reduce(0, end.index[known], values.detach().double().cpu()[known], "amax")

    @property
    def name(self) -> str:
        """Name the ends."""
        return f"{', '.join(e.path for e in self.producers)} -> {', '.join(e.path for e in self.readers)}"


@dataclass(frozen=True)
class ChannelSets:
    """All sets of a model, and why other ends cannot change: (end, reason). `unseen`: weights that did not run."""

    sets: tuple[ChannelSet, ...]
    left: tuple[tuple[End, str], ...]
    unseen: tuple[str, ...] = ()

    def reading(self, path: str) -> ChannelSet | None:
        """Return the set that the weight of the layer at a path reads, if it can be scaled."""
        return next((s for s in self.sets for end in s.readers if end.path == path), None)


def channel_sets(model: nn.Module, example_inputs: Any) -> ChannelSets:
    """Run the model once, in BYPASSED and evaluation mode, and find the weights that share channels.

    example_inputs: as for `torchquant.quantize`.
    """
    return _sets(followed(model, example_inputs))


def followed(model: nn.Module, example_inputs: Any) -> Run:
    """Follow the channels of a model through one forward, in BYPASSED and evaluation mode."""
    run = Run(model)
    is_float = next(qmodules(model), None) is None
    with (
        torch.no_grad(),
        nullcontext() if is_float else qmodule_state(model, QModuleState.BYPASSED),
        undisturbed(model, training=False),
        run.watching(),
        run,
    ):
        output = call_with_copies(model, example_inputs)
    run.finish(output)
    return run


class Run(TorchFunctionMode):
    """Follows the channels of a model through one forward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.channels = Channels()
        self.numbers = WeakTensorKeyDictionary()
        self.copies = WeakTensorKeyDictionary()
        self.scales = WeakTensorKeyDictionary()
        self.squares = WeakTensorKeyDictionary()
        self.ends: dict[tuple[type[End], str, int], End] = {}
        self.running: list[tuple[str, nn.Module]] = []
        self.parameters = {p.data_ptr(): p for p in model.parameters() if p.numel()}
        self.names = {t.data_ptr(): name for name, t in (*model.named_buffers(), *model.named_parameters())}
        self.used: set[int] = set()
        self.given: list[tuple[str, list[Tensor]]] = []
        self.slots: dict[int, WeightSlot] = {}
        for slot in weight_slots(model):
            self.slots[slot.weight.data_ptr()] = slot
            if isinstance(slot, LayerSlot) and slot.module.fold_mode is not None and slot.module.bn.weight is not None:
                self.slots[slot.module.bn.weight.data_ptr()] = slot

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Know which module runs. Hooks of the modules themselves would be a change of the model."""
        paths = {module: path for path, module in self.model.named_modules()}

        def enter(m: nn.Module, args: Any) -> None:
            self.running.append((paths.get(m, ""), m))
            taken = [self.numbers[t] for t in tensors_in(args) if t in self.numbers]
            if taken and next(m.children(), None) is not None:
                self.given.append((paths.get(m, ""), taken))

        def leave(m: nn.Module, args: Any, y: Any) -> None:
            self.running.pop()

        handles = register_module_forward_pre_hook(enter), register_module_forward_hook(leave)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if any(t in self.numbers or self.parameter(t) is not None for t in tensors_in((args, kwargs))):
            self._follow(func, args, kwargs, result)
        elif isinstance(result, Tensor):  # written to in place
            self.numbers.pop(result, None)
        return result

    def _follow(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        operator, own = OPERATORS.of(func), getattr(func, "__name__", str(func))
        name = own if own in RULES or operator is None else operator.name
        if (operator is not None and operator.role == "shape") or (own == "__get__" and not isinstance(result, Tensor)):
            return
        outputs = [t for t in tensors_in(result) if t.is_floating_point()]
        call = Call(func, name, args, kwargs, outputs[0] if outputs else torch.empty(0))
        rule = RULES.get(name)
        ids = self.stop(call) if rule is None or not (outputs or rule in (RULES["__setitem__"],)) else rule(self, call)
        for tensor, numbers in zip(outputs, tree_leaves(ids) if ids is not None else (), strict=False):
            if numbers.shape == tensor.shape:
                self.numbers[tensor] = numbers
            else:
                self.note(numbers, STOP, f"moved by {self._named(call)}")
        for tensor in outputs if ids is None else ():
            self.numbers.pop(tensor, None)

    def _named(self, call: Call) -> str:
        return f"{getattr(call.function, '__name__', call.name)} {self.where}".strip()

    @property
    def where(self) -> str:
        """Say which module runs."""
        path = self.running[-1][0] if self.running else ""
        return f"in {path}" if path else "in the model"

    def activation(self, bound: float) -> Any:
        """Return the activation module that runs, or a text that says which function does."""
        path, module = self.running[-1] if self.running else ("", self.model)
        return module if type(module) is nn.ReLU6 else f"its values end at {bound:g}, {self.where}"

    def is_weight(self, value: Any) -> bool:
        """Tell whether a value is a whole parameter of the model."""
        held = self.parameters.get(value.data_ptr()) if isinstance(value, Tensor) else None
        if held is None or not value.is_floating_point():
            return False
        self.used.add(value.data_ptr())
        return held is value or held.shape == value.shape

    def parameter(self, value: Any) -> Tensor | None:
        """Return the parameter that a value is, or is a copy of in another type; None for others."""
        held = self.copies.get(value, value) if isinstance(value, Tensor) else value
        return held if self.is_weight(held) else None

    def copied(self, value: Tensor, copy: Tensor) -> None:
        """Note that a tensor is a copy of a parameter, or of a copy of one."""
        if copy is not value:
            self.copies[copy] = self.parameter(value)

    def is_scale(self, value: Any) -> bool:
        """Tell whether a value is a parameter, or one plus a number."""
        return isinstance(value, Tensor) and (value in self.scales or self.parameter(value) is not None)

    def scale_of(self, value: Tensor) -> End:
        """Return the end of a value that is a scale."""
        held = self.parameter(value)
        found: End = self.scales[value] if held is None else self.end(Scale, (held,), held.numel(), "a scale")
        return found

    def ids_of(self, value: Any, parameters: bool = True) -> Tensor | None:
        """Return the numbers of a value's elements; those of a parameter, if wanted, as what gives them."""
        if not isinstance(value, Tensor):
            return None
        if value in self.numbers:
            found: Tensor = self.numbers[value]
            return found
        held = self.parameter(value) if parameters else None
        return None if held is None else self.end(Parameters, (held,), held.numel(), "a value").ids.view(value.shape)

    def end(self, kind: type[End], tensors: tuple[Tensor, ...], n: int, family: str, **more: Any) -> End:
        """Return the end of a kind for a tensor, a new one at its first use."""
        key = kind, family, tensors[0].data_ptr()
        if key not in self.ends:
            path = next((name for t in tensors if (name := self.names.get(t.data_ptr()))), self.where)
            path = path if family.startswith("a ") else path.rpartition(".")[0]
            path = path.removesuffix(".weight") if kind is Scale else path
            slot = self.slots.get(tensors[0].data_ptr())
            self.ends[key] = kind(path, family, slot, tensors, self.channels.new(n), **more)
        return self.ends[key]

    def note(self, ids: Tensor | None, what: str, where: object = "") -> None:
        """Note something about numbers; see `Channels.note`."""
        if ids is not None:
            self.channels.note(ids, what, where)

    def stop(self, call: Call, value: Any = None) -> Tensor | None:
        """End the path of a value, by default of all that the call reads; the result has no numbers: None."""
        for tensor in tensors_in((call.args, call.kwargs)) if value is None else tensors_in((value,)):
            self.note(self.ids_of(tensor), STOP, self.read_by(call))
        return None

    def read_by(self, call: Call) -> str:
        """Say which call reads a value."""
        return f"read by {self._named(call)}"

    def finish(self, output: Any) -> None:
        """End the paths of what the model returns, and of what cannot be known."""
        for tensor in _tensors_of(output):
            if tensor in self.numbers:
                self.note(self.numbers[tensor], STOP, "it is an output of the model")
        uses: dict[int, list[End]] = {}
        for end in self.ends.values():
            for tensor in end.tensors:
                uses.setdefault(tensor.data_ptr(), []).append(end)
        for ends in uses.values():
            if len({(end.family, end.path) for end in ends}) > 1:
                for end in ends:
                    self.note(
                        end.ids, STOP, f"its parameter is also {', '.join(e.family for e in ends if e is not end)}"
                    )
        for path, taken in self.given:
            missed = [name for name in self.unseen if name.startswith(f"{path}.")]
            for ids in taken if missed else ():
                self.note(ids, STOP, f"goes into {path}, where {missed[0]} did not run and may read it")

    @property
    def unseen(self) -> tuple[str, ...]:
        """The weights that nothing read in the run."""
        weights = ((ptr, p) for ptr, p in self.parameters.items() if p.ndim > 1)
        return tuple(self.names[ptr] for ptr, _ in weights if ptr not in self.used)


def _tensors_of(output: Any) -> Iterator[Tensor]:
    """Yield the tensors of any result: also those in attributes of an object."""
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            yield leaf
        elif hasattr(leaf, "__dict__"):
            yield from tensors_in(vars(leaf))


def _sets(run: Run) -> ChannelSets:
    """Gather the ends that share numbers."""
    n, labels, ends = run.channels.n, run.channels.labels(), list(run.ends.values())
    stops = [(labels[ids], str(where)) for ids, what, where in run.channels.notes if what in (STOP, NORMED)]
    stop = torch.full((n,), len(stops))
    for i, (own, _) in reversed(list(enumerate(stops))):
        stop[own] = i
    stopped = stop < len(stops)
    free = [(own := labels[end.ids])[~stopped[own]].unique() for end in ends]
    sets: list[ChannelSet] = []
    set_of = torch.full((n,), -1)
    for group in sharing(n, free):
        channels = torch.cat([free[i] for i in group]).unique()
        for i in group:
            own = labels[ends[i].ids]
            ends[i].index = torch.where(stopped[own], -1, torch.searchsorted(channels, own))
        readers = [ends[i] for i in group if isinstance(ends[i], Columns | NormInput)]
        producers = [ends[i] for i in group if not isinstance(ends[i], Columns | NormInput)]
        if readers and producers:
            set_of[channels] = len(sets)
            sets.append(ChannelSet(producers, readers, len(channels), {}))
    for ids, what, where in run.channels.notes:
        for i in set_of[labels[ids]].unique().tolist() if what not in (STOP, NORMED) else ():
            if i >= 0:
                sets[i].notes.setdefault(what, []).append(where)
    left = tuple(
        (end, stops[int(stop[labels[end.ids]].min())][1]) for end, own in zip(ends, free, strict=True) if not len(own)
    )
    return ChannelSets(tuple(sets), left, run.unseen)


def sharing(n: int, free: list[Tensor]) -> list[list[int]]:
    """Group what has a number in common. free: the numbers of each, below n; one without numbers is in no group."""
    owner, parent = torch.full((n,), -1), list(range(len(free)))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    for i, own in enumerate(free):
        for other in owner[own].unique().tolist():
            if other >= 0:
                parent[root(other)] = root(i)
        owner[own] = i
    groups: dict[int, list[int]] = {}
    for i, own in enumerate(free):
        if len(own):
            groups.setdefault(root(i), []).append(i)
    return list(groups.values())
