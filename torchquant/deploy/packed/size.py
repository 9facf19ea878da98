"""Compare the sizes of model files with the size of the float checkpoint."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from torchquant._arguments import checked
from torchquant._tables import ShownAsTables, text_table
from torchquant.deploy.packed.head import FORMAT
from torchquant.deploy.packed.reading import read_checkpoint, read_safetensors
from torchquant.errors import ConfigError

SUFFIXES = (".pt", ".pth", ".safetensors", ".onnx")
FLOAT = "float checkpoint"


@dataclass(frozen=True)
class FileSize:
    """The size of one file. `ratio`: its bytes over those of the float checkpoint, None without one.

    `kind`: "float checkpoint", "quantized checkpoint" (float weights and the numbers of the quantizers), "packed",
    "ONNX" (by its file name), or "other checkpoint".
    """

    path: str
    kind: str
    bytes: int
    ratio: float | None


class FileSizes(ShownAsTables, list[FileSize]):
    """A list of FileSize that prints as a table."""

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return the header and the rows of a table."""
        rows = [[s.path, s.kind, f"{s.bytes:,}", "-" if s.ratio is None else f"{s.ratio:.1%}"] for s in self]
        return ["path", "kind", "bytes", "of float"], rows

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return rows as plain dictionaries, for JSON or pandas."""
        return [asdict(size) for size in self]

    def __str__(self) -> str:
        return text_table(*self.table())


@checked
def file_sizes(paths: Iterable[str | os.PathLike[str]]) -> FileSizes:
    """List kind and bytes of files, and of all .pt, .pth, .safetensors and .onnx files in folders such as a run's.

    The float checkpoint to compare with is the first one in the same folder, or else the first of all. Raises
    ConfigError for a file that does not exist or cannot be read safely, MissingDependencyError.

    >>> import tempfile, torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     torch.save(torch.nn.Linear(2, 2).state_dict(), f"{folder}/float.pt")
    ...     [(size.kind, size.ratio) for size in file_sizes([folder])]
    [('float checkpoint', 1.0)]
    """
    files = [(file, _kind(file), file.stat().st_size) for path in paths for file in _files(Path(path))]
    floats: dict[Path, int] = {}
    for file, kind, n_bytes in files:
        if kind == FLOAT:
            floats.setdefault(file.parent, n_bytes)
    first = next(iter(floats.values()), None)
    found = FileSizes()
    for file, kind, n_bytes in files:
        compared = floats.get(file.parent, first)
        found.append(FileSize(str(file), kind, n_bytes, n_bytes / compared if compared else None))
    return found


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
    if not found:
        raise ConfigError(f"the folder {path} has no model files; they end in {', '.join(SUFFIXES)}")
    return found


def _kind(file: Path) -> str:
    if not file.is_file() or file.suffix not in SUFFIXES:
        what = f"{file} is not a model file" if file.is_file() else f"there is no file {file}"
        raise ConfigError(f"{what}; expected a folder, or a file that ends in {', '.join(SUFFIXES)}")
    if file.suffix == ".onnx":
        return "ONNX"
    if file.suffix == ".safetensors":
        state, metadata = read_safetensors(file)
        if FORMAT in metadata:
            return "packed"
    else:
        state = read_checkpoint(file)
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        return "other checkpoint"
    return "quantized checkpoint" if any(key.endswith("_extra_state") for key in state) else FLOAT
