"""Change and read the state of a whole model."""

from __future__ import annotations

import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from torchquant._arguments import checked
from torchquant._tables import ShownAsTables, text_table
from torchquant.errors import ConfigError, NoAffineViewError
from torchquant.qmodule.fused import watch_fused_paths
from torchquant.qmodule.state import QModule, QModuleState, set_states
from torchquant.qmodule.weight_slots import WeightSlot
from torchquant.quantizers import Quantizer
from torchquant.range_observers._statistics import StatisticTracker

if TYPE_CHECKING:
    import asyncio

__all__ = [
    "SiteReport",
    "StateReport",
    "freeze_bn",
    "observe_weights",
    "qmodule_state",
    "qmodules",
    "quantizer_parameters",
    "set_qmodule_state",
    "state_report",
    "weight_slots",
]


@checked
def qmodules(model: nn.Module) -> Iterator[tuple[str, QModule]]:
    """Yield (path, QModule) of every QModule in the model; write each path into its module for messages."""
    for path, module in model.named_modules():
        if isinstance(module, QModule):
            module.path = path
            yield path, module


def weight_slots(model: nn.Module) -> Iterator[WeightSlot]:
    """Yield every weight of every QModule in the model; a module in two places counts once."""
    for _, module in qmodules(model):
        yield from module.weight_slots()


@dataclass
class _Holder:
    """A thread, or an asyncio task in it, that is inside `qmodule_state` on a module, and its nesting depth."""

    thread: threading.Thread
    task: asyncio.Task[Any] | None
    depth: int = 0

    @staticmethod
    def current() -> _Holder:
        asyncio = sys.modules.get("asyncio")  # if it is not imported, no task runs
        try:
            return _Holder(threading.current_thread(), None if asyncio is None else asyncio.current_task())
        except RuntimeError:  # no event loop runs in this thread
            return _Holder(threading.current_thread(), None)

    def is_gone(self) -> bool:
        return not self.thread.is_alive() or (self.task is not None and self.task.done())


_holders: WeakKeyDictionary[QModule, _Holder] = WeakKeyDictionary()
_holders_lock = threading.RLock()


def _refuse_if_held(modules: Sequence[QModule], doing: str) -> None:
    """Raise ConfigError if another thread or task is inside `qmodule_state` on one of the modules."""
    me = _Holder.current()
    for module in modules:
        holder = _holders.get(module)
        if holder is None or holder.is_gone() or (holder.thread, holder.task) == (me.thread, me.task):
            continue
        who = f"thread {holder.thread.name!r}" if holder.task is None else f"task {holder.task.get_name()!r}"
        raise ConfigError(
            f"cannot {doing} in thread {me.thread.name!r}: {who} is inside qmodule_state on the same model (at "
            f"{module.path or type(module).__name__}), and a module has one state for all threads. Give each thread a "
            "copy.deepcopy of the model, hold one lock around both, or set one state for all with set_qmodule_state "
            "before they start"
        )


@checked
def set_qmodule_state(model: nn.Module, state: QModuleState) -> None:
    """Put every QModule of the model in `state`, until it is set again.

    Raises ConfigError, also while another thread is inside `qmodule_state` on the model.

    >>> set_qmodule_state(nn.Linear(1, 1), "QUANT_EVAL")
    Traceback (most recent call last):
    torchquant.errors.ConfigError: set_qmodule_state: state must be a QModuleState, got 'QUANT_EVAL'
    """
    watch_fused_paths(model)
    modules = _found(model, "set_qmodule_state")
    with _holders_lock:
        _refuse_if_held(modules, "set a state")
        set_states([(module, state) for module in modules])
        _observe_unreached_weights(modules, state)


def _observe_unreached_weights(modules: Sequence[QModule], state: QModuleState) -> None:
    """Let modules that calibration did not reach observe their weights, such as experts that got no batch.

    A weight needs no data. If no weight of the model was observed yet, nothing is done: calibration was forgotten.
    """
    if not state.is_weight_quantized or state.is_weight_observed:
        return
    ready = {m: [q.is_ready for slot in m.weight_slots() if (q := slot.quantizer) is not None] for m in modules}
    if any(any(flags) for flags in ready.values()):
        for module, flags in ready.items():
            if not all(flags):
                module.observe_weight()


