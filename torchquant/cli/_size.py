"""`torchquant size`: the bytes of model files as a table."""

from __future__ import annotations

from pathlib import Path

from torchquant._files import write_csv, write_json
from torchquant.deploy import FileSize, file_sizes
from torchquant.runs.console import Terminal


def run(paths: list[Path], json: Path | None, csv: Path | None) -> None:
    """Print the table, and write it where asked. Raises ConfigError, MissingDependencyError."""
    sizes = file_sizes(paths)
    Terminal().table("torchquant size", *sizes.table(), "")
    if json is not None:
        write_json(json, sizes.to_dicts())
    if csv is not None:
        write_csv(csv, list(FileSize.__dataclass_fields__), sizes.to_dicts())
