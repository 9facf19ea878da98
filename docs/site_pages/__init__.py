"""Pages of the documentation site that are made from the package and the repository when the site is built."""

from __future__ import annotations

import shutil
from pathlib import Path

from docs.site_pages import catalogue, commands, reference, repository

FOLDERS = ("catalogue", "reference", "repository")
"""Folders of `docs/` that hold generated pages only."""


def write_pages(docs: Path) -> None:
    """Write every generated page below `docs/`, and remove those of an earlier build."""
    for folder in FOLDERS:
        shutil.rmtree(docs / folder, ignore_errors=True)
    made = {**catalogue.pages(), **commands.pages(), **reference.pages(), **repository.pages()}
    for address, content in made.items():
        path = docs / address
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