def _found(model: nn.Module, caller: str) -> list[QModule]:
    """Return the QModules of the model; warn if there are none, because the call then has no effect."""
    found = [module for _, module in qmodules(model)]
    if not found:
        warnings.warn(
            f"{caller} has no effect: {type(model).__name__} has no QModule, so nothing in it is quantized. Quantize "
            "it with torchquant.quantize, whose result is a copy, or wrap its layers in QWrapper",
            stacklevel=4 if caller != "qmodule_state" else 3,  # above the wrapper that checks the arguments
        )
    return found


@checked
class qmodule_state:  # noqa: N801 - published name
    """`with qmodule_state(model, state):` sets a state and restores the former state of each module on exit.

    This also works after an exception, nested, and when the same object is used again. While one thread or asyncio task
    is inside, another that enters on the same modules gets a ConfigError: a module has one state.

    >>> from torchquant.qmodule import QOp
    >>> op = QOp(abs, None)
    >>> with qmodule_state(op, QModuleState.QUANT_EVAL):
    ...     op.state.name
    'QUANT_EVAL'
    >>> op.state.name
    'BYPASSED'
    """

    def __init__(self, model: nn.Module, state: QModuleState) -> None:
        self.model = model
        self.state = state
        self._former: list[list[tuple[QModule, QModuleState]]] = []

    def __enter__(self) -> nn.Module:
        watch_fused_paths(self.model)
        modules = _found(self.model, "qmodule_state")
        with _holders_lock:
            _refuse_if_held(modules, f"enter {self.state.name}")
            for module in modules:
                holder = _holders.get(module)
                if holder is None or holder.is_gone():
                    holder = _holders[module] = _Holder.current()
                holder.depth += 1
            self._former.append([(module, module.state) for module in modules])
            set_states([(module, self.state) for module in modules])
            _observe_unreached_weights(modules, self.state)
        return self.model

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with _holders_lock:
            former = self._former.pop()
            set_states(former)
            for module, _ in former:
                holder = _holders.get(module)
                if holder is not None:
                    holder.depth -= 1
                    if holder.depth <= 0:
                        del _holders[module]


@checked
def observe_weights(model: nn.Module) -> None:
    """Let every weight quantizer observe its current weight. No data is needed.

    After the last optimizer step the weight ranges are one step old; this updates them.
    """
    for module in _found(model, "observe_weights"):
        module.observe_weight()


def observe_any_weights(model: nn.Module) -> None:
    """Do the same as `observe_weights` without a warning if there are none, for configurations that select nothing."""
    for _, module in qmodules(model):
        module.observe_weight()


@checked
def quantizer_parameters(model: nn.Module) -> dict[str, Any]:
    """Return the learned numbers of all quantizers as an optimizer group without weight decay.

    >>> from torchquant.qmodule import QOp
    >>> from torchquant.quantizers import LSQQuantizer
    >>> model = nn.Sequential(nn.Linear(2, 2), QOp(abs, LSQQuantizer(4)))
    >>> learned = quantizer_parameters(model)
    >>> len(learned["params"]), learned["weight_decay"]
    (1, 0.0)
    """
    learned = {id(p): p for m in model.modules() if isinstance(m, Quantizer) for p in m.parameters()}
    return {"params": list(learned.values()), "weight_decay": 0.0}


@checked
def freeze_bn(model: nn.Module, frozen: bool = True) -> None:
    """Let the batch norms fused into QModules use their running statistics, also in train mode."""
    for _, module in qmodules(model):
        module.freeze_bn(frozen)


def scalar_key(path: str, site: str, name: str) -> str:
    """Return "PATH/SITE/NAME", under which loggers get a number of a quantizer; "root" for the model itself."""
    return re.sub(r"[^\w./-]", "_", f"{path or 'root'}/{site}/{name}")


@dataclass(frozen=True)
class SiteReport:
    """The report on one quantizer of a model."""

    path: str
    site: str
    state: str
    scheme: str
    n_bits: int | None
    calibrated: bool
    ranges: str
    numbers: Mapping[str, float] = field(default_factory=dict, repr=False)
    """Bits, steps and ranges as numbers; shown by `StateReport.scalars`, not in the table."""


