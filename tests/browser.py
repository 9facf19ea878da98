"""Open a page in a headless Chromium, use it as a reader does, and say what happened."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium to open the page in")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars", "--mute-audio"),
    *("--virtual-time-budget=10000", "--enable-logging=stderr", "--window-size=1400,4200"),
)
WATCH = """<script>
window.faults = [];
window.addEventListener("error", event => faults.push(String(event.message)));
window.addEventListener("unhandledrejection", event => faults.push(String(event.reason)));
console.error = (...words) => faults.push(words.join(" "));
</script>"""
USE = """<script>
(async () => {
  const wait = () => new Promise(done => setTimeout(done, 300));
  const texts = (table, i) => [...table.tBodies[0].rows].map(row => row.cells[i].textContent);
  const found = { tables: [], graphs: [], plots: 0, drawn: 0 };
  for (const table of document.querySelectorAll("main > .section > .scroll > table.sortable")) {
    const columns = [...table.tHead.rows[0].cells].map((head, i) => {
      const orders = [0, 1].map(() => { head.click(); return [head.getAttribute("aria-sort"), texts(table, i)]; });
      return { name: head.textContent, isText: head.classList.contains("t"), orders };
    });
    found.tables.push(columns);
  }
  for (const graph of document.querySelectorAll(".graph")) {
    const nodes = [...graph.querySelectorAll(".node")], paths = graph.querySelectorAll(".canvas svg > path").length;
    const last = nodes[nodes.length - 1];
    last.dispatchEvent(new MouseEvent("click", { bubbles: true, cancelable: true }));
    const shown = [...graph.querySelectorAll(".node-details")].filter(one => getComputedStyle(one).display !== "none");
    found.graphs.push({
      names: nodes.map(node => node.querySelector("title").textContent.split("  ")[0]), paths,
      shown: shown.map(one => one.querySelector("h4").textContent), text: shown.map(one => one.innerText).join(" "),
    });
  }
  await wait();
  const plots = [...document.querySelectorAll(".plot")].filter(plot => plot.offsetParent);
  for (const plot of plots) { plot.scrollIntoView(); await wait(); }
  found.plots = plots.length;
  found.drawn = plots.filter(plot => plot.querySelector(".main-svg")).length;
  window.scrollTo(0, 0);
  found.faults = window.faults;
  document.body.dataset.found = JSON.stringify(found);
})();
</script>"""


@dataclass(frozen=True)
class Opened:
    """What a reader saw: `faults` of the console; `tables`, `graphs`, number of visible `plots` and of drawn ones."""

    faults: list[str]
    tables: list[list[dict[str, Any]]]
    graphs: list[dict[str, Any]]
    plots: int
    drawn: int


def opened(page: Path, name: str, folder: Path) -> Opened:
    """Open a copy of the page that a script uses; the screenshot is `name`.png in $TORCHQUANT_ARTEFACTS or `folder`."""
    artefacts = Path(os.environ.get("TORCHQUANT_ARTEFACTS", folder))
    artefacts.mkdir(parents=True, exist_ok=True)
    text = page.read_text(encoding="utf-8")
    copy = folder / f"{name}.html"
    copy.write_text(text.replace("<head>", f"<head>{WATCH}").replace("</body>", f"{USE}</body>"), encoding="utf-8")
    picture = f"--screenshot={artefacts / f'{name}.png'}"
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={folder / 'chromium'}", picture, "--dump-dom", copy.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    kept = re.search('data-found="([^"]*)"', done.stdout)
    assert kept, f"the page did not finish: {done.stderr[-2000:]}"
    told = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    found = json.loads(html.unescape(kept[1]))
    return Opened(**found | {"faults": found["faults"] + told})


def check_opened(page: Path, name: str, folder: Path) -> Opened:
    """Open a page and check what holds for every one: no fault, sorted columns, details of nodes, drawn figures."""
    found = opened(page, name, folder)
    assert found.faults == []
    assert found.tables, "the page has no table"
    for table in found.tables:
        for column in table:
            for direction, texts in column["orders"]:
                assert direction in ("ascending", "descending")
                values = [text for text in texts if text not in ("–", "")] if column["isText"] else numbers(texts)
                if not column["isText"]:
                    assert values == sorted(values, reverse=direction == "descending"), column
    for graph in found.graphs:
        assert graph["shown"] == [graph["names"][-1]]
    assert found.drawn == found.plots
    return found


def numbers(texts: list[str]) -> list[float]:
    found = [re.fullmatch(r"([-+−]?[\d,.]+(?:e[-+]?\d+)?) ?(\D*)", text) for text in texts]
    units = {"kB": 1e3, "MB": 1e6}
    return [float(m[1].replace(",", "").replace("−", "-")) * units.get(m[2], 1.0) for m in found if m]


class Elements(HTMLParser):
    """The elements of a page, whether they are closed in order, and the addresses in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.inside: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.inside == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]
        if tag not in ("img", "br", "meta"):
            self.inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.inside.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.inside and self.inside[-1] not in ("script", "style"):
            self.text.append(data)


def check_whole(text: str) -> Elements:
    """Check that a page is well formed and loads nothing; returns its elements."""
    found = Elements(text)
    assert all(address.startswith(("#", "data:image/")) for address in found.addresses)
    assert not {"link", "iframe", "object"} & set(found.tags)
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    return found
