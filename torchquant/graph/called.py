"""The products and softmaxes that forwards call which torch.fx cannot trace, such as those of attention.

Such a forward is known by what it calls: the products, in their order. They are found by one run on the example, and
looked after as they are called in every later run (`graph/watched.py`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from torchquant._shown import shown
from torchquant.errors import ConfigError
from torchquant.graph.operators import OPERATORS
from torchquant.qmodule.state import is_real

SOFTMAX, ATTENTION = "softmax", "attention"
VALUE, CONSTANT = -1, -2
_PLACES: tuple[Any, ...] = (torch, F, Tensor)
_VALUE_NAMES = ("query", "key", "value")
FAMILIES: dict[Any, str] = {}
"""Function of torch -> the name of its operator, for softmax and the operators that multiply matrices."""


@dataclass(frozen=True)
class CalledProduct:
    """A product or a softmax that a forward calls.

    `operator`: its name in the table, or "softmax". `function`: the name of the function of torch that is called.
    `operands`: for each tensor that is multiplied, the place of the softmax that made it among the calls, or -1; () for
    a softmax, and for a product that stays float, since one of its operands is a weight. `loops`: whether the forward
    calls its products several times, all in the same order.
    """

    operator: str
    function: str
    operands: tuple[int, ...] = ()
    loops: bool = False

    def to_data(self) -> list[Any]:
        """Return plain data, for files."""
        return [self.operator, self.function, list(self.operands), self.loops]

    @property
    def target(self) -> Callable[..., Any]:
        """The function of torch."""
        return next(getattr(place, self.function) for place in _PLACES if hasattr(place, self.function))


def called_from_data(data: Any, where: str) -> dict[str, tuple[CalledProduct, ...]]:
    """Read path -> the results of `to_data`; `where` names it in messages. Raises ConfigError."""
    try:
        return {
            path: tuple(CalledProduct(name, f, tuple(at), loops) for name, f, at, loops in calls)
            for path, calls in data.items()
        }
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"{where} must be a mapping of paths to products, got {shown(data)}") from error


def learn_functions() -> None:
    """Bring `FAMILIES` up to date with the table of operators."""
    rows = [row for row in OPERATORS.values() if row.role == "computes" and row.macs is not None]
    named = [(row.name, target) for row in rows for target in row.targets if isinstance(target, str)]
    for name, target in (*named, (SOFTMAX, SOFTMAX)):
        FAMILIES.update({getattr(place, target): name for place in _PLACES if hasattr(place, target)})


def with_operands(
    operator: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], change: Callable[[int, Tensor], Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Change the tensors that a call multiplies: `change(i, tensor)` gets them in order; return the new arguments.

    >>> q, k, v, mask = (torch.full((1,), i) for i in range(4))
    >>> with_operands("attention", (q, k), {"value": v, "attn_mask": mask}, lambda i, x: x + 10 * i)
    ((tensor([0]), tensor([11])), {'value': tensor([22]), 'attn_mask': tensor([3])})
    """
    numbers = count()

    def changed(x: Any) -> Any:
        if isinstance(x, Tensor):
            return change(next(numbers), x)
        return type(x)([changed(part) for part in x]) if type(x) in (list, tuple) else x

    n_reads = OPERATORS[operator].n_reads
    first = args if n_reads is None else args[:n_reads]
    by_place = [changed(x) for x in first]
    by_name = {k: changed(x) if n_reads is None or k in _VALUE_NAMES else x for k, x in kwargs.items()}
    return (*by_place, *args[len(first) :]), by_name


Place = tuple[str, int]


@dataclass(frozen=True)
class Event:
    """One call of a product or a softmax. `stack`: (path, number of the call) of the modules whose forwards run.

    `operands`: for each operand the number of the softmax that made it, VALUE, or CONSTANT for weights and buffers.
    `where`: the lines of code between the forward of the innermost module and the call.
    """

    stack: tuple[Place, ...]
    operator: str
    function: str
    operands: tuple[int, ...]
    where: tuple[tuple[str, int], ...]

    @property
    def is_product(self) -> bool:
        """Whether values are multiplied, and no weight."""
        return self.operator != SOFTMAX and len(self.operands) > 1 and CONSTANT not in self.operands

    def owner(self, owners: Collection[str], others: Collection[str]) -> Place | None:
        """Return the innermost of the owners that runs, and the number of its call; None inside of others."""
        inner = next((place for place in reversed(self.stack) if place[0] in owners or place[0] in others), None)
        return inner if inner is not None and inner[0] in owners else None


