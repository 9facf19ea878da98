"""Write the tables of docs/coming-from.md: `python -m tests.compat.coming_from`."""

from __future__ import annotations

import importlib
from collections import Counter
from typing import NamedTuple

from tests import ROOT

PAGE = ROOT / "docs" / "coming-from.md"
PROJECTS = ("nni", "autoqnn")
COLUMNS = ("there", "what", "here", "why", "shown by")
VERDICTS = ("runs", "differs", "refused")


class Row(NamedTuple):
    """One test, example, notebook or document. `why`: the reason of a verdict. `test`: a function in tests/compat."""

    name: str
    what: str
    verdict: str
    why: str
    test: str


def rows(project: str) -> list[Row]:
    found: list[Row] = importlib.import_module(f"tests.compat.{project}_cases").ROWS
    return found


def marks(project: str) -> tuple[str, str]:
    return (
        f"<!-- {project}: `python -m tests.compat.coming_from` writes this table -->\n",
        f"<!-- end of {project} -->\n",
    )


def written(page: str) -> str:
    """The page with the tables in their places."""
    for project in PROJECTS:
        found = rows(project)
        counts = Counter(row.verdict for row in found)
        lines = [COLUMNS, ["---"] * 5, *(row._replace(test=f"`{row.test}`") for row in found)]
        table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
        summary = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS)
        begin, end = marks(project)
        before, _, rest = page.partition(begin)
        page = f"{before}{begin}{len(found)} rows: {summary}.\n\n{table}{end}{rest.partition(end)[2]}"
    return page


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
