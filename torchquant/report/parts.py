"""The parts of a page: text, numbers, tables, figures, pictures, and what folds them away."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torchquant._shown import shown
from torchquant.errors import ConfigError
from torchquant.report.html import Html, data_script, element, joined, with_code

NUMBER = re.compile(r"[+\-−]?(\d[\d,]*(\.\d+)?|\.\d+)(e[+-]?\d+)?\s?(%|x|dB|[kMG]?B|bits?|m?s)?")
"""Text that is read as a number in a table: right-aligned, and sorted by its value."""
NO_VALUE = ("", "-", "–")
"""Text of a cell without a value."""


@dataclass
class Rendering:
    """The state of a page while it is rendered: how many figures and graphs it has so far, and if figures are drawn."""

    draws: bool = True
    n_figures: int = 0
    n_graphs: int = 0


class Part(Protocol):
    """Interface of the parts of a section."""

    def render(self, rendering: Rendering) -> Html:
        """Return the HTML of the part."""
        ...


def rendered(parts: Iterable[Part], rendering: Rendering) -> Html:
    """Return the HTML of parts, one after the other."""
    return joined([part.render(rendering) for part in parts])


@dataclass(frozen=True)
class Text:
    """A paragraph; what stands between backticks is shown as code. `is_note`: smaller and grey, as an explanation."""

    text: str
    is_note: bool = False

    def render(self, rendering: Rendering) -> Html:
        """Return the paragraph."""
        return element("p", with_code(self.text), class_="note" if self.is_note else None)


@dataclass(frozen=True)
class Code:
    """Lines of code or of a terminal, as they are."""

    text: str

    def render(self, rendering: Rendering) -> Html:
        """Return the lines in a box."""
        return element("pre", element("code", self.text))


@dataclass(frozen=True)
class Numbers:
    """Few numbers in large type: (number, what it is) each."""

    numbers: Sequence[tuple[str, str]]

    def render(self, rendering: Rendering) -> Html:
        """Return the numbers side by side."""
        cards = [element("div", element("b", number), what) for number, what in self.numbers]
        return element("div", *cards, class_="numbers")


@dataclass(frozen=True)
class Cell:
    """A cell of a table whose value is not the number in its text. `value`: what it is sorted by."""

    text: str
    value: float


@dataclass(frozen=True)
class Table:
    """A table that is sorted by a click on a column.

    A cell is text, a whole number, a float (shown with four digits), None (shown as a dash), or a `Cell`. A cell that
    is a number, or text such as "12.5%" or "1,024 kB", is right-aligned. `name`: id of the table in the page.
    Raises ConfigError for a row of another length than the header.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str | float | Cell | None]]
    caption: str = ""
    name: str | None = None

    def __post_init__(self) -> None:
        if wrong := [row for row in self.rows if len(row) != len(self.header)]:
            raise ConfigError(f"a row of the table must have {len(self.header)} cells, got {shown(wrong[0])}")

    def render(self, rendering: Rendering) -> Html:
        """Return the table in a box that scrolls sideways."""
        numeric = [self._is_numeric(i) for i in range(len(self.header))]
        kinds = [None if is_number else "t" for is_number in numeric]
        head = [element("th", name, class_=kind, scope="col") for name, kind in zip(self.header, kinds, strict=True)]
        body = [joined(map(_cell, row, kinds)) for row in self.rows]
        table = element(
            "table",
            element("thead", element("tr", *head)),
            element("tbody", *(element("tr", row) for row in body)),
            id=self.name,
            class_="sortable",
        )
        caption = [element("p", with_code(self.caption), class_="note")] if self.caption else []
        return joined([element("div", table, class_="scroll"), *caption])

    def _is_numeric(self, column: int) -> bool:
        cells = [row[column] for row in self.rows if row[column] is not None and row[column] not in NO_VALUE]
        return bool(cells) and all(not isinstance(c, str) or bool(NUMBER.fullmatch(c)) for c in cells)


def _cell(cell: str | float | Cell | None, kind: str | None) -> Html:
    if isinstance(cell, Cell):
        return element("td", cell.text, data_value=cell.value, class_=kind)
    return element("td", words_of(cell), class_=kind)


def words_of(value: str | float | None) -> str:
    """Format a value for a cell.

    >>> words_of(12345), words_of(0.123456), words_of(None), words_of("a"), words_of(float("inf"))
    ('12,345', '0.1235', '–', 'a', '∞')
    """
    if value is None or isinstance(value, str):
        return "–" if value is None else value
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if math.isfinite(value) else {math.inf: "∞", -math.inf: "-∞"}.get(value, "NaN")


@dataclass(frozen=True)
class Figure:
    """A figure of plotly, with the same numbers as a table for a reader without JavaScript.

    `data`, `layout`: traces and layout as plotly's schema names them, as plain data; NaN and infinity become gaps.
    Fonts, colors and margins come from the page. `height` in pixels. `lines`, `bars`, `heatmap` and `histogram` of this
    package make most figures.
    """

    title: str
    data: Sequence[Mapping[str, Any]]
    layout: Mapping[str, Any]
    table: Table
    caption: str = ""
    height: int = 320

    def render(self, rendering: Rendering) -> Html:
        """Return the place of the figure, its data, and its table."""
        rendering.n_figures += 1
        place = element(
            "div",
            data_script({"data": plain(self.data), "layout": plain(self.layout)}),
            class_="plot",
            style=f"height:{self.height}px",
            role="img",
            aria_label=self.title,
        )
        numbers = element(
            "details", element("summary", "The same as a table"), self.table.render(rendering), open=not rendering.draws
        )
        caption = [with_code(self.caption)] if self.caption else []
        title = element("figcaption", element("b", self.title), *([" "] if caption else []), *caption)
        return element("figure", title, *([place] if rendering.draws else []), numbers)


def plain(value: Any) -> Any:
    """Return data for plotly: floats with six digits, NaN and infinity as None, text without its markup.

    >>> plain({"x": (0.12345678, float("nan"), 3, "<b>")})
    {'x': [0.123457, None, 3, '&lt;b>']}
    """
    if isinstance(value, str):
        return value.replace("&", "&amp;").replace("<", "&lt;")
    if isinstance(value, Mapping):
        return {str(key): plain(inside) for key, inside in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inside) for inside in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


@dataclass(frozen=True)
class Picture:
    """A picture, given as the bytes of a PNG file; `alt` says in words what it shows."""

    png: bytes = field(repr=False)
    alt: str
    caption: str = ""

    def render(self, rendering: Rendering) -> Html:
        """Return the picture with its caption."""
        caption = [element("figcaption", with_code(self.caption))] if self.caption else []
        source = "data:image/png;base64," + base64.b64encode(self.png).decode("ascii")
        return element("figure", element("img", src=source, alt=self.alt), *caption)


@dataclass(frozen=True)
class Details:
    """Parts that are folded away under a line; `is_open`: unfolded at first."""

    summary: str
    parts: Sequence[Part] = field(repr=False)
    is_open: bool = False

    def render(self, rendering: Rendering) -> Html:
        """Return the line and the parts."""
        inside = rendered(self.parts, rendering)
        return element("details", element("summary", with_code(self.summary)), inside, open=self.is_open)
