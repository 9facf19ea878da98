"""Write the tables of docs/coming-from.md: `python -m tests.compat.coming_from`."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Sequence

from tests import ROOT

PAGE = ROOT / "docs" / "coming-from.md"
PROJECTS = ("nni",)
COLUMNS = ("there", "what", "here", "why", "shown by")
VERDICTS = ("runs", "differs", "refused")


def rows(project: str) -> Sequence[Sequence[str]]:
    """The rows of a project: (where it is there, what it does, verdict, reason, FILE::TEST below tests/compat)."""
    return importlib.import_module(f"tests.compat.{project}_cases").ROWS


def marks(project: str) -> tuple[str, str]:
    return (
        f"<!-- {project}: `python -m tests.compat.coming_from` writes this table -->\n",
        f"<!-- end of {project} -->\n",
    )


def written(page: str) -> str:
    """The page with the tables in their places."""
    for project in PROJECTS:
        found = rows(project)
        counts = Counter(verdict for _, _, verdict, _, _ in found)
        lines = [COLUMNS, ["---"] * 5, *([f"`{r[0]}`", r[1], r[2], r[3], f"`{r[4]}`"] for r in found)]
        table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
        summary = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS)
        begin, end = marks(project)
        before, _, rest = page.partition(begin)
        page = f"{before}{begin}{len(found)} rows: {summary}.\n\n{table}{end}{rest.partition(end)[2]}"
    return page


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
