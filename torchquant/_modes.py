"""Keep and restore the training or evaluation mode of every module of a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


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
