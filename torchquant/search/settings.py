"""The settings of a search, and the record of each epoch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from torchquant._arguments import checked
from torchquant.errors import ConfigError
from torchquant.search.budget import MEASURES


@checked
@dataclass(frozen=True)
class SearchSettings:
    """The settings of both searches; `PrecisionSettings` are those of `PrecisionLearning`. docs/algorithms.md F3, F4.

    `epochs`: their first share `warmup` trains weights only. `weight_rate`: of AdamW, for the weights. `arch_rate`: of
    Adam, for logits and widths; None, for widths: enough to cross their range in half the search, at least 0.01.
    `alternate`: one step of the weights on one batch, then one of logits and widths on another; False: both together.
    `temperature`: (first, last) of the Gumbel softmax, linear between; `hard`: only one scheme in forward. The loss
    includes `cost_weight` times the expected `cost_measure`, relative to its value with the widest options. `penalty`:
    weight of `max(0, cost / limit - 1)**2` for each budget, reached after a tenth of the epochs; `price_rate`: how fast
    the price on exceeding a budget rises. `patience`: stop when the choice has not changed for so many epochs.
    `start_bits`: where widths start; None: at the widest. `target`: the search should end at its budgets, not below.
    Raises ConfigError.
    """

    epochs: int = 20
    weight_rate: float = 1e-3
    arch_rate: float | None = 1e-2
    alternate: bool = True
    warmup: float = 0.1
    temperature: tuple[float, float] = (5.0, 0.5)
    hard: bool = False
    cost_weight: float = 0.0
    cost_measure: str = "bytes"
    penalty: float = 1.0
    price_rate: float = 0.05
    patience: int | None = None
    start_bits: float | None = None
    target: bool = False

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ConfigError(f"epochs must be at least 1, got {self.epochs}")
        for name in ("weight_rate", "arch_rate", *(("temperature",) if min(self.temperature) <= 0 else ())):
            value = getattr(self, name)
            if isinstance(value, tuple) or (value is not None and not 0 < value < math.inf):
                raise ConfigError(f"{name} must be above 0, got {value}")
        if not 0.0 <= self.warmup < 1.0:
            raise ConfigError(f"warmup must be a share of the epochs, 0 <= warmup < 1, got {self.warmup}")
        for name in ("cost_weight", "penalty", "price_rate"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.cost_measure not in MEASURES:
            raise ConfigError(f"cost_measure must be one of {', '.join(MEASURES)}, got {self.cost_measure!r}")
        if self.patience is not None and self.patience < 1:
            raise ConfigError(f"patience must be at least 1, got {self.patience}")

    @property
    def warmup_epochs(self) -> int:
        """Number of epochs that train weights only."""
        return min(round(self.warmup * self.epochs), self.epochs - 1)

    def temperature_at(self, epoch: int) -> float:
        """Return the temperature in an epoch; epochs count from 1."""
        first, last = self.temperature
        return first + (last - first) * (epoch - 1) / max(self.epochs - 1, 1)

    def falling_at(self, epoch: int) -> float:
        """Return the factor of the widths' learning rate in an epoch: a cosine from 1 to 0."""
        return 0.5 * (1.0 + math.cos(math.pi * (epoch - 1) / self.epochs))

    def penalty_at(self, epoch: int) -> float:
        """Return the penalty in an epoch: it rises linearly from 0 in the first tenth of the epochs."""
        return self.penalty * min(epoch / max(0.1 * self.epochs, 1.0), 1.0)


@checked
@dataclass(frozen=True)
class PrecisionSettings(SearchSettings):
    """`SearchSettings` with the defaults of precision learning: all steps on the same batches, ending at the budget.

    >>> PrecisionSettings(epochs=5).target
    True
    """

    alternate: bool = False
    arch_rate: float | None = None
    target: bool = True


@dataclass(frozen=True)
class EpochRecord:
    """The record of one epoch of a search.

    `loss`: on the batches of the weights; `arch_loss`: on the batches of logits and widths, None in the warm-up.
    `entropy`: mean over the points, 0..1. `costs`: expected cost by measure. `choice`, `widths`, `shares`: for each
    "path.slot", the spec that would be chosen now, the real width, the shares of the schemes.
    """

    epoch: int
    loss: float
    arch_loss: float | None
    entropy: float
    temperature: float
    costs: dict[str, float]
    choice: dict[str, str]
    widths: dict[str, float]
    shares: dict[str, list[float]]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        bits = f"{self.costs['bits']:.2f} bits, " if self.costs["bits"] else ""
        arch = "" if self.arch_loss is None else f", search loss {self.arch_loss:.3f}"
        return f"epoch {self.epoch}: loss {self.loss:.3f}{arch}, {bits}entropy {self.entropy:.2f}"