class StateReport(ShownAsTables, list[SiteReport]):
    """A list of SiteReport that prints as a table."""

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return rows as plain dictionaries, for JSON or pandas."""
        return [{name: getattr(row, name) for name in _COLUMNS} for row in self]

    def scalars(self) -> dict[str, float]:
        """Return all numbers under flat keys, for loggers: "PATH/SITE/NAME", such as "layer1.0/output/range_max".

        NAME: "bits"; "calibrated", 1 or 0; and from then on the statistics of the range ("range_min", "range_max", or
        the numbers of another scheme: of several channels the lowest, the highest or the mean) and "scale_min",
        "scale_max", the smallest and the largest step of a uniform grid. Keys have letters, digits and ``_./-`` only.

        >>> from torchquant.qmodule import QOp
        >>> from torchquant.quantizers import make_quantizer
        >>> list(state_report(QOp(abs, make_quantizer("affine:8"))).scalars())
        ['root/output/bits', 'root/output/calibrated']
        """
        found = {}
        for row in self:
            path = "" if row.path == "(root)" else row.path
            found.update({scalar_key(path, row.site, name): value for name, value in row.numbers.items()})
        return found

    def __str__(self) -> str:
        return text_table(_COLUMNS, (list(row.values()) for row in self.to_dicts()))


_WHOLE = (
    "and a report reads whole numbers; report on a model that is not sharded, with the state of "
    "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))"
)
_COLUMNS = [name for name in SiteReport.__dataclass_fields__ if name != "numbers"]


def expect_whole(part: nn.Module, path: str, why: str) -> None:
    """Raise ConfigError if parameters of this part of a model are sharded over ranks; `why` says what to do."""
    if any(hasattr(parameter, "full_tensor") for parameter in part.parameters()):
        raise ConfigError(f"the parameters of {path or 'the model'} are sharded over ranks, as fully_shard does, {why}")


@checked
def state_report(model: nn.Module) -> StateReport:
    """Report on every quantizer of the model: path, slot, state, scheme, bits, whether calibrated, ranges.

    Raises ConfigError where numbers that a quantizer learns are sharded over ranks.
    """
    for path, module in qmodules(model):
        for site, quantizer in module.quantizers().items():
            expect_whole(quantizer, f"{path} {site}".strip(), _WHOLE)
    return StateReport(
        SiteReport(
            path=path or "(root)",
            site=site,
            state=module.state.name,
            scheme=type(quantizer).__name__,
            n_bits=getattr(quantizer, "n_bits", None),
            calibrated=quantizer.is_ready,
            ranges=_ranges(quantizer),
            numbers=_numbers(quantizer),
        )
        for path, module in qmodules(model)
        for site, quantizer in module.quantizers().items()
    )


def _statistics(tracker: StatisticTracker) -> list[tuple[str, Tensor]]:
    """Return the statistics of a tracker by name, without empty ones such as a histogram that is not kept."""
    found = zip(tracker.statistics, tracker.get(), strict=True)
    return [(name, value) for name, value in found if value.numel()]


def _ranges(quantizer: Quantizer) -> str:
    if not quantizer.is_ready:
        return "-"
    tracker = getattr(quantizer, "observer", quantizer)
    if not isinstance(tracker, StatisticTracker):
        return ", ".join(_span(*number, "parts") for number in quantizer.numbers().items()) or "-"
    parts = [_span(*statistic, "channels") for statistic in _statistics(tracker)]
    return ", ".join([*parts, f"union of {tracker.n_calls} calls"] if tracker.n_calls > 1 else parts)


def _span(name: str, value: Tensor, shared: str) -> str:
    low, high = float(value.min()), float(value.max())
    return f"{name} {low:.4g}" + (f"..{high:.4g} ({value.numel()} {shared})" if value.ndim else "")


_OF_CHANNELS: dict[str, Callable[[Tensor], Tensor]] = {"min": torch.min, "max": torch.max}


@torch.no_grad()
def _numbers(quantizer: Quantizer) -> dict[str, float]:
    """Return the numbers of a quantizer that a logger records."""
    n_bits = getattr(quantizer, "n_bits", None)
    found = {} if n_bits is None else {"bits": float(n_bits)}
    found["calibrated"] = float(quantizer.is_ready)
    if not quantizer.is_ready:
        return found
    tracker = getattr(quantizer, "observer", quantizer)
    if isinstance(tracker, StatisticTracker):
        for name, value in _statistics(tracker):
            found[name] = float(_OF_CHANNELS.get(tracker.joined_by.get(name, ""), torch.mean)(value))
    with suppress(NoAffineViewError):
        delta = torch.as_tensor(quantizer.affine_params().delta)
        found |= {"scale_min": float(delta.min()), "scale_max": float(delta.max())}
    return found
