"""Time calls in turns and report ratios, with a control row that can fail the run.

Milliseconds of two processes cannot be compared on a shared machine; ratios of calls that took turns
in one process can. Every round calls every candidate once, in an order that rotates by one each round,
and each candidate is divided by the baseline of the same round. The baseline is measured a second time
under the name of `CONTROL`: its true ratio is 1, so its deviation is the error of the run.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

BASELINE = "baseline"
CONTROL = "control"
CONTROL_LIMITS = (0.95, 1.05)

Call = Callable[[], object]
Clock = Callable[[], float]


@dataclass(frozen=True)
class Ratio:
    """The time of a candidate over the time of the baseline.

    `median` of the ratios of each round, `minima` the ratio of the two fastest rounds, `low` and
    `high` the 10th and 90th percentile over the rounds, `ms` the candidate's own median.
    """

    median: float
    minima: float
    low: float
    high: float
    ms: float


@dataclass(frozen=True)
class Comparison:
    """Seconds per call: name -> one number per round, including BASELINE and CONTROL."""

    seconds: Mapping[str, list[float]]

    def per_round(self, name: str) -> list[float]:
        """Return the ratios to the baseline of the same round."""
        return [own / base for own, base in zip(self.seconds[name], self.seconds[BASELINE], strict=True)]

    def ratio(self, name: str) -> Ratio:
        rounds = sorted(self.per_round(name))
        return Ratio(
            median=statistics.median(rounds),
            minima=min(self.seconds[name]) / min(self.seconds[BASELINE]),
            low=percentile(rounds, 0.1),
            high=percentile(rounds, 0.9),
            ms=1e3 * statistics.median(self.seconds[name]),
        )

    @property
    def is_valid(self) -> bool:
        """Whether the control is within CONTROL_LIMITS. If not, no number of the run counts."""
        low, high = CONTROL_LIMITS
        return low <= self.ratio(CONTROL).median <= high

    @property
    def noise(self) -> float:
        """Relative difference that is insignificant: that of the control's `low` or `high` from 1, the larger one."""
        control = self.ratio(CONTROL)
        return max(abs(control.low - 1.0), abs(control.high - 1.0), abs(control.median - 1.0))

    def indistinct_pairs(self) -> list[tuple[str, str]]:
        """Pairs of candidates, the baseline included, that differ by less than the noise."""
        medians = {name: self.ratio(name).median for name in self.seconds if name != CONTROL}
        names = list(medians)
        return [
            (a, b)
            for i, a in enumerate(names)
            for b in names[i + 1 :]
            if abs(medians[a] - medians[b]) <= self.noise * max(medians[a], medians[b])
        ]


def percentile(ordered: list[float], share: float) -> float:
    """Return the value below which `share` of the sorted values lie, interpolated."""
    position = share * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def compare(
    baseline: Call,
    candidates: Mapping[str, Call],
    rounds: int,
    control: Call | None = None,
    sample_s: float = 0.0,
    clock: Clock = time.perf_counter,
) -> Comparison:
    """Time `baseline`, the control and every candidate in turns.

    `control`: the baseline again, on separate objects if it has state; by default the same call. A call
    shorter than `sample_s` seconds is repeated until a sample is that long. `clock`: gives seconds, of the wall or of
    the cores (`time.process_time`, for one thread on a busy machine). Raises ValueError.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    taken = {BASELINE, CONTROL} & set(candidates)
    if taken:
        raise ValueError(f"the names {sorted(taken)} are reserved for the baseline; give the candidate another name")
    calls = {BASELINE: baseline, **candidates, CONTROL: control or baseline}
    repeats = {name: _repeats(call, sample_s, clock) for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for turn in range(rounds):
        start = turn % len(order)
        gc.collect()
        for name in order[start:] + order[:start]:
            seconds[name].append(_sample(calls[name], repeats[name], clock))
    return Comparison(seconds)


def _repeats(call: Call, sample_s: float, clock: Clock) -> int:
    """Warm the call up, twice, and count how often it fits into a sample."""
    call()
    return max(1, math.ceil(sample_s / max(_sample(call, 1, clock), 1e-9)))


def _sample(call: Call, repeats: int, clock: Clock) -> float:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        start = clock()
        for _ in range(repeats):
            call()
        return (clock() - start) / repeats
    finally:
        if was_enabled:
            gc.enable()


def memory_pass(numel: int) -> Call:
    """Make the unit of cost: one pass over memory, 4 bytes read and 4 written per element, into a fixed output."""
    x = torch.randn(numel)
    y = torch.empty_like(x)

    def one_pass() -> None:
        torch.add(x, 1, out=y)

    return one_pass
