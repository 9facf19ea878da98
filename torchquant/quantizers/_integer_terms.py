"""The integers behind a grid: its levels as sums of whole numbers times scales."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import lcm
from typing import Any

import torch
from torch import Tensor

LARGEST_DENOMINATOR = 2**20
SMALLEST_ERROR = 2.0**-48

IntegerTerms = list[tuple[Tensor, Tensor]]
"""(scale, table) of each term: scale () or (C,) float64; table (L,) or (C, L) int64, one entry a code."""


def linear_terms(
    values: Callable[..., Tensor], grid: Sequence[Tensor | int], code_range: tuple[int, int]
) -> IntegerTerms | None:
    """The terms of a grid whose values are linear in its numbers, or are rational as they are; None for another one.

    `values(codes, dtype, *grid)` as a GridQuantizer has it. With one number 1 and the others 0 it gives the table of
    that number, up to a common denominator that goes into the scale.
    """
    codes = torch.arange(code_range[0], code_range[1] + 1)
    numbers = [n.detach().to(torch.float64).cpu()[..., None] if isinstance(n, Tensor) else n for n in grid]
    tensors = [i for i, n in enumerate(numbers) if isinstance(n, Tensor)]
    zeroed = [torch.zeros(1, dtype=torch.float64) if i in tensors else n for i, n in enumerate(numbers)]
    parts: list[tuple[Tensor, Tensor]] = [
        (torch.ones((), dtype=torch.float64), values(codes, torch.float64, *zeroed).expand(len(codes)))
    ]
    for i in tensors:
        unit: list[Any] = list(zeroed)
        unit[i] = torch.ones(1, dtype=torch.float64)
        number: Any = numbers[i]
        parts.append((number[..., 0], values(codes, torch.float64, *unit).expand(len(codes)) - parts[0][1]))
    expected = values(codes, torch.float64, *numbers)
    found = sum((scale[..., None] * table for scale, table in parts), torch.zeros_like(expected))
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-12, atol=0.0):
        parts = [(torch.ones((), dtype=torch.float64), expected)]
    terms: IntegerTerms = []
    for scale, table in parts:
        if not bool(table.any()) or not bool(scale.any()):
            continue
        denominator = common_denominator(table)
        if denominator is None:
            return None
        terms.append((scale / denominator, torch.round(table * denominator).to(torch.int64)))
    return terms or [(torch.ones((), dtype=torch.float64), torch.zeros(len(codes), dtype=torch.int64))]


def common_denominator(table: Tensor) -> int | None:
    """The least D for which `table * D` is whole, to within rounding; None if it is above `LARGEST_DENOMINATOR`.

    >>> common_denominator(torch.tensor([0.5, 0.75, 2.0], dtype=torch.float64))
    4
    """
    from fractions import Fraction  # needed seldom, and it would slow the import of torchquant down

    result = 1
    for value in table.unique().tolist():
        fraction = Fraction(value).limit_denominator(LARGEST_DENOMINATOR)
        if abs(float(fraction) - value) > SMALLEST_ERROR * abs(value):
            return None
        result = lcm(result, fraction.denominator)
    return result if result <= LARGEST_DENOMINATOR else None
