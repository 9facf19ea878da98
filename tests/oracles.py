"""Slow, obvious float64 versions in numpy, and the golden numbers. Nothing here calls torchquant."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri

from tests import DATA

Array = npt.NDArray[np.float64]
GOLDEN: dict[str, Any] = json.loads((DATA.parent / "golden.json").read_text())
TRAINING_GOLDEN: dict[str, Any] = json.loads((DATA.parent / "training" / "goldens.json").read_text())


def affine(x: Array, delta: float, zero_point: int, n_levels: int) -> Array:
    """Element by element, Python integers, `round` of Python (half to even)."""
    codes = [min(max(round(float(v) / delta) + zero_point, 0), n_levels - 1) for v in x]
    return np.array([(c - zero_point) * delta for c in codes])


def nearest(x: Array, levels: Array) -> Array:
    """Nearest level by exhaustive distance."""
    return np.asarray(levels[np.abs(x[:, None] - levels[None, :]).argmin(1)])


def esb_levels(n_bits: int, k: int) -> Array:
    """All values of the grid, from its definition as sign, exponent field, fraction field."""
    positive = []
    for exponent in range(2 ** (n_bits - 1 - k)):
        for fraction in range(2**k):
            scale = 2.0 ** (exponent - 1)
            positive.append(fraction / 2**k if exponent == 0 else (1 + fraction / 2**k) * scale)
    return np.array(sorted({-v for v in positive} | set(positive)))


def twn(x: Array) -> tuple[float, float]:
    """Threshold and scale of ternary weight networks."""
    threshold = 0.7 * np.abs(x).mean()
    return float(threshold), float(np.abs(x)[np.abs(x) > threshold].mean())


def best_ternary(x: Array) -> float:
    """Least squared error of any {-a, 0, a}, by trying every number of non-zeros."""
    magnitude = np.sort(np.abs(x))[::-1]
    errors = []
    for kept in range(1, len(x) + 1):
        alpha = magnitude[:kept].mean()
        errors.append(((magnitude[:kept] - alpha) ** 2).sum() + (magnitude[kept:] ** 2).sum())
    return float(min(errors))


def gaussian_quantile_grid(n: int = 2**20) -> Array:
    """The deterministic N(0, 1) sample `ndtri((i + 1/2) / n)`."""
    return np.asarray(ndtri((np.arange(n) + 0.5) / n))
