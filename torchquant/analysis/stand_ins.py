"""Let a quantizer do less for a while: pass its values unchanged, or return its first result again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def _in_place_of_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    former = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if former is not None:
            module.__dict__["forward"] = former


@contextmanager
def passing(quantizer: nn.Module) -> Iterator[None]:
    """Let values pass the quantizer unchanged while the context lasts; a clamp in the same pass is still done."""

    def forward(x: Tensor, clamp: tuple[float | None, float | None] | None = None) -> Tensor:
        return x if clamp is None else x.clamp(*clamp)

    with _in_place_of_forward(quantizer, forward):
        yield


@contextmanager
def called_once(quantizer: nn.Module) -> Iterator[None]:
    """Let the quantizer return its first result again in every further call while the context lasts."""
    results: list[Any] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not results:
            results.append(type(quantizer).forward(quantizer, *args, **kwargs))
        return results[0]

    with _in_place_of_forward(quantizer, forward):
        yield
