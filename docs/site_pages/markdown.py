"""Write Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    """Format rows as a Markdown table.

    >>> print(table(["a", "b"], [["1", "x | y"]]))
    | a | b |
    | --- | --- |
    | 1 | x \\| y |
    """
    written = (" ".join(cell.replace("|", "\\|").split()) for row in rows for cell in row)
    lines = [header, ["---"] * len(header), *zip(*[written] * len(header), strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
