"""The sums of an analysis in a folder, so that a killed one resumes after the last batch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchquant._files import read_saved, write_whole
from torchquant.errors import ConfigError
from torchquant.ptq.resuming import digest

FILE = "analysis.progress.pt"


class SavedSums:
    """The file with the sums over the finished batches of one model. Raises ConfigError for the folder of another."""

    def __init__(self, out: str | os.PathLike[str], model: nn.Module, judged: tuple[Any, ...]) -> None:
        self.path = Path(out) / FILE
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.key = digest(model.state_dict()) + "".join(f" {getattr(part, '__qualname__', part)}" for part in judged)
        self.batches: list[str] = []
        self.sums: dict[str, Any] = {}
        if self.path.exists():
            found = read_saved(self.path)
            if not isinstance(found, dict) or found.get("key") != self.key:
                raise ConfigError(
                    f"{self.path} is of an analysis of another model, metric or loss; choose another folder, or delete "
                    "that file"
                )
            self.batches, self.sums = found["batches"], found["sums"]

    def has(self, number: int, batch: Any) -> bool:
        """Tell whether the sums hold this batch. Raises ConfigError if they hold another one at its place."""
        if number >= len(self.batches):
            return False
        if self.batches[number] != digest(batch):
            raise ConfigError(f"batch {number} is not the one that {self.path} was made with; choose another folder")
        return True

    def check_end(self, n_batches: int) -> None:
        """Raise ConfigError if the sums hold more batches than these."""
        if n_batches < len(self.batches):
            raise ConfigError(
                f"{self.path} is of {len(self.batches)} batches, and there are {n_batches} now; choose another folder, "
                "or delete that file"
            )

    def save(self, batch: Any, sums: dict[str, Any]) -> None:
        """Keep the sums, which now hold this batch too."""
        self.batches.append(digest(batch))
        content = {"key": self.key, "batches": self.batches, "sums": sums}
        write_whole(self.path, lambda path: torch.save(content, path))
