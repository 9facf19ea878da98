"""The folder a run writes into, and the kinds of files in it."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchquant._files import write_json, write_whole
from torchquant.errors import ConfigError


def output_folder(path: str | os.PathLike[str]) -> Path:
    """The folder, made if it is not there. Raises ConfigError if it cannot be one."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (FileExistsError, NotADirectoryError):
        raise ConfigError(f"the output must be a folder, but {folder} is (or lies under) a file") from None
    except OSError as error:
        raise ConfigError(f"cannot write into the output folder {folder}: {error.strerror}") from error
    return folder


def claim_folder(path: Path, settings: dict[str, Any], holds: str, thing: str) -> None:
    """Keep the settings of a run in the JSON file `path`; raise ConfigError if its folder holds a run of others.

    `holds` and `thing` are the words of the message: "runs of another recipe", "recipe".
    """
    if not path.exists():
        write_json(path, settings)
        return
    known = json.loads(path.read_text(encoding="utf-8"))
    if known != settings:
        changed = ", ".join(f"{k}: {known.get(k)} there, {v} now" for k, v in settings.items() if known.get(k) != v)
        raise ConfigError(f"{path.parent} holds {holds} ({changed}); choose another folder, or that {thing}")


def write_checkpoint(path: Path, model: nn.Module) -> Path:
    """Write the `state_dict`; `torch.load(path, weights_only=True)` reads it."""
    return write_whole(path, lambda temporary: torch.save(model.state_dict(), temporary))
