"""Golden numbers, and slow versions in numpy or by trying everything. Nothing here calls torchquant.ptq."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

GOLDENS: dict[str, Any] = json.loads((Path(__file__).parent / "goldens.json").read_text(encoding="utf-8"))
TABLE: dict[str, Any] = GOLDENS["gptq_table"]
INT3: list[float] = TABLE["grids"]["int3_narrow"]["levels"]


def real(numbers: Any) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


X, W, GRAM = (real(TABLE[key]) for key in ("X", "W", "H"))


def close(found: Tensor | float, wanted: Any, tolerance: float = 1e-9) -> None:
    """The tolerance of the goldens: absolute and relative."""
    found = torch.as_tensor(found, dtype=torch.float64)
    torch.testing.assert_close(found, real(wanted), rtol=tolerance, atol=tolerance)


def on_levels(levels: Sequence[float], scale: Tensor | float = 1.0) -> Callable[..., Tensor]:
    """`nearest(x, columns)` of the levels times a scale, which broadcasts against x."""

    def nearest(x: Tensor, columns: Tensor | None = None) -> Tensor:
        table = torch.tensor(levels, dtype=x.dtype)
        index = (x[..., None] / torch.as_tensor(scale, dtype=x.dtype)[..., None] - table).abs().argmin(-1)
        return table[index] * torch.as_tensor(scale, dtype=x.dtype)

    return nearest


def row_scales(weight: Tensor, levels: Sequence[float]) -> Tensor:
    return weight.abs().amax(-1, keepdim=True) / max(map(abs, levels))


def error_of(difference: Tensor, gram: Tensor) -> float:
    return float(((difference @ gram) * difference).sum())


def exhaustive(weight: Tensor, gram: Tensor, levels: Sequence[float], scale: float) -> tuple[float, np.ndarray]:
    """The least error of any choice of levels for one row, and the levels."""
    choices = np.array(list(itertools.product(levels, repeat=len(weight))))
    difference = weight.numpy() - choices * scale
    errors = np.einsum("nj,jk,nk->n", difference, gram.numpy(), difference)
    return float(errors.min()), choices[errors.argmin()]


def random_gram(n: int, columns: int, generator: torch.Generator, groups: int | None = None) -> Tensor:
    shape = (n, columns) if groups is None else (groups, n, columns)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    return x.mT @ x / n
