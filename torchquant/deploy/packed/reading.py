"""Read checkpoints and safetensors files without running any code in them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor

from torchquant._files import read_saved
from torchquant.errors import ConfigError, require


def read_checkpoint(path: str | os.PathLike[str]) -> Any:
    """Read a file that torch saved, or the tensors of a .safetensors file, on the CPU. Raises ConfigError."""
    if Path(path).suffix == ".safetensors":
        return read_safetensors(path)[0]
    return read_saved(path)


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors of a file, on the CPU, and its metadata. Raises ConfigError, MissingDependencyError."""
    file = _existing(path)
    safetensors = require("safetensors", "deploy")
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise ConfigError(f"{file} is not a complete safetensors file: {error}") from error


def _existing(path: str | os.PathLike[str]) -> Path:
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"there is no file {file}")
    return file
