"""Tensors that are hard for kernels, and what it means that two are the same."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SIZES = (1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 100, 1023, 1024, 1025, 5000)
"""Around the widths of vectors and of the blocks in which masks are packed."""


def hard_numbers(step: float, dtype: torch.dtype) -> Tensor:
    """Ties, ends, zeros of both signs, subnormal and huge numbers, infinity and NaN, in a mixed order."""
    codes = torch.arange(-20, 21, dtype=torch.float64)
    near = [(codes + part) * step for part in (0.0, 0.5, 0.25)]
    near += [n * (1 + sign * 2.0**-22) for n in near for sign in (-1, 1)]
    special = torch.tensor([0.0, -0.0, 1e-310, -1e-310, 1e-40, 1e38, -1e38, math.inf, -math.inf, math.nan, 6.0])
    x = torch.cat([*near, special.double()])
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))].to(dtype)


def hard(shape: tuple[int, ...], step: float = 0.1, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a tensor of that shape whose elements repeat the hard numbers."""
    numbers, n = hard_numbers(step, dtype), math.prod(shape)
    return numbers.repeat(-(-n // len(numbers)))[:n].view(shape)


def shifted(x: Tensor, n: int = 1) -> Tensor:
    """Return x in memory that begins n elements behind an aligned address."""
    return x.new_empty(x.numel() + n)[n:].view(x.shape).copy_(x)


def is_same(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors have the same type, layout, and numbers, NaN included."""
    kind = (found.dtype, found.shape, found.stride()) == (expected.dtype, expected.shape, expected.stride())
    return kind and bool(((found == expected) | (found.isnan() & expected.isnan())).all())
