"""The looks of a monitor: what each has seen, and the curves that they make."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torchquant._arguments import checked
from torchquant.training.sinks import STEP, read_rows


@dataclass(frozen=True)
class Look:
    """The figures that a monitor has seen after `step` optimizer steps.

    `numbers`: a figure under "PATH/SLOT/NAME"; None where the scheme has no such figure, or nothing was seen.
    """

    step: int
    numbers: Mapping[str, float | None] = field(repr=False)


class History:
    """Looks in little memory: eight bytes for each number."""

    def __init__(self) -> None:
        self._kept: list[tuple[int, tuple[str, ...], array[float], bytes]] = []

    def add(self, step: int, numbers: Mapping[str, float | None]) -> None:
        """Keep the numbers of a look."""
        names = tuple(numbers)
        if self._kept and self._kept[-1][1] == names:
            names = self._kept[-1][1]  # one tuple for all of them
        values = array("d", (0.0 if number is None else number for number in numbers.values()))
        self._kept.append((step, names, values, bytes(number is not None for number in numbers.values())))

    def looks(self) -> list[Look]:
        """Return all looks."""
        return [
            Look(step, {name: x if known else None for name, x, known in zip(names, values, flags, strict=True)})
            for step, names, values, flags in self._kept
        ]


@checked
def read_looks(path: str | Path) -> list[Look]:
    """Read the looks in a CSV file that a monitor wrote. Raises ConfigError for another file.

    >>> import tempfile
    >>> from torchquant.training import CSVSink
    >>> path = Path(tempfile.mkdtemp()) / "monitor.csv"
    >>> CSVSink(path).write(50, {"loss": 0.5})
    >>> series(read_looks(path))
    {'loss': [(50, 0.5)]}
    """
    columns, rows = read_rows(path)
    return [
        Look(int(row[STEP]), {name: float(row[name]) if row[name] else None for name in columns if name != STEP})
        for row in rows
    ]


@checked
def series(looks: Iterable[Look]) -> dict[str, list[tuple[int, float]]]:
    """Return the curve of each figure: its (step, number) pairs, without steps at which it does not exist."""
    found: dict[str, list[tuple[int, float]]] = {}
    for look in looks:
        for name, number in look.numbers.items():
            if number is not None:
                found.setdefault(name, []).append((look.step, number))
    return found
