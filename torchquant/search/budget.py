"""Budgets: upper bounds on the cost of a plan, written as text: `bytes<=40kB,bits<=4`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torchquant._arguments import checked
from torchquant._registry import did_you_mean
from torchquant.errors import ConfigError

MEASURES = {
    "bytes": "all weights, packed, with the scales and tables that decoding needs",
    "bits": "mean bits of the searched weights",
    "act_bytes": "all outputs of sites for one sample, as if all were stored",
    "act_bits": "mean bits of the searched outputs",
    "bitops": "multiply-adds of one sample times the bits of both operands",
    "latency": "seconds, from a table that you give",
}
UNITS = {
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
    "s": 1.0,
    "ms": 1e-3,
    "us": 1e-6,
}
_WORDS = re.compile(r"\s*([a-z_]+)\s*<=\s*((?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?)\s*([A-Za-z]*)\s*")


@checked
@dataclass(frozen=True)
class Budget:
    """An upper bound `limit` on one measure of `MEASURES`.

    >>> Budget.parse("bytes<=40kB, bits <= 4")
    [Budget(measure='bytes', limit=40000.0), Budget(measure='bits', limit=4.0)]
    """

    measure: str
    limit: float

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            hint = did_you_mean(self.measure, MEASURES)
            raise ConfigError(f"a budget's measure must be one of {', '.join(MEASURES)}; got '{self.measure}'.{hint}")
        if not 0 < self.limit < float("inf"):
            raise ConfigError(f"the limit of {self.measure} must be above 0, got {self.limit}")

    @classmethod
    def parse(cls, text: str | Budget | Iterable[str | Budget]) -> list[Budget]:
        """Parse budgets from a text with commas, or from several. Raises ConfigError."""
        if isinstance(text, Budget):
            return [text]
        if not isinstance(text, str):
            return [budget for part in text for budget in cls.parse(part)]
        return [cls._of(part) for part in text.split(",") if part.strip()]

    @classmethod
    def _of(cls, text: str) -> Budget:
        found = _WORDS.fullmatch(text)
        if found is None or found[3] not in UNITS:
            raise ConfigError(
                f"a budget is MEASURE<=NUMBER[UNIT], such as 'bytes<=40kB'; measures: {', '.join(MEASURES)}; units: "
                f"{', '.join(unit for unit in UNITS if unit)}; got {text.strip()!r}"
            )
        return cls(found[1], float(found[2]) * UNITS[found[3]])

    def __str__(self) -> str:
        return f"{self.measure}<={self.limit:g}"
