"""Run a model again on one batch from one module on: what ran before it is not computed again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from torchquant.qmodule import QModule

Kept = tuple[Any, list[tuple[Tensor, int]]]
"""The result of a call, and its tensors with their versions: a tensor that was written to later is no result."""

OnCall = Callable[[nn.Module, int, Callable[[], Any], Any], object]


def kept_now(result: Any) -> Kept:
    """Return the result with the present versions of its tensors."""
    return result, [(t, _version(t)) for t in tree_leaves(result) if isinstance(t, Tensor)]


def is_unchanged(kept: Kept | None) -> bool:
    """Tell whether no tensor of a kept result was written to since."""
    return kept is not None and all(_version(tensor) == version for tensor, version in kept[1])


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # views of the inputs of an inference count no writes


class Replay:
    """The calls of the modules of a model on one batch, with their results.

    `record(run)` runs the model once and keeps the results. `again(module, run)` runs it again, and every call that
    comes before the first call of `module` returns what it returned then. All calls before it have the same inputs as
    in the recorded run, if only `module` and what runs after it have changed since then. The modules that are skipped
    are quantized modules, and the largest ones with no quantized module inside. Results hold the memory of one batch.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parts = list(parts_of(model))
        self._part_with = {inner: part for part in self._parts for inner in part.modules()}
        self._kept: dict[tuple[nn.Module, int], Kept] = {}
        self._counts: Counter[nn.Module] = Counter()
        self._start: nn.Module | None = None
        self._known: Kept | None = None
        self._is_recording = False
        self._on_call: OnCall | None = None
        self.n_skipped = 0

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Pass the calls of all parts through `call` while the context lasts.

        What is replaced is the method behind `__call__`: traced models look at the forwards of their modules.
        """
        self._counts.clear()
        for part in self._parts:
            part.__dict__["_call_impl"] = partial(self.call, part)
        try:
            yield
        finally:
            for part in self._parts:
                del part.__dict__["_call_impl"]
            self._start = self._known = self._on_call = None
            self._is_recording = False

    def record(self, run: Callable[[], Any], on_call: OnCall | None = None) -> Any:
        """Run the model and keep the result of every call; `on_call(part, number, again, result)` after each of them.

        `again()` runs the part on the same inputs once more.
        """
        self._kept.clear()
        self._is_recording, self._on_call = True, on_call
        with self._watching():
            result = run()
        self._kept = {call: kept for call, kept in self._kept.items() if is_unchanged(kept)}
        return result

    def again(self, module: nn.Module, run: Callable[[], Any], known: Kept | None = None) -> Any:
        """Run the model; compute only from the first call of `module`, or of the part that holds it, on.

        known: what the first call of `module` returns now, if that is known; it is not run then.
        """
        self._start, self.n_skipped = self._part_with[module], 0
        self._known = known if self._start is module and is_unchanged(known) else None
        with self._watching():
            return run()

    def result(self, module: nn.Module, number: int) -> Any:
        """Return the kept result of a call of a part; None if there is none."""
        return self._kept.get((module, number), (None,))[0]

    def clear(self) -> None:
        """Free the results."""
        self._kept.clear()

    def call(self, part: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Return the kept result of a call that need not run; otherwise run it."""
        number = self._counts[part]
        self._counts[part] += 1
        if part is self._start:
            self._start = None
            if self._known is not None:
                return self._known[0]
        if self._start is not None and (kept := self._kept.get((part, number))) is not None:
            self.n_skipped += 1
            return kept[0]
        again = partial(type(part)._call_impl, part, *args, **kwargs)
        result = again()
        if self._is_recording:
            self._kept[part, number] = kept_now(result)
        if self._on_call is not None:
            self._on_call(part, number, again, result)
        return result


def parts_of(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost quantized modules, and the largest modules without a quantized module inside, once each."""
    seen: set[nn.Module] = set()

    def walk(module: nn.Module) -> Iterator[nn.Module]:
        if module in seen:
            return
        seen.add(module)
        if isinstance(module, QModule) or not any(isinstance(inner, QModule) for inner in module.modules()):
            yield module
        else:
            for child in module.children():
                yield from walk(child)

    yield from walk(module)
