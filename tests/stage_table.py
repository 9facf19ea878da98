"""Write the table of post-training stages in docs/ptq.md: `python -m tests.stage_table`."""

from __future__ import annotations

from tests import ROOT
from torchquant.cli.algorithms import columns
from torchquant.ptq import PTQ
from torchquant.ptq.stage import CHANGES

PAGE = ROOT / "docs" / "ptq.md"
COLUMNS = ("stage", "looks at", "changes", "cost", "when", "source")
BEGIN, END = "<!-- stages: `python -m tests.stage_table` writes this table -->\n", "<!-- end -->\n"


def written(page: str) -> str:
    """The page with the table of the registry in its place."""
    rows = [[columns(name)[c] for c in COLUMNS] for name in sorted(PTQ, key=lambda n: CHANGES.index(PTQ[n].changes))]
    lines = [COLUMNS, ["---"] * len(COLUMNS), *([f"`{name}`", *rest] for name, *rest in rows)]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    before, _, rest = page.partition(BEGIN)
    return before + BEGIN + table + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
