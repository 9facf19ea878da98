"""Networks of the tests that are as if trained."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


def with_statistics(make: Callable[[], nn.Module]) -> nn.Module:
    """A network for pictures of two channels, always the same, whose batch norms have seen some; it evaluates."""
    torch.manual_seed(0)
    made = make()
    for _ in range(3):
        made(torch.randn(16, 2, 6, 6))
    return made.eval()
