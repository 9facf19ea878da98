"""Save a search in its folder after each epoch, and resume it from there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from torchquant._files import read_saved, reading, write_json, write_whole
from torchquant._shown import shown
from torchquant.errors import ConfigError

PROGRESS = "search.progress.pt"
HISTORY = "history.json"


def keep_search(folder: Path, state: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> None:
    """Write the state for `resume_search`, whole, and the history as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / PROGRESS, partial(torch.save, dict(state)))
    write_json(folder / HISTORY, history)


def resume_search(folder: Path, identity: Mapping[str, str], load: Callable[[dict[str, Any]], object]) -> None:
    """Pass the saved state in the folder, if any, to `load`.

    `identity`: the settings that must be equal to resume a search. Raises ConfigError for other settings, and for a
    damaged file.
    """
    path = folder / PROGRESS
    if not path.exists():
        return
    with reading(path, f"delete it and {HISTORY} to search from the start"):
        saved: dict[str, Any] = read_saved(path)
        for name, ours in identity.items():
            if saved[name] != ours:
                theirs, ours = shown(saved[name]), shown(ours)
                raise ConfigError(
                    f"{folder} holds a search with other {name} ({theirs}; now {ours}); use another folder"
                )
        load(saved)
