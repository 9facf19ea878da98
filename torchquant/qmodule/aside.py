"""Modules that look after the functions of torch which they call: those who watch the calls around them do not."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack


class WatchedCalls(TorchFunctionMode):
    """A mode that takes calls of functions of torch in one forward, but not those in modules that run aside.

    `paused`: how many of these run at the moment.
    """

    paused = 0


def aside(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Let a method run aside: the innermost `WatchedCalls` around it pauses."""

    @wraps(forward)
    def run_aside(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch._C._len_torch_function_stack():
            return forward(self, *args, **kwargs)
        outer = None
        for mode in _get_current_function_mode_stack():
            if isinstance(mode, WatchedCalls):
                outer = mode
        if outer is None:
            return forward(self, *args, **kwargs)
        outer.paused += 1
        try:
            return forward(self, *args, **kwargs)
        finally:
            outer.paused -= 1

    return run_aside


class RunsAside(nn.Module):
    """A module whose own functions of torch are not those of the forward that calls it."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "forward" in cls.__dict__:
            cls.forward = aside(cls.forward)  # type: ignore[method-assign]
