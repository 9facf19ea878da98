"""Memory that a call allocates and frees, over time, from the records of torch's allocator.

Every tensor counts, those of kernels in C++ and of backward included, and what is freed inside an operator. Memory that
does not come from the allocator of torch does not: that of Python, and buffers that a library takes from the system.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from torch._C._profiler import _EventType
from torch.autograd.profiler import profile


@dataclass(frozen=True)
class Allocations:
    """The bytes that are allocated after each change, beyond those before the call, and when: nanoseconds, sorted."""

    times: list[int]
    nbytes: list[int]

    @property
    def peak(self) -> int:
        """The most bytes that are allocated at one time."""
        return max(self.nbytes, default=0)

    def sampled(self, points: int) -> list[int]:
        """Return the largest number in each of `points` equal parts of the time; the peak is one of them."""
        if not self.times:
            return [0] * points
        begin, length = self.times[0], self.times[-1] - self.times[0] + 1
        parts: list[list[int]] = [[] for _ in range(points)]
        for time, held in zip(self.times, self.nbytes, strict=True):
            parts[(time - begin) * points // length].append(held)
        shown, last = [], 0
        for part in parts:
            shown.append(max([last, *part]))
            last = part[-1] if part else last
        return shown


def allocations(call: Callable[[], object]) -> Allocations:
    """Record what `call()` allocates. What was there before counts neither when it is held nor when it is freed."""
    with profile(use_cpu=True, profile_memory=True) as recorded:
        call()
    results: Any = recorded.kineto_results
    changes = sorted(_changes(results.experimental_event_tree()), key=lambda change: change[0])
    held: dict[int, int] = {}
    times, differences = [], []
    for time, pointer, size in changes:
        if size < 0:
            size = -held.pop(pointer, 0)  # 0 for memory from before: torch may remember it from an earlier record
        else:
            held[pointer] = size
        times.append(time)
        differences.append(size)
    return Allocations(times, list(accumulate(differences)))


def _changes(events: Iterable[Any]) -> Iterator[tuple[int, int, int]]:
    """Yield (nanoseconds, address, bytes) of each allocation; of what is freed, the bytes are negative."""
    for event in events:
        if event.tag == _EventType.Allocation:
            yield event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size
        yield from _changes(event.children)