class Recorder(TorchFunctionMode):
    """Records the products and softmaxes while a model runs.

    `note(args, value)`, if given, is called after each of them.
    """

    def __init__(self, model: nn.Module, note: Callable[[tuple[Any, ...], Any], None] | None = None) -> None:
        super().__init__()
        learn_functions()
        self.model, self.note = model, note
        self.events: list[Event] = []
        self.running: list[tuple[str, int]] = []
        self.made = WeakTensorKeyDictionary()
        for constant in (*model.parameters(), *model.buffers()):
            self.made[constant] = CONSTANT

    def hooks(self) -> Iterator[Any]:
        """Hook the modules, so that it is known which run; yields the handles. Modules of torch itself do not count."""
        numbers = count()
        for path, module in self.model.named_modules():
            if type(module).__module__.startswith("torch.nn."):
                continue

            def enter(m: nn.Module, args: Any, path: str = path) -> None:
                self.running.append((path, next(numbers)))

            def leave(m: nn.Module, args: Any, value: Any) -> None:
                self.running.pop()

            yield module.register_forward_pre_hook(enter, prepend=True)
            yield module.register_forward_hook(leave)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operator = FAMILIES.get(func)
        event = None if operator is None or not self.running else self._event(operator, func, args, kwargs)
        made = self._made_by(func, args, kwargs)
        value = func(*args, **kwargs)
        if event is not None:
            self.events.append(event)
            made = len(self.events) - 1 if operator == SOFTMAX else VALUE
            if self.note is not None:
                self.note((*args, *kwargs.values()), value)
        for tensor in tensors_in(value):
            self.made.pop(tensor, None)
            if made != VALUE:
                self.made[tensor] = made
        return value

    def _event(self, operator: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Event:
        operands: list[int] = []

        def note(i: int, x: Tensor) -> Tensor:
            operands.append(self.made.get(x, VALUE) if x.is_floating_point() else CONSTANT)
            return x

        if operator != SOFTMAX:
            with_operands(operator, args, kwargs, note)
        return Event(tuple(self.running), operator, func.__name__, tuple(operands), _where())

    def _made_by(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """Return CONSTANT for a function of constants alone, the softmax whose result is passed on, or VALUE."""
        given = [self.made.get(x, VALUE) for x in tensors_in((args, kwargs)) if x.ndim or x.is_floating_point()]
        if given and all(made == CONSTANT for made in given):
            return CONSTANT
        row = OPERATORS.of(func)
        is_passed = row is not None and row.role == "passes" and row.n_reads == 1
        return given[0] if given and is_passed and given[0] >= 0 else VALUE


def _where() -> tuple[tuple[str, int], ...]:
    frame: Any = sys._getframe(3)
    found = []
    while frame is not None and frame.f_code.co_name != "_call_impl":
        found.append((frame.f_code.co_filename, frame.f_lineno))
        frame = frame.f_back
    return tuple(found)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield every tensor in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors_in(part)


def first_real(output: Any) -> Tensor:
    """Return the first tensor of real numbers in the output of a model. Raises ConfigError if there is none."""
    for tensor in tensors_in(output):
        if is_real(tensor):
            return tensor
    raise ConfigError(f"the model must return a tensor of real numbers, got {type(output).__name__} without one")


@dataclass
class Sequences:
    """The calls of each owner. `products`: path -> its calls, once; `repeats`: how often one forward repeats them.

    `varying`: the owners whose calls are not the same each time.
    """

    products: dict[str, tuple[CalledProduct, ...]]
    repeats: dict[str, int]
    varying: list[str]


def sequences(events: Sequence[Event], owners: Collection[str], others: Collection[str] = ()) -> Sequences:
    """Sort events by the innermost of the owners that runs. A forward that loops counts as the calls of one round.

    `others`: paths of modules that look after what they call, which counts for no owner around them.
    """
    calls: dict[Place, list[int]] = {}
    for i, event in enumerate(events):
        owner = event.owner(owners, others)
        if owner is not None:
            calls.setdefault(owner, []).append(i)
    found = Sequences({}, {}, [])
    for (path, _), numbers in calls.items():
        round_ = numbers[: _period([(events[i].operator, events[i].where) for i in numbers])]
        loops = len(round_) < len(numbers)
        products = tuple(replace(_product(events[i], path, round_), loops=loops) for i in round_)
        if found.products.setdefault(path, products) != products and path not in found.varying:
            found.varying.append(path)
        found.repeats[path] = max(len(numbers) // len(round_), found.repeats.get(path, 1))
    for path in found.varying:
        del found.products[path]
    return found


def _period(calls: list[Any]) -> int:
    """Return the smallest number of calls that, repeated, are all calls."""
    n = len(calls)
    return next(p for p in range(1, n + 1) if n % p == 0 and calls == calls[:p] * (n // p))


def _product(event: Event, owner: str, numbers: list[int]) -> CalledProduct:
    is_own = event.is_product and event.stack[-1][0] == owner
    operands = (numbers.index(made) if made in numbers else VALUE for made in event.operands) if is_own else ()
    return CalledProduct(event.operator, event.function, tuple(operands))
