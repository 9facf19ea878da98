"""Measure how the output of a quantized model differs from the float model's: noise, classes, metric and loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from torchquant._arguments import one_number
from torchquant._units import decibels
from torchquant.errors import ConfigError
from torchquant.graph.called import first_real
from torchquant.quantizers_functional._gradient import compute_dtype
from torchquant.range_observers._calls import widest
from torchquant.training.evaluation import Metric, summed, top1

Loss = Callable[[Any, Any], Tensor]
"""(outputs, targets) of a batch -> the mean loss over its samples."""


@dataclass(frozen=True)
class Effect:
    """The output of a model with some sites quantized, compared with the float model's on the same batches.

    `sqnr_db`: signal to noise ratio of the output, dB; inf if it is equal. For class scores also `kl`: the divergence
    of the class probabilities, nats, mean over the predictions; `agreement`: the share of predictions with the float
    model's class, 0..1. With targets `metric`, by default the accuracy, 0..1, and with a loss `loss`. None: not
    measured.
    """

    sqnr_db: float
    kl: float | None = None
    agreement: float | None = None
    metric: float | None = None
    loss: float | None = None

    def to_dict(self) -> dict[str, float | str | None]:
        """Return the figures for JSON, with the SQNR as `plain_decibel` gives it."""
        return asdict(self) | {"sqnr_db": plain_decibel(self.sqnr_db)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Effect:
        """Make an effect from the result of `to_dict`."""
        return cls(**data | {"sqnr_db": decibel_of(data["sqnr_db"])})

    def words(self) -> list[str]:
        """Return the cells of a table, in the order of the fields."""
        values = [getattr(self, field.name) for field in fields(self)]
        shown = [decibel(self.sqnr_db), *("-" if value is None else f"{value:.4g}" for value in values[1:])]
        if self.agreement is not None:
            shown[2] = f"{self.agreement:.1%}"
        return shown


def decibel(value: float) -> str:
    """Write an SQNR.

    >>> decibel(12.34), decibel(math.inf)
    ('12.3 dB', 'exact')
    """
    return "exact" if value == math.inf else f"{value:.1f} dB"


def plain_decibel(value: float) -> float | str | None:
    """Return an SQNR for JSON, which has no infinity: None without any error, a word for what is no number else.

    >>> plain_decibel(12.5), plain_decibel(math.inf), plain_decibel(-math.inf)
    (12.5, None, '-inf')
    """
    return value if math.isfinite(value) else None if value == math.inf else str(value)


def decibel_of(plain: float | str | None) -> float:
    """Return the SQNR that `plain_decibel` made this of."""
    return math.inf if plain is None else float(plain)


@dataclass
class Judge:
    """How outputs are compared: the figures besides the SQNR. `metric` None: the accuracy where targets are classes."""

    metric: Metric | None = None
    loss: Loss | None = None

    def classes(self, output: Tensor, targets: Any) -> int | None:
        """Return the axis of the classes of an output; None if it is not class scores, as far as can be told."""
        if isinstance(targets, Tensor) and not targets.is_floating_point():
            if output.ndim > 1 and targets.shape == output.shape[:1] + output.shape[2:] and output.shape[1] > 1:
                return 1
            return -1 if targets.shape == output.shape[:-1] and output.shape[-1] > 1 else None
        return 1 if targets is None and output.ndim == 2 and output.shape[1] > 1 else None


class EffectSum:
    """The sums behind an `Effect`, over batches."""

    def __init__(self, sums: dict[str, float] | None = None) -> None:
        self.sums = sums or {}

    def _add(self, **values: float) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    @torch.no_grad()
    def add(self, judge: Judge, reference: Any, output: Any, batch: Any, targets: Any) -> None:
        """Add the outputs of the float model and of the model for one batch."""
        wanted, got = (first_real(value) for value in (reference, output))
        if wanted.shape != got.shape or not wanted.numel():
            raise ConfigError(
                f"outputs are compared number by number, but the float model returns {tuple(wanted.shape)} and the "
                f"quantized one {tuple(got.shape)}; analyze a module that returns the numbers behind them, such as the "
                "scores of all boxes before the best are selected, and leave empty batches out"
            )
        self._add(signal=_finite_energy(wanted), noise=_error_energy(wanted, got))
        if (axis := judge.classes(wanted, targets)) is not None:
            p, q = (value.to(widest(value.device)).log_softmax(axis) for value in (wanted, got))
            agree = wanted.argmax(axis) == got.argmax(axis)
            kl = (p.exp() * (p - q)).nan_to_num(0.0).sum(axis)
            self._add(kl=float(kl.sum()), agree=float(agree.sum()), predictions=float(kl.numel()))
        if targets is None:
            return
        metric = judge.metric or (top1 if judge.classes(got, targets) == 1 else None)
        if metric is not None:
            value, n = summed(metric(output if judge.metric else got, targets), batch)
            self._add(metric=value, samples=n)
        if judge.loss is not None:
            n = summed(0.0, batch)[1]
            self._add(loss=n * float(one_number(judge.loss(output, targets), "the loss")), loss_samples=n)

    def effect(self) -> Effect:
        """Return the figures over all batches so far."""

        def mean(name: str, count: str) -> float | None:
            return self.sums[name] / self.sums[count] if self.sums.get(count) else None

        sqnr_db = decibels(self.sums.get("signal", 0.0), self.sums.get("noise", 0.0))
        kl, agreement = mean("kl", "predictions"), mean("agree", "predictions")
        kl = None if kl is None else max(kl, 0.0)  # of equal probabilities it can be just below 0
        return Effect(sqnr_db, kl, agreement, mean("metric", "samples"), mean("loss", "loss_samples"))


def energy(x: Tensor) -> float:
    """Return the sum of squares, of half precision too, added up in float64 where the device has it."""
    return float(x.to(compute_dtype(x)).square().sum(dtype=widest(x.device)))


def _finite_energy(x: Tensor) -> float:
    """Return the sum of squares of the finite numbers."""
    found = energy(x)
    return found if math.isfinite(found) else energy(x.nan_to_num(0.0, 0.0, 0.0))


def _error_energy(wanted: Tensor, got: Tensor) -> float:
    """Return the sum of squared differences: 0 where both are the same infinity, inf where one alone is no number."""
    found = energy(got - wanted)
    if math.isfinite(found):
        return found
    is_equal = (got == wanted) | (got.isnan() & wanted.isnan())
    found = energy((got - wanted).masked_fill(is_equal, 0.0))
    return math.inf if math.isnan(found) else found
