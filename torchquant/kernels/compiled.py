"""Kernels as operators of torch, `torchquant::uniform` and `torchquant::masked`, for code that torch.compile compiles.

Compiled code calls them where a mask is kept for backward, which the compiler's own code packs slowly
(docs/decisions/0052). Exported programs never hold them, so that they run where this package is not installed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchquant.kernels._bounds import Bound, Clamp

ALL_ONES = 255


@torch.library.custom_op("torchquant::uniform", mutates_args=(), device_types="cpu")
def _uniform(
    x: Tensor,
    step: Tensor,
    low: Tensor,
    high: Tensor,
    zero_point: Tensor,
    least: float | None,
    most: float | None,
    is_strict: bool,
    wants_inside: bool,
) -> tuple[Tensor, Tensor]:
    from torchquant.kernels import load

    clamp = None if least is None and most is None else (least, most)
    found = load("cpu")["uniform", x.dtype](x, step, low, high, zero_point, clamp, is_strict, wants_inside)
    if found is None:
        raise RuntimeError("torchquant::uniform takes numbers that vary along one axis of x at most")
    value, bits = found
    return value, torch.full((_n_bytes(x),), ALL_ONES, dtype=torch.uint8) if bits is None else bits


@_uniform.register_fake
def _uniform_fake(x: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((_n_bytes(x),), dtype=torch.uint8)


@torch.library.custom_op("torchquant::masked", mutates_args=(), device_types="cpu")
def masked(grad: Tensor, bits: Tensor) -> Tensor:
    """Return grad times 1 or 0, from `bits` that were packed in the memory order of grad."""
    from torchquant.kernels import load

    found: Tensor = load("cpu")["masked", grad.dtype](grad, bits)
    return found


@masked.register_fake
def _masked_fake(grad: Tensor, bits: Tensor) -> Tensor:
    return torch.empty_like(grad)


def uniform(
    x: Tensor,
    step: Tensor,
    low: Bound,
    high: Bound,
    zero_point: Bound,
    clamp: Clamp | None,
    is_strict: bool,
    wants_inside: bool,
) -> tuple[Tensor, Tensor]:
    """Return what `cpu.uniform` does, with a mask that is never left out."""
    bounds = [n if isinstance(n, Tensor) else torch.full((), float(n), dtype=x.dtype) for n in (low, high, zero_point)]
    least, most = clamp or (None, None)
    found: tuple[Tensor, Tensor] = _uniform(x, step, *bounds, least, most, is_strict, wants_inside)
    return found


def _n_bytes(x: Tensor) -> int:
    return (x.numel() + 7) // 8


OPERATORS: dict[str, Callable[..., Any]] = {"uniform": uniform, "masked": masked}
