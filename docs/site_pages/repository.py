"""Pages of the repository that lie outside `docs/`, with links that lead into the site."""

from __future__ import annotations

import os
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHOWN = {
    "CONTRIBUTING.md": "repository/contributing.md",
    "CHANGELOG.md": "repository/changelog.md",
    "benchmarks/README.md": "repository/benchmarks.md",
}
"""File of the repository -> the page of the site that shows it."""
LINK = re.compile(r"(?<=\]\()(?P<path>[^)#:\s]+)(?=[#)])")


def pages() -> dict[str, str]:
    """Make the pages: address in the site -> Markdown."""
    return {
        page: lead_into_site((ROOT / source).read_text(encoding="utf-8"), source, page)
        for source, page in SHOWN.items()
    }


def lead_into_site(text: str, source: str, page: str) -> str:
    """Change links between files of the repository into links between pages of the site.

    >>> lead_into_site("[how](../CONTRIBUTING.md#add)", "docs/ptq.md", "ptq.md")
    '[how](repository/contributing.md#add)'
    >>> lead_into_site("[how](docs/ptq.md)", "CONTRIBUTING.md", "repository/contributing.md")
    '[how](../ptq.md)'
    """

    def moved(match: re.Match[str]) -> str:
        target = ((ROOT / source).parent / match["path"]).resolve()
        if not target.is_relative_to(ROOT):
            return match[0]
        address = target.relative_to(ROOT).as_posix()
        shown = SHOWN.get(address, address.removeprefix("docs/"))
        return os.path.relpath(shown, Path(page).parent)

    return LINK.sub(moved, text)
