"""Budgets: upper bounds on the cost of a plan, written as text: `bytes<=40kB,bits<=4`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torchquant._arguments import checked
from torchquant._registry import did_you_mean
from torchquant._units import NUMBER, UNITS
from torchquant.errors import ConfigError

MEASURES = {
    "bytes": "all weights, packed, with the scales and tables that decoding needs",
    "bits": "mean bits of the searched weights",
    "act_bytes": "all outputs of sites for one sample, as if all were stored",
    "act_bits": "mean bits of the searched outputs",
    "bitops": "multiply-adds of one sample times the bits of both operands",
    "latency": "seconds, from a table that you give",
}
_WORDS = re.compile(rf"\s*([a-z_]+)\s*<=\s*{NUMBER}\s*")


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
