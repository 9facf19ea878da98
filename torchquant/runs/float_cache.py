"""Share float models between runs: a float training is looked up by everything that determines its result."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchquant._files import digest_of, read_saved, write_whole
from torchquant._user_code import OURS
from torchquant.errors import ConfigError
from torchquant.runs.data import CACHE, TrainingData

PLACE = "TORCHQUANT_FLOATS"
"""Environment variable: the folder of float models; 0: none are kept."""
MOST_BYTES = 2_000_000_000
"""Largest size of the folder; the models that were used least recently go first."""
WRITTEN_IN = ("runs", "training")
"""Parts of torchquant whose source determines a float training."""
MOST_IMAGES = 1000
"""Number of test images that stand for the data; they are drawn, distorted and normalized as all are."""


def cache_folder() -> Path | None:
    """Return the folder of float models; None if there is none."""
    place = os.environ.get(PLACE, str(CACHE / "floats"))
    return None if place == "0" else Path(place).expanduser()


def float_key(net: nn.Module, data: TrainingData, settings: Mapping[str, Any]) -> str:
    """Name a float training by its initial model, its data and settings, and the code, versions and threads.

    `settings`: everything else that determines the result, as plain data.
    """
    found = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + _bytes(tensor))
    for tensor in (data.test_images[:MOST_IMAGES], data.test_labels):
        found.update(f"{tuple(tensor.shape)}".encode() + _bytes(tensor))
    where = {"torch": torch.__version__, "threads": torch.get_num_threads(), "net": str(net), "n": data.n_train}
    where |= {"cpu": torch.backends.cpu.get_cpu_capability(), "code": [digest_of(OURS / name) for name in WRITTEN_IN]}
    found.update(json.dumps({**where, **settings}, sort_keys=True).encode())
    return found.hexdigest()[:32]


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def take_float(net: nn.Module, key: str) -> bool:
    """Load the float model of that key into the network; return False if there is none that can be read."""
    folder = cache_folder()
    path = None if folder is None else folder / f"{key}.pt"
    if path is None or not path.is_file():
        return False
    try:
        net.load_state_dict(read_saved(path))
    except (ConfigError, RuntimeError):
        return False
    with suppress(OSError):
        os.utime(path)
    return True


def keep_float(net: nn.Module, key: str) -> None:
    """Keep a trained float model; one that cannot be written is not kept."""
    folder = cache_folder()
    if folder is None:
        return
    with suppress(ConfigError, OSError):
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / f"{key}.pt", lambda path: torch.save(net.state_dict(), path))
        _shrink(folder)


def _shrink(folder: Path) -> None:
    """Delete the least recently used models until the folder is small enough."""
    models = sorted(folder.glob("*.pt"), key=lambda path: path.stat().st_mtime, reverse=True)
    total = 0
    for path in models:
        total += path.stat().st_size
        if total > MOST_BYTES:
            path.unlink()
