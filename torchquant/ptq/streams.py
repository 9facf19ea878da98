"""Forward passes of many batches in lockstep: each stops before every layer until all have arrived there.

Each pass runs in its own thread, and one thread runs at a time. So the inputs of all batches meet at a layer, computed
by the changed layers before it, and nothing runs twice: no forward is cut into blocks, traced, or restarted. The only
tensors kept meanwhile are those that the forwards themselves hold at that point.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from torchquant.ptq.overflow import Overflow
from torchquant.ptq.ranks import errors_on_all_ranks
from torchquant.range_observers._distributed import reduce_max

Call = Callable[[], object]


class _Stopped(BaseException):
    """Unwinds a pass that shall not continue; no forward catches it by accident."""


class Pass:
    """One forward, which waits before each of the watched modules.

    `at`: the name of the module it waits before, None at its end. `module`, `args`, `kwargs`: the coming call.
    """

    def __init__(self, call: Call, overflow: Overflow | None = None) -> None:
        self.at: str | None = None
        self.module: nn.Module | None = None
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        self._call, self._overflow = call, overflow
        self._error: BaseException | None = None
        self._may_go, self._waits = threading.Semaphore(0), threading.Semaphore(0)
        self._is_stopped = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._has_begun = False

    def _run(self) -> None:
        _here.now = self
        self._may_go.acquire()
        try:
            if not self._is_stopped:
                with torch.no_grad():
                    self._call()
        except _Stopped:
            pass
        except BaseException as error:  # noqa: BLE001 - it is raised where the pass is moved on
            self._error = error
        self._leave(None)

    def _leave(
        self,
        at: str | None,
        module: nn.Module | None = None,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.at, self.module, self.args, self.kwargs = at, module, args, dict(kwargs or {})
        if self._overflow is not None:
            self._overflow.hold(self, (self.args, self.kwargs))
        self._waits.release()

    def arrive(self, at: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Wait before a module; called in the pass's own thread."""
        self._leave(at, module, args, kwargs)
        self._may_go.acquire()
        if self._is_stopped:
            raise _Stopped

    def advance(self) -> None:
        """Run to the next module, or to the end. Raises any error that the forward raises."""
        if not self._has_begun:
            self._has_begun = True
            self._thread.start()
        self.args, self.kwargs = (), {}
        self._may_go.release()
        self._waits.acquire()
        if self.at is None:
            self._thread.join()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """End the pass at the point where it waits."""
        if self._has_begun and self._thread.is_alive():
            self._is_stopped = True
            self._may_go.release()
            self._thread.join()


_here = threading.local()


@contextmanager
def passes(
    modules: Mapping[str, nn.Module | list[nn.Module]], calls: list[Call], overflow: Overflow | None = None
) -> Iterator[list[Pass]]:
    """Make one pass per call, not yet started, that waits before each of the modules; all are ended on exit.

    Several modules may have one name, of which a pass calls one. `overflow`: limits the memory of what they wait with.
    """

    def stop_before(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            now = getattr(_here, "now", None)
            if now in mine:
                now.arrive(name, module, args, kwargs)

        return hook

    mine = [Pass(call, overflow) for call in calls]
    named = [(name, m) for name, some in modules.items() for m in (some if isinstance(some, list) else [some])]
    hooks = [m.register_forward_pre_hook(stop_before(name), with_kwargs=True) for name, m in named]
    try:
        yield mine
    finally:
        for one in mine:
            one.stop()
        for hook in hooks:
            hook.remove()


def meetings(order: Sequence[str], now: Sequence[Pass], floats: Sequence[Pass], again: set[str]) -> Iterator[str]:
    """Yield each module when all passes that reach it, on any rank, wait before it; it may be changed then.

    `order`: names of the modules; of several at which passes wait, the first. `now`, `floats`: passes of the quantized
    and of the float model; the latter may be none. Names of modules that a pass reaches a second time go to `again`.
    """
    with errors_on_all_ranks():
        for one in (*now, *floats):
            one.advance()
    done: set[str] = set()
    while (place := _agreed_place(order, {one.at for one in now if one.at is not None}, done)) <= len(order):
        name = order[place] if place < len(order) else None
        if name is not None:
            done.add(name)
            yield name
        with errors_on_all_ranks():
            for i, one in enumerate(now):
                if one.at in done:
                    again.update({one.at} - {name})
                    left = one.at
                    one.advance()
                    if floats:
                        _follow(floats[i], left, one.at, order)


def _follow(other: Pass, left: str | None, at: str | None, order: Sequence[str]) -> None:
    """Move the float forward on to where the quantized one has come from `left`, past what that did not call.

    Where the two take different ways, as through experts, a module that comes before in the order was not called.
    """
    if other.at == left:
        other.advance()
    while at is not None and other.at not in (None, at) and order.index(other.at) < order.index(at):
        other.advance()


def _agreed_place(order: Sequence[str], waiting: set[str], done: set[str]) -> int:
    """Return the place in the order of the next module to work on: the first at which a forward of any rank waits.

    The length of the order if all modules at which forwards wait are done; one more if none waits.
    """
    place = min((order.index(path) for path in waiting - done), default=len(order) + (not waiting))
    return -int(reduce_max(torch.tensor(-place)))
