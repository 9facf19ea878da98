"""AutoQNN's gradients for quantizers that are written by hand: functions of the real and the quantized tensor."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torchquant.errors import ConfigError
from torchquant.quantizers_functional._gradient import pass_through

DiffFunction = Callable[..., Tensor]


def STE(full_var: Tensor, fixed_tensor: Tensor, diff_ratio: float | None = None) -> Tensor:  # noqa: N802
    """Return `fixed_tensor`, exactly; `full_var` gets the incoming gradient. `diff_ratio` is not used.

    >>> STE(torch.tensor(0.3, requires_grad=True), torch.tensor(0.5))
    tensor(0.5000, grad_fn=<_PassThroughBackward>)
    """
    return pass_through(full_var, fixed_tensor.detach())


def PWL(full_var: Tensor, fixed_tensor: Tensor, diff_ratio: float) -> Tensor:  # noqa: N802
    """Return `fixed_tensor` moved by the share `diff_ratio` towards `full_var`, which gets the incoming gradient."""
    return STE(full_var, torch.lerp(fixed_tensor.detach(), full_var.detach(), diff_ratio))


def PWL_C(full_var: Tensor, fixed_tensor: Tensor, diff_ratio: float) -> Tensor:  # noqa: N802
    """Compute `PWL` of `full_var` clipped to the range of `fixed_tensor`; what is clipped has no gradient."""
    low, high = torch.aminmax(fixed_tensor.detach())
    return PWL(full_var.clamp(low, high), fixed_tensor, diff_ratio)


BACKWARDS: dict[str, DiffFunction] = {"default": STE, "ste": STE, "pwl": PWL, "pwl-c": PWL_C}
GRADIENT_NAMES = {"default": "ste", "ste": "ste", "pwl": "pwl", "pwl-c": "pwlc"}
"""AutoQNN's names of gradients -> torchquant's."""


def get_diff_func(backwards: str) -> DiffFunction:
    """Return the function of a `backward_type`. Raises ConfigError."""
    if backwards not in BACKWARDS:
        names = ", ".join(name for name in BACKWARDS if name != "default")
        raise ConfigError(f"backward_type must be one of {names}, got {backwards!r}")
    return BACKWARDS[backwards]
