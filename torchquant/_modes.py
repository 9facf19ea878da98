"""Keep and restore what modules have beside their numbers: hooks, and a training or evaluation mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.module import _has_any_global_hook


@contextmanager
def in_mode(training: bool, *models: nn.Module) -> Iterator[None]:
    """Put every module in training or evaluation mode; on exit restore the former modes."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = training
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def has_hooks(module: nn.Module, or_all: bool = False) -> bool:
    """Tell whether the module has forward or backward hooks; `or_all`: or whether all modules have."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    ) or (or_all and _has_any_global_hook())
