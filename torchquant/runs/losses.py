"""Keep the loss of each epoch of a run in a file, so that the report of a resumed run has all of them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path

from torchquant._files import read_json, reading, write_json
from torchquant.runs.folder import read_as

FILE = "losses.json"
REMEDY = "delete it for a report without the losses so far"
Losses = dict[str, list[tuple[float, float | None]]]
"""Name of a training -> (epoch, loss) of each of its epochs; None for a loss that is no finite number."""


@dataclass(frozen=True)
class EpochLoss:
    """The loss of one epoch of a training; None if it is no finite number."""

    training: str
    epoch: int
    loss: float | None


def keep_loss(folder: Path, training: str, epoch: int, loss: float) -> None:
    """Write the loss of an epoch into the file of the folder, in place of what this epoch and later ones had."""
    kept = [entry for entry in _read(folder) if entry.training != training or entry.epoch < epoch]
    kept.append(EpochLoss(training, epoch, loss if math.isfinite(loss) else None))
    write_json(folder / FILE, [asdict(entry) for entry in kept])


def read_losses(folder: Path) -> Losses:
    """Read what `keep_loss` wrote; {} if there is no file. Raises ConfigError that names the file."""
    found = Losses()
    for entry in _read(folder):
        found.setdefault(entry.training, []).append((entry.epoch, entry.loss))
    return found


def _read(folder: Path) -> list[EpochLoss]:
    path = folder / FILE
    if not path.exists():
        return []
    with reading(path, REMEDY):
        return [read_as(path, EpochLoss, entry, REMEDY) for entry in read_json(path)]
