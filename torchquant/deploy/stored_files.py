"""Checkpoints and safetensors files, read without running anything that stands in them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchquant.errors import ConfigError, require


def read_checkpoint(path: str | os.PathLike[str]) -> Any:
    """What torch saved in a file, or the tensors of a .safetensors file, on the CPU. Raises ConfigError."""
    file = _existing(path)
    if file.suffix == ".safetensors":
        return read_safetensors(file)[0]
    try:
        return torch.load(file, weights_only=True, map_location="cpu")
    except Exception as error:  # the unpickler fails in many ways on what is no checkpoint
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{file} holds no state dict that can be read safely: {reason}") from error


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, on the CPU, and its metadata. Raises ConfigError, MissingDependencyError."""
    file = _existing(path)
    safetensors = require("safetensors", "deploy")
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise ConfigError(f"{file} is not a whole safetensors file: {error}") from error


def _existing(path: str | os.PathLike[str]) -> Path:
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"there is no file {file}")
    return file
