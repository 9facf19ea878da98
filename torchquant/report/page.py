"""Put sections together to one self-contained HTML file."""

from __future__ import annotations

import base64
import gzip
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path

from torchquant._files import write_whole
from torchquant.errors import MissingDependencyError, require
from torchquant.report.html import Html, element, joined, with_code
from torchquant.report.parts import Part, Rendering, rendered

WITHOUT_PLOTLY = (
    "The figures of this page are shown as tables, because plotly was not installed where it was made; for figures, "
    "run `pip install 'torchquant[report]'` there and make it again."
)


@dataclass(frozen=True)
class Section:
    """A part of a page with a heading. `parts`: what stands in it, from top to bottom."""

    title: str
    parts: Sequence[Part] = field(repr=False)


@dataclass(frozen=True)
class Page:
    """A page with a title and sections. `lead`: a sentence under the title, in which backticks mark code.

    The page loads nothing. The library that draws its figures, plotly, is embedded once, compressed, and only if there
    is a figure; without plotly the page says so and shows each figure as a table.
    """

    title: str
    sections: Sequence[Section]
    lead: str = ""

    def html(self) -> str:
        """Return the page as text."""
        library = _library()
        rendering = Rendering(draws=library is not None)
        sections = [
            element("section", element("h2", section.title), rendered(section.parts, rendering), class_="section")
            for section in self.sections
        ]
        head = [
            element("meta", charset="utf-8"),
            element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            element("title", self.title),
            element("style", Html(_asset("page.css"))),
        ]
        notes = [element("p", with_code(WITHOUT_PLOTLY), class_="note")] if rendering.n_figures and not library else []
        lead = [element("p", with_code(self.lead), class_="note")] if self.lead else []
        packed = [element("script", library, type="text/plain", id="plotly")] if rendering.n_figures and library else []
        script = element("script", Html(_asset("page.js")))
        main = element("main", element("h1", self.title), *lead, *notes, *sections)
        page = element("html", element("head", *head), element("body", main, *packed, script), lang="en")
        return joined([Html("<!doctype html>\n"), page, "\n"])

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the page, whole or not at all, and return its path. Raises UnwritableError."""
        text = self.html()
        return write_whole(Path(path), lambda temporary: temporary.write_text(text, encoding="utf-8"))


@cache
def _asset(name: str) -> str:
    return resources.files("torchquant.report").joinpath(name).read_text(encoding="utf-8")


@cache
def _library() -> Html | None:
    """Return plotly.js, packed by gzip as base64, which the browser unpacks; None if plotly is not installed."""
    try:
        require("plotly", "report")
    except MissingDependencyError:
        return None
    code = resources.files("plotly").joinpath("package_data", "plotly.min.js").read_bytes()
    return Html(base64.b64encode(gzip.compress(code, 6, mtime=0)).decode("ascii"))
