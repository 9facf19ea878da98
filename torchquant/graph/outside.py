"""Keep the state that a forward can reach outside of its model: random states, and globals of its file."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from torchquant.graph.fingerprint import fingerprint


def random_states() -> tuple[Any, ...]:
    """Return the random states of Python, numpy and torch (on the CPU)."""
    numpy = sys.modules.get("numpy")
    with torch._C.DisableTorchFunction():
        torchs = bytes(torch.get_rng_state().numpy())
    state = None if numpy is None else numpy.random.get_state(legacy=False)
    of_numpy = () if state is None else (state["state"]["key"].tobytes(), state["state"]["pos"], state["has_gauss"])
    return random.getstate(), torchs, of_numpy


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Restore the random states of Python, numpy and torch at the end of the context."""
    numpy, ours, torchs = sys.modules.get("numpy"), random.getstate(), torch.get_rng_state()
    numpys = None if numpy is None else numpy.random.get_state()
    try:
        yield
    finally:
        random.setstate(ours)
        torch.set_rng_state(torchs)
        if numpy is not None:
            numpy.random.set_state(numpys)


@contextmanager
def globals_kept(model: nn.Module) -> Iterator[None]:
    """Restore the lists, dictionaries and sets that forwards of the model read from their files."""
    kept = []
    for forward in {type(module).forward for module in model.modules()}:
        for where, name, _ in globals_of(forward):
            value = vars(sys.modules[where])[name]
            if isinstance(value, list | dict | set):
                kept.append((value, value.copy()))
    try:
        yield
    finally:
        for value, former in kept:
            value.clear()
            value.extend(former) if isinstance(value, list) else value.update(former)


def globals_of(forward: Callable[..., Any]) -> Iterator[tuple[str, str, Any]]:
    """Yield (Python module, name, fingerprint) of the plain values that a forward reads from its file."""
    forward = getattr(forward, "__func__", forward)
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    code = getattr(forward, "__code__", None)
    home = sys.modules.get(forward.__module__ or "")
    if code is None or home is None or vars(home) is not forward.__globals__ or home.__name__.startswith("torch."):
        return
    for name in code.co_names:
        value = vars(home).get(name)
        if name in vars(home) and isinstance(value, bool | int | float | str | list | dict | set | type(None)):
            yield home.__name__, name, fingerprint(value)
