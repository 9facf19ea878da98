"""Write and read the metadata of a packed file, with a checksum over the whole file."""

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
    """The metadata of a packed file, besides versions and checksum.

    `weights`: key -> [shape, type, lowest code, width, width of the shared bits]. `tied`: key -> key of the weight with
    the same codes and numbers; nothing else is stored for it.
    """

    weights: dict[str, list[Any]]
    plan: dict[str, Any] | None = None
    build: tuple[str, dict[str, Any]] | None = None
    tied: dict[str, str] = field(default_factory=dict)

    def said(self) -> dict[str, Any]:
        """Return the data to write; `tied` only if it is not empty, so that earlier versions read the file."""
        return {name: value for name, value in vars(self).items() if name != "tied" or value}


def metadata_of(tensors: Mapping[str, Tensor], head: Head) -> dict[str, str]:
    """Return the metadata as one entry: safetensors orders several at random, and files must be reproducible."""
    from torchquant import __version__

    said = {"version": VERSION, "torchquant": __version__, **head.said()}
    return {FORMAT: json.dumps({**said, "crc32": _checksum(tensors, said)}, separators=(",", ":"))}


def _checksum(tensors: Mapping[str, Tensor], said: Mapping[str, Any]) -> int:
    """Compute the CRC-32 of the metadata, and of names, types, shapes and bytes of all tensors."""
    total = zlib.crc32(json.dumps(said, sort_keys=True).encode())
    for key, value in sorted(tensors.items()):
        total = zlib.crc32(f"{key} {type_name(value)} {list(value.shape)}".encode(), total)
        total = zlib.crc32(value.reshape(-1).view(torch.uint8).numpy().data, total)
    return total


def read_head(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Head:
    """Read the head of a file and check it against the tensors. Raises ConfigError for a damaged or another file."""
    if FORMAT not in metadata:
        raise ConfigError(
            f"{path} is a safetensors file, but not a packed model: its metadata has no '{FORMAT}'. "
            "Load float weights with torchquant.compat.checkpoints.load_checkpoint"
        )
    damaged = ConfigError(f"{path} is damaged: its contents do not match its checksum. Copy it again")
    try:
        said = json.loads(metadata[FORMAT])
        version, written_by, crc32 = said.pop("version"), said.pop("torchquant"), said.pop("crc32")
    except (AttributeError, KeyError, TypeError, ValueError):
        raise damaged from None
    if version != VERSION:
        raise ConfigError(
            f"{path} has version {version} of the packed format, written by torchquant {written_by}; this torchquant "
            f"reads version {VERSION}. Install torchquant {written_by}"
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
            raise ConfigError(f"{path}, metadata: {key} is tied to {other!r}, which is no weight of the same form")
    return head


def type_name(tensor: Tensor) -> str:
    """Return the type of a tensor in a word.

    >>> type_name(torch.zeros(1))
    'float32'
    """
    return str(tensor.dtype).removeprefix("torch.")
