"""Files that are written whole or not at all, and Python files that are run."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from torchquant.errors import ConfigError


def write_whole(path: Path, write: Callable[[Path], object]) -> Path:
    """Let `write` fill a temporary file beside `path`, then put it in its place in one step. Raises ConfigError."""
    if not path.name:
        raise ConfigError(f"'{path}' names no file to write; give a path that ends in a file's name")
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_json(path: Path, value: Any) -> Path:
    """Write `value` as indented JSON; raises ValueError for NaN and infinity, which JSON has not."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    return write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write `rows` under `header`."""
    table = io.StringIO()
    writer = csv.DictWriter(table, header, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return write_whole(path, lambda temporary: temporary.write_text(table.getvalue(), encoding="utf-8"))


def run_python_file(path: Path, kind: str) -> ModuleType:
    """Run a Python file as the module `torchquant_KIND_STEM`, which pickle and torch.compile find by that name.

    Raises ImportError for a file that is not Python's.
    """
    name = f"torchquant_{kind}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
