"""Forward passes of many batches in lockstep: each stops before every layer until all have arrived there.

Each pass runs in its own thread, and one thread runs at a time. So the inputs of all batches meet at a layer, computed
by the changed layers before it, and nothing runs twice: no forward is cut into blocks, traced, or restarted. The only
tensors kept meanwhile are those that the forwards themselves hold at that point.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

Call = Callable[[], object]


class _Stopped(BaseException):
    """Unwinds a pass that shall not continue; no forward catches it by accident."""


class Pass:
    """One forward, which waits before each of the watched modules.

    `at`: the name of the module it waits before, None at its end. `args`, `kwargs`: the arguments of the coming call.
    """

    def __init__(self, call: Call) -> None:
        self.at: str | None = None
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        self._call = call
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

    def _leave(self, at: str | None, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> None:
        self.at, self.args, self.kwargs = at, args, dict(kwargs or {})
        self._waits.release()

    def arrive(self, at: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Wait before a module; called in the pass's own thread."""
        self._leave(at, args, kwargs)
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
def passes(modules: Mapping[str, nn.Module], calls: list[Call]) -> Iterator[list[Pass]]:
    """Make one pass per call, not yet started, that waits before each of the modules; all are ended on exit."""

    def stop_before(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            now = getattr(_here, "now", None)
            if now in mine:
                now.arrive(name, args, kwargs)

        return hook

    mine = [Pass(call) for call in calls]
    hooks = [m.register_forward_pre_hook(stop_before(name), with_kwargs=True) for name, m in modules.items()]
    try:
        yield mine
    finally:
        for one in mine:
            one.stop()
        for hook in hooks:
            hook.remove()
