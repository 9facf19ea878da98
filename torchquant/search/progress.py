"""What a search keeps after each epoch, to go on from."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from torchquant._files import read_saved, reading, write_json, write_whole
from torchquant._shown import shown
from torchquant.errors import ConfigError
from torchquant.search.cost import name_of
from torchquant.search.settings import EpochRecord
from torchquant.training.loop import random_state, set_random_state

if TYPE_CHECKING:
    from torchquant.search.engine import Search

PROGRESS = "search.progress.pt"
HISTORY = "history.json"


def keep_search(search: Search, folder: Path) -> None:
    """Write everything that `resume_search` needs, whole, and the history as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    saved = {
        **_identity(search),
        "model": search.model.state_dict(),
        "optimizers": {name: optimizer.state_dict() for name, optimizer in search.optimizers().items()},
        "prices": search.prices.values,
        "slopes": search.slopes,
        "epoch": search.epoch,
        "history": json.dumps([record.to_dict() for record in search.history]),
        "random": random_state(),
    }
    write_whole(folder / PROGRESS, partial(torch.save, saved))
    write_json(folder / HISTORY, [record.to_dict() for record in search.history])


def resume_search(search: Search, folder: Path) -> None:
    """Bring the search to where it was, if the folder has one. Raises ConfigError for one of other settings."""
    path = folder / PROGRESS
    if not path.exists():
        return
    with reading(path, f"delete it, and {HISTORY}, to search from the start"):
        saved: dict[str, Any] = read_saved(path)
        for name, ours in _identity(search).items():
            if saved[name] != ours:
                theirs, ours = shown(saved[name]), shown(ours)
                raise ConfigError(f"{folder} holds a search of other {name} ({theirs}; now {ours}); use another folder")
        search.model.load_state_dict(saved["model"])
        for name, optimizer in search.optimizers().items():
            optimizer.load_state_dict(saved["optimizers"][name])
        for mixture in search.every_mixture:
            mixture.refresh()
        search.prices.values, search.slopes, search.epoch = saved["prices"], saved["slopes"], int(saved["epoch"])
        search.history = [EpochRecord(**entry) for entry in json.loads(saved["history"])]
        set_random_state(saved["random"])


def _identity(search: Search) -> dict[str, str]:
    """What must be the same for a search to go on."""
    places = {name_of(place): mixtures[0].specs for place, mixtures in search.mixtures.items()}
    return {
        "settings": json.dumps(asdict(search.settings)),
        "candidates": json.dumps(places),
        "budgets": ", ".join(map(str, search.prices.budgets)),
        "forms": json.dumps([mixture.form for mixture in search.every_mixture]),
        "groups": json.dumps([[name_of(place) for place in group] for group in search.groups()]),
        "latency": str(sorted((search.costs.latency or {}).items())),
    }
