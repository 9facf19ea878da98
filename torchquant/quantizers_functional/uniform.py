"""The one projection behind every uniform format: affine and Q-format differ in their numbers only."""

from __future__ import annotations

import torch
from torch import Tensor

from torchquant.quantizers_functional._gradient import Projection

Bound = Tensor | int


def like(value: Tensor | float, x: Tensor) -> Tensor:
    """`value` as a tensor of x's type on x's device."""
    return torch.as_tensor(value, dtype=x.dtype, device=x.device)


def _clamp(codes: Tensor, code_min: Bound, code_max: Bound) -> Tensor:
    """A new tensor. Two binary passes for tensor bounds: `torch.clamp` with tensors costs five times that."""
    if isinstance(code_min, int) and isinstance(code_max, int):
        return codes.clamp(code_min, code_max)
    return torch.minimum(torch.maximum(codes, like(code_min, codes)), like(code_max, codes))


def uniform_codes(x: Tensor, delta: Tensor | float, code_min: Bound, code_max: Bound) -> Tensor:
    """`clamp(round_half_even(x / delta), code_min, code_max)` in x's type: codes counted from real 0.

    x: (*). delta: () or broadcastable, > 0. code_min, code_max: whole numbers, () or broadcastable.
    """
    return _clamp(torch.div(x, like(delta, x)).round_(), code_min, code_max)


def uniform_projection(delta: Tensor | float, code_min: Bound, code_max: Bound) -> Projection:
    """Projection on `delta * {code_min .. code_max}`.

    `inside` follows ALGORITHMS A1: 1 where the rounded code was not clamped.
    """

    def project(x: Tensor, want_inside: bool) -> tuple[Tensor, Tensor | None]:
        rounded = torch.div(x, like(delta, x)).round_()
        value = _clamp(rounded, code_min, code_max)
        inside = rounded.eq_(value) if want_inside else None
        return value.mul_(like(delta, x)), inside

    return project
