"""What a law is asked of: a quantizer with its data; and what came of it."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torchquant.errors import ConfigError
from torchquant.quantizers._base import Quantizer
from torchquant.range_observers._statistics import StatisticTracker

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class LawReport:
    """Which laws hold, and which could not be asked of this quantizer and why."""

    passed: tuple[str, ...]
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"holds    {name}" for name in self.passed]
        return "\n".join(lines + [f"skipped  {name}: {why}" for name, why in self.skipped.items()])


class Skip(Exception):  # noqa: N818 - control flow, not an error
    pass


def require(holds: bool, detail: str) -> None:
    if not holds:
        raise AssertionError(detail)


def same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))


class Case:
    """A quantizer, unobserved and observed, with the data it saw."""

    def __init__(self, quantizer: Quantizer, sample: Tensor | None) -> None:
        self.fresh = copy.deepcopy(quantizer).cpu()
        self.fresh.unpin()
        for tracker in self.fresh.modules():
            if isinstance(tracker, StatisticTracker):
                tracker.reset()
        self.sample = self._default_sample(quantizer) if sample is None else sample.detach().clone()
        self.axis = None if quantizer.axis is None else quantizer.axis % self.sample.ndim
        self.observed = copy.deepcopy(self.fresh)
        self.observed.pre_observe(self.sample)

    @staticmethod
    def _default_sample(quantizer: Quantizer) -> Tensor:
        axis = quantizer.axis
        x = torch.randn(4, 6, 5, 5, generator=torch.Generator().manual_seed(0))
        x = x.abs() if quantizer.signed is False else x
        return x if axis is None else x.movedim(0, axis).contiguous()

    def wide(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The sample, the same eight times too large, and the same very small; in blocks, one element each."""
        if self.observed.levels_vary:
            factors = torch.tensor([1.0, 8.0, 1.0 / 64])[torch.arange(self.sample.numel()) % 3]
            return (self.sample * factors.view_as(self.sample)).to(dtype)
        return torch.cat([self.sample, 8 * self.sample, self.sample / 64], self._free_axis()).to(dtype)

    def _free_axis(self) -> int:
        return self.sample.ndim - 1 if self.axis != self.sample.ndim - 1 else 0

    @property
    def can_be_pinned(self) -> bool:
        """Whether a weight gives the quantizer all of its numbers."""
        try:
            self.pinned()
        except Skip:
            return False
        return True

    def pinned(self, weight: Tensor | None = None) -> Quantizer:
        """A copy that is pinned, by default to the sample."""
        quantizer = copy.deepcopy(self.observed)
        try:
            quantizer.pin(self.sample if weight is None else weight)
        except ConfigError as why:
            raise Skip(str(why)) from None
        return quantizer

    def slices(self, x: Tensor) -> list[Tensor]:
        """The parts of x that share parameters, flat."""
        return self.observed.parts(x)

    def n_bits(self) -> int:
        bits = getattr(self.observed, "n_bits", None)
        if not isinstance(bits, int):
            raise Skip("it has no n_bits")
        return bits
