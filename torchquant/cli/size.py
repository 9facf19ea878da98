"""`torchquant size`: show the bytes of model files as a table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from torchquant._files import write_csv, write_json
from torchquant.deploy import FileSize, file_sizes
from torchquant.runs.console import Terminal


def command(
    paths: Annotated[list[Path], "Checkpoints, packed models, ONNX files, or folders that hold them."],
    json: Annotated[Path | None, "Also write the table to this JSON file."] = None,
    csv: Annotated[Path | None, "Also write the table to this CSV file."] = None,
) -> None:
    """Compare the bytes of model files with those of the float model."""
    sizes = file_sizes(paths)
    Terminal().table("torchquant size", *sizes.table(), "")
    if json is not None:
        write_json(json, sizes.to_dicts())
    if csv is not None:
        write_csv(csv, list(FileSize.__dataclass_fields__), sizes.to_dicts())
