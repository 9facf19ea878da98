"""Open a page in a headless Chromium, use it as a reader does, and say what happened."""

from __future__ import annotations

import base64
import json
import os
import re
import select
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
"""The browser; tests that take the fixture `browser` are skipped without one."""
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--mute-audio", "--window-size=1400,1000"),
    *("--remote-debugging-pipe", "--disable-dev-shm-usage"),
)
LAUNCH = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
os.dup2(ends[0], 3), os.dup2(ends[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
"""Starts a browser that reads commands from file descriptor 3 and writes to 4."""
USE = """(async () => {
  const wait = () => new Promise(done => setTimeout(done, 20));
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
      shown: shown.map(one => one.querySelector("h4").textContent), text: shown.map(one => one.textContent).join(" "),
    });
  }
  const plots = [...document.querySelectorAll(".plot")].filter(plot => plot.checkVisibility());
  for (const plot of plots) {
    plot.scrollIntoView();
    for (let i = 0; i < 2500 && plot.dataset.drawn === undefined && !plot.hidden; i++) await wait();
  }
  found.plots = plots.length;
  found.drawn = plots.filter(plot => plot.querySelector(".main-svg")).length;
  window.scrollTo(0, 0);
  return found;
})()"""


@dataclass(frozen=True)
class Opened:
    """What a reader saw: `faults` of the console; `tables`, `graphs`, number of visible `plots` and of drawn ones."""

    faults: list[str]
    tables: list[list[dict[str, Any]]]
    graphs: list[dict[str, Any]]
    plots: int
    drawn: int


class Browser:
    """A headless Chromium, driven by the messages of its DevTools protocol through a pipe."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        read, to_browser = os.pipe()
        from_browser, write = os.pipe()
        command = [sys.executable, "-c", LAUNCH, str(read), str(write), str(CHROMIUM), *FLAGS]
        with (folder / "chromium.txt").open("wb") as log:
            command += [f"--user-data-dir={folder / 'chromium'}", "about:blank"]
            self.process = subprocess.Popen(command, pass_fds=(read, write), stderr=log)
        for end in (read, write):
            os.close(end)
        self.sent, self.received = os.fdopen(to_browser, "wb", 0), os.fdopen(from_browser, "rb", 0)
        self.number, self.rest, self.session = 0, b"", ""
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *error: object) -> None:
        self.sent.close()
        self.received.close()
        self.process.terminate()
        self.process.wait(30)

    @contextmanager
    def tab(self, page: Path) -> Iterator[None]:
        """Load a page in a new tab, to which commands go while the context lasts."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.events.clear()
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call("Page.navigate", url=page.absolute().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self.next())
        try:
            yield
        finally:
            self.session = ""
            self.call("Target.closeTarget", targetId=target)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and return its result; what the browser tells meanwhile is kept in `events`."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        self.sent.write(json.dumps(message | ({"sessionId": self.session} if self.session else {})).encode() + b"\0")
        while True:
            told = self.next()
            if told.get("id") == self.number:
                assert "error" not in told, told
                return told["result"]
            self.events.append(told)

    def next(self) -> dict[str, Any]:
        """Return the next message of the browser."""
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.received], [], [], 180.0)
            assert ready, "the browser has said nothing for three minutes"
            more = os.read(self.received.fileno(), 1 << 20)
            assert more, "the browser has ended"
            self.rest += more
        first, _, self.rest = self.rest.partition(b"\0")
        return json.loads(first)

    def faults(self) -> list[str]:
        """What the console shows in red: exceptions, errors that scripts log, and addresses that did not load."""
        found = []
        for event in self.events:
            params = event.get("params", {})
            if event.get("method") == "Runtime.exceptionThrown":
                details = params["exceptionDetails"]
                found.append(details.get("exception", {}).get("description") or details["text"])
            elif event.get("method") == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
                found.append(" ".join(str(word.get("value", word.get("description"))) for word in params["args"]))
            elif event.get("method") == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                found.append(params["entry"]["text"])
        return found


def opened(browser: Browser, page: Path, name: str) -> Opened:
    """Open a page and use it; a screenshot of all of it is `name`.png in $TORCHQUANT_ARTEFACTS, or beside the page."""
    artefacts = Path(os.environ.get("TORCHQUANT_ARTEFACTS", page.parent))
    artefacts.mkdir(parents=True, exist_ok=True)
    with browser.tab(page):
        told = browser.call("Runtime.evaluate", expression=USE, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in told, told
        size = browser.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], 8000), "scale": 1}
        picture = browser.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        (artefacts / f"{name}.png").write_bytes(base64.b64decode(picture["data"]))
        return Opened(**told["result"]["value"], faults=browser.faults())


def check_opened(browser: Browser, page: Path, name: str) -> Opened:
    """Open a page and check what holds for every one: no fault, sorted columns, details of nodes, drawn figures."""
    found = opened(browser, page, name)
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
        self.ids: list[str] = []
        self.inside: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.inside == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]
        self.ids += [value or "" for name, value in attrs if name == "id"]
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
    assert len(set(found.ids)) == len(found.ids)
    assert all(address.startswith(("#", "data:image/")) for address in found.addresses)
    assert not {"link", "iframe", "object"} & set(found.tags)
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    return found
