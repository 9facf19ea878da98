"""Estimate the time that a run still takes, from the units of work that it did and those that are left."""

from __future__ import annotations

import time


class Clock:
    """Counts units of work. Units that were found done already cost no time, so the estimate leaves them out."""

    def __init__(self, total: float) -> None:
        self.total, self.done, self._worked, self._under_way = total, 0.0, 0.0, 0.0
        self._started = self._last = time.monotonic()

    def advance(self, amount: float) -> None:
        """Count finished units."""
        self.done += amount
        self._worked += amount
        if amount:
            self._last, self._under_way = time.monotonic(), 0.0

    def within(self, amount: float) -> None:
        """Note how many of the units after the finished ones are done by now."""
        self._last, self._under_way = time.monotonic(), amount

    @property
    def position(self) -> float:
        """The units that are done, in part too."""
        return self.done + self._under_way

    def skip(self, amount: float) -> None:
        """Count units that were done by an earlier run."""
        self.done += amount

    def elapsed(self) -> float:
        """Return the seconds since the start."""
        return time.monotonic() - self._started

    def left(self) -> float | None:
        """Estimate the seconds until the end; None as long as nothing was worked."""
        worked = self._worked + self._under_way
        if not worked:
            return None
        rate = (self._last - self._started) / worked
        return max(rate * (self.total - self.position) - (time.monotonic() - self._last), 0.0)

    def words(self) -> str:
        """Say how long it took so far, and how long the rest takes."""
        left = self.left()
        return f"{duration(self.elapsed())} so far" + ("" if left is None else f", about {duration(left)} left")


def duration(seconds: float) -> str:
    """Format a duration.

    >>> duration(7.4), duration(75), duration(3700)
    ('7 s', '1:15 min', '1:01 h')
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02} h"
