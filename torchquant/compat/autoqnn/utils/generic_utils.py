"""AutoQNN's small helpers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def EMA(shadow_var: Tensor, new_var: Tensor, momentum: float | Tensor = 0.99) -> Tensor:  # noqa: N802
    """Compute one step of an exponential average, `momentum * shadow_var + (1 - momentum) * new_var`."""
    return momentum * shadow_var + (1 - momentum) * new_var


def zero_grad(var: Tensor) -> None:
    """Set the gradient of a tensor to 0, if it has one."""
    if var.grad is not None:
        var.grad.detach_().zero_()


def to_list(var: Any) -> list[Any]:
    """Return a list as it is, anything else as the only element of one."""
    return var if isinstance(var, list) else [var]
