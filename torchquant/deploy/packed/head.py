"""What the metadata of a packed file says, and the checksum over all of it."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchquant.errors import ConfigError
from torchquant.plan.rules import check_keys

FORMAT = "torchquant-packed"
VERSION = 1


@dataclass(frozen=True)
class Head:
    """What the metadata says, beside versions and checksum.

    `weights`: key -> [shape, type, lowest code, width, width of what is shared]. `tied`: key -> that of the weight
    whose codes and numbers it has; nothing else is stored for it.
    """

    weights: dict[str, list[Any]]
    plan: dict[str, Any] | None = None
    build: tuple[str, dict[str, Any]] | None = None
    tied: dict[str, str] = field(default_factory=dict)

    def said(self) -> dict[str, Any]:
        """As it is written; `tied` only where there is something, so that earlier versions read other files."""
        return {name: value for name, value in vars(self).items() if name != "tied" or value}


def metadata_of(tensors: Mapping[str, Tensor], head: Head) -> dict[str, str]:
    """One entry, as safetensors writes several in any order, and the same model gives the same file."""
    from torchquant import __version__

    said = {"version": VERSION, "torchquant": __version__, **head.said()}
    return {FORMAT: json.dumps({**said, "crc32": _checksum(tensors, said)}, separators=(",", ":"))}


def _checksum(tensors: Mapping[str, Tensor], said: Mapping[str, Any]) -> int:
    """CRC-32 of the metadata, and of names, types, shapes and bytes of all tensors."""
    total = zlib.crc32(json.dumps(said, sort_keys=True).encode())
    for key, value in sorted(tensors.items()):
        total = zlib.crc32(f"{key} {type_name(value)} {list(value.shape)}".encode(), total)
        total = zlib.crc32(value.reshape(-1).view(torch.uint8).numpy().data, total)
    return total


def read_head(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Head:
    """What a file says, checked against its tensors. Raises ConfigError for one that is damaged or no packed model."""
    if FORMAT not in metadata:
        raise ConfigError(
            f"{path} is a safetensors file, but no packed model: its metadata has no '{FORMAT}'. "
            "Float weights are loaded by torchquant.compat.checkpoints.load_checkpoint"
        )
    damaged = ConfigError(f"{path} is damaged: what it holds is not what its checksum was made of. Copy it anew")
    try:
        said = json.loads(metadata[FORMAT])
        version, written_by, crc32 = said.pop("version"), said.pop("torchquant"), said.pop("crc32")
    except (AttributeError, KeyError, TypeError, ValueError):
        raise damaged from None
    if version != VERSION:
        raise ConfigError(
            f"{path} has version {version} of the packed format, written by torchquant {written_by}; this torchquant "
            f"reads version {VERSION}. Install that one"
        )
    if crc32 != _checksum(tensors, {"version": version, "torchquant": written_by, **said}):
        raise damaged
    check_keys(f"{path}, metadata", said, Head.__dataclass_fields__)
    head = Head(**{"weights": {}, **said})
    for key, entry in head.weights.items():
        if not (isinstance(entry, list) and [type(part) for part in entry] == [list, str, int, int, int]):
            raise ConfigError(f"{path}, metadata: {key} must be [shape, type, low, width, shared width], got {entry!r}")
    for key, other in head.tied.items():
        if other in head.tied or other not in head.weights or head.weights[other] != head.weights.get(key):
            raise ConfigError(f"{path}, metadata: {key} is tied to {other!r}, which is no weight like it")
    return head


def type_name(tensor: Tensor) -> str:
    """The type of a tensor in a word.

    >>> type_name(torch.zeros(1))
    'float32'
    """
    return str(tensor.dtype).removeprefix("torch.")
