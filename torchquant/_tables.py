"""Format tables as plain text, and such text as HTML."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def text_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Format rows as aligned columns under a header line.

    >>> print(text_table(["a", "b"], [[1, "xy"]]))
    a  b
    -  --
    1  xy
    """
    cells = [list(header)] + [[str(value) for value in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


class ShownAsTables:
    """Base of classes that print as text with tables; a notebook shows the same tables as HTML."""

    def _repr_html_(self) -> str:
        return html_of(str(self))


def html_of(text: str) -> str:
    """Convert text to HTML. A table as `text_table` writes it ends with an empty line; other lines are paragraphs.

    >>> html_of("of <a>" + chr(10) + text_table(["a", "b"], [[1, "x & y"]]))
    '<p>of &lt;a&gt;</p><table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td>x &amp; y</td></tr></table>'
    """
    lines = text.split("\n")
    parts: list[str] = []
    i = 0
    while i < len(lines):
        rule = lines[i + 1] if i + 1 < len(lines) else ""
        if lines[i] and re.fullmatch("-+( +-+)*", rule):
            end = next((j for j in range(i, len(lines)) if not lines[j]), len(lines))
            columns = [match.start() for match in re.finditer("-+", rule)]
            header, *rows = ([line[a:b] for a, b in _spans(columns)] for line in (lines[i], *lines[i + 2 : end]))
            parts.append(f"<table>{_html_row('th', header)}{''.join(_html_row('td', row) for row in rows)}</table>")
            i = end
        elif lines[i]:
            parts.append(f"<p>{_escaped(lines[i])}</p>")
        i += 1
    return "".join(parts)


def _spans(starts: list[int]) -> list[tuple[int, int | None]]:
    return list(zip(starts, [*starts[1:], None], strict=True))


def _html_row(kind: str, cells: Iterable[str]) -> str:
    return f"<tr>{''.join(f'<{kind}>{_escaped(cell.strip())}</{kind}>' for cell in cells)}</tr>"


def _escaped(text: str) -> str:
    from html import escape  # needed in notebooks only, and it would slow the import of torchquant down

    return escape(text)
