"""Print the files of the package over 300 lines and its functions over 60: `python -m tests.size_report`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tests import ROOT

LONG_FILE, LONG_FUNCTION = 300, 60


def sizes(path: Path) -> Iterator[tuple[int, str]]:
    """Lines and name of a file and of each function in it, of those that are long."""
    text = path.read_text(encoding="utf-8")
    name = str(path.relative_to(ROOT))
    if (n_lines := len(text.splitlines())) > LONG_FILE:
        yield n_lines, name
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and (n_lines := (node.end_lineno or 0) - node.lineno + 1) > LONG_FUNCTION:
            yield n_lines, f"{name}:{node.lineno} {node.name}()"


if __name__ == "__main__":
    found = [size for path in sorted((ROOT / "torchquant").rglob("*.py")) for size in sizes(path)]
    print(f"{len(found)} files over {LONG_FILE} lines or functions over {LONG_FUNCTION}")
    for n_lines, name in sorted(found, reverse=True):
        print(f"{n_lines:6} {name}")
