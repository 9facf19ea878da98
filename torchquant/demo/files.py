"""The folder a run writes into, and the kinds of files in it."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchquant._files import write_whole
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


def write_json(path: Path, value: Any) -> Path:
    """Write `value` as indented JSON; raises ValueError for NaN and infinity, which JSON has not."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    return write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_checkpoint(path: Path, model: nn.Module) -> Path:
    """Write the `state_dict`; `torch.load(path, weights_only=True)` reads it."""
    return write_whole(path, lambda temporary: torch.save(model.state_dict(), temporary))
