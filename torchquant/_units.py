"""Numbers with units, also as text: 40kB, 2 GiB, 5ms, dB."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from torchquant._shown import shown
from torchquant.errors import ConfigError

NUMBER = r"((?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?)\s*([A-Za-z]*)"
"""A number of 0 or more, and a unit."""
SIZES: Mapping[str, float] = {
    "": 1.0,
    "B": 1.0,
    "k": 1e3,
    "kB": 1e3,
    "M": 1e6,
    "MB": 1e6,
    "G": 1e9,
    "GB": 1e9,
    "T": 1e12,
    "KiB": 2.0**10,
    "MiB": 2.0**20,
    "GiB": 2.0**30,
}
UNITS: Mapping[str, float] = {**SIZES, "s": 1.0, "ms": 1e-3, "us": 1e-6}


def decibels(signal: float, noise: float) -> float:
    """Return the ratio of two sums of squares in dB; inf without noise, -inf for noise without a signal.

    >>> decibels(100.0, 1.0), decibels(100.0, math.inf)
    (20.0, -inf)
    """
    if noise == 0.0:
        return math.inf
    ratio = signal / noise
    return 10.0 * math.log10(ratio) if ratio > 0.0 else -math.inf if ratio == 0.0 else math.nan


def bytes_of(value: object, what: str) -> int:
    """Return a number of bytes that is given as a whole number or as text. Raises ConfigError that begins with `what`.

    >>> bytes_of("1.5kB", "the cache"), bytes_of(12, "the cache")
    (1500, 12)
    """
    found = re.fullmatch(rf"\s*{NUMBER}\s*", str(value)) if not isinstance(value, bool) else None
    if found is None or found[2] not in SIZES:
        units = ", ".join(unit for unit in SIZES if unit)
        raise ConfigError(
            f"{what} must be a number of bytes such as 2000000000 or '2GB', got {shown(value)}; units: {units}"
        )
    return int(float(found[1]) * SIZES[found[2]])
