"""A directed graph as a part of a page: laid out, coloured by a number of each node, with details on a click."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torchquant._shown import shown
from torchquant.errors import ConfigError
from torchquant.report.html import Html, element, with_code
from torchquant.report.layout import lay_out
from torchquant.report.parts import Part, Rendering, rendered, words_of

WIDTH, HEIGHT = 168, 36
"""Size of a node in pixels."""
GAP_X, GAP_Y = 18, 24
MOST_LETTERS = 26
SCALE = ((231, 138, 132), (250, 240, 215), (139, 184, 219))
"""Colors of the worst, the middle and the best number, pale enough for dark text."""
NO_COLOR = "#eef1f4"


@dataclass(frozen=True)
class Node:
    """A node of a graph.

    `name`: what edges call it, unique in its graph. `value`: the number that colours it, None for no colour. `text`:
    the second line of the node, else the value. `details`: parts that are shown when the node is clicked; those of the
    node with the worst value are shown at first.
    """

    name: str
    value: float | None = None
    text: str = ""
    details: Sequence[Part] = field(default=(), repr=False)


@dataclass(frozen=True)
class Graph:
    """Nodes and edges, (from, to) by name, drawn from top to bottom; it is scrolled, and zoomed by its buttons.

    `value_name`: what the numbers of the nodes are, for the legend. `is_low_good`: low numbers are blue, high ones red;
    else the other way round. `limits`: the numbers with the outermost colours, None for the smallest and the largest.
    Without JavaScript the details of all nodes follow as a list. Raises ConfigError for an edge of an unknown node and
    for two nodes of one name.
    """

    nodes: Sequence[Node]
    edges: Sequence[tuple[str, str]]
    value_name: str = ""
    caption: str = ""
    is_low_good: bool = False
    limits: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        names = {node.name for node in self.nodes}
        if len(names) != len(self.nodes):
            twice = next(name for i, name in enumerate(n.name for n in self.nodes) if name in self._names()[:i])
            raise ConfigError(f"the nodes of a graph have different names, got {shown(twice)} twice")
        if unknown := [name for edge in self.edges for name in edge if name not in names]:
            raise ConfigError(f"an edge leads to {shown(unknown[0])}, which is no node of the graph")

    def _names(self) -> list[str]:
        return [node.name for node in self.nodes]

    def render(self, rendering: Rendering) -> Html:
        """Return the drawing, the legend, and the details of every node."""
        rendering.n_graphs += 1
        prefix = f"graph{rendering.n_graphs}"
        low, high = self._limits()
        details = [
            element(
                "section",
                element("h4", node.name),
                rendered(node.details, rendering) if node.details else element("p", "Nothing more is known of it."),
                id=f"{prefix}-{i}",
                class_="node-details",
            )
            for i, node in enumerate(self.nodes)
        ]
        buttons = [
            element("button", sign, type="button", data_zoom=factor, title=title)
            for sign, factor, title in (("+", 1.25, "larger"), ("−", 0.8, "smaller"), ("1:1", 0, "original size"))
        ]
        legend = [
            element("span", self.value_name),
            element("span", words_of(low)),
            element("span", class_="scale", style=f"background:linear-gradient(90deg,{self._gradient()})"),
            element("span", words_of(high)),
        ]
        known = [element("div", *legend, class_="legend")] if math.isfinite(low) else []
        hint = element("p", "Click a node of the graph to see its details here.", class_="hint note")
        caption = [element("figcaption", with_code(self.caption))] if self.caption else []
        return element(
            "figure",
            *caption,
            element("div", *known, element("div", *buttons, class_="zoom"), class_="bar"),
            element(
                "div",
                element("div", self._drawing(prefix, low, high), class_="canvas", tabindex="0"),
                element("div", hint, *details, class_="panel"),
                class_="split",
            ),
            class_="graph",
            data_first=self._first(prefix),
        )

    def _first(self, prefix: str) -> str | None:
        """Return the id of the node whose details are shown at first: the one with the worst number."""
        known = [(node.value, i) for i, node in enumerate(self.nodes) if node.details and node.value is not None]
        found = [(value, i) for value, i in known if not math.isnan(value)]
        return f"{prefix}-{(max if self.is_low_good else min)(found)[1]}" if found else None

    def _drawing(self, prefix: str, low: float, high: float) -> Html:
        index = {name: i for i, name in enumerate(self._names())}
        pairs = list(dict.fromkeys((index[a], index[b]) for a, b in self.edges if a != b))
        layout = lay_out(len(self.nodes), pairs)
        nodes = [(x, float(y)) for x, y in zip(layout.x, layout.y, strict=True)]
        every = [point for route in [nodes, *layout.routes] for point in route]
        left = min((x for x, _ in every), default=0.0)

        def at(x: float, y: float) -> tuple[float, float]:
            return (x - left + 0.5) * (WIDTH + GAP_X), (y + 0.5) * (HEIGHT + GAP_Y)

        width, height = at(max((x for x, _ in every), default=0.0) + 0.5, max(layout.y, default=0) + 0.5)
        paths = [
            element("path", d=_curve([at(*point) for point in route]), marker_end=f"url(#{prefix}-arrow)")
            for route in layout.routes
        ]
        boxes = [self._box(node, f"{prefix}-{i}", at(*nodes[i]), low, high) for i, node in enumerate(self.nodes)]
        tip = element("path", d="M0 0L8 4L0 8z", class_="tip")
        marker = element(
            "marker", tip, id=f"{prefix}-arrow", viewBox="0 0 8 8", refX=8, refY=4, markerWidth=6, markerHeight=6,
            orient="auto",
        )  # fmt: skip
        size = {"viewBox": f"0 0 {width:.0f} {height:.0f}", "width": f"{width:.0f}", "height": f"{height:.0f}"}
        return element("svg", element("defs", marker), *paths, *boxes, role="img", **size)

    def _box(self, node: Node, key: str, center: tuple[float, float], low: float, high: float) -> Html:
        """Draw a node, which is a link to its details."""
        x, y = center
        name = node.name if len(node.name) <= MOST_LETTERS else f"…{node.name[1 - MOST_LETTERS :]}"
        second = node.text or ("" if node.value is None else words_of(node.value))
        color = NO_COLOR if node.value is None or math.isnan(node.value) else self._color(node.value, low, high)
        corner = {"x": f"{x - WIDTH / 2:.1f}", "y": f"{y - HEIGHT / 2:.1f}"}
        lines = [element("text", name, x=f"{x:.1f}", y=f"{y + (-3 if second else 4):.1f}")]
        lines += [element("text", second, x=f"{x:.1f}", y=f"{y + 12:.1f}", class_="value")] if second else []
        rect = element("rect", width=WIDTH, height=HEIGHT, rx=6, fill=color, **corner)
        return element("a", element("title", f"{node.name}  {second}"), rect, *lines, href=f"#{key}", class_="node")

    def _limits(self) -> tuple[float, float]:
        if self.limits is not None:
            return self.limits
        found = [node.value for node in self.nodes if node.value is not None and math.isfinite(node.value)]
        return (min(found), max(found)) if found else (math.nan, math.nan)

    def _color(self, value: float, low: float, high: float) -> str:
        if math.isinf(value) or not high > low:
            share = 1.0 if value >= high else 0.0
        else:
            share = min(max((value - low) / (high - low), 0.0), 1.0)
        return _mixed(1.0 - share if self.is_low_good else share)

    def _gradient(self) -> str:
        return ",".join(_mixed(1.0 - share if self.is_low_good else share) for share in (0.0, 0.5, 1.0))


def _mixed(share: float) -> str:
    """Return the color at a share of the scale, 0 the worst and 1 the best.

    >>> _mixed(0.0), _mixed(0.5)
    ('#e78a84', '#faf0d7')
    """
    start, end, part = (*SCALE[:2], 2.0 * share) if share < 0.5 else (*SCALE[1:], 2.0 * share - 1.0)
    return "#" + "".join(f"{round(a + (b - a) * part):02x}" for a, b in zip(start, end, strict=True))


def _curve(route: Sequence[tuple[float, float]]) -> str:
    """Return the path through the points of an edge, from the border of its first node to that of its last."""
    down = 1.0 if route[-1][1] >= route[0][1] else -1.0
    points = list(route)
    points[0] = (points[0][0], points[0][1] + down * HEIGHT / 2.0)
    points[-1] = (points[-1][0], points[-1][1] - down * HEIGHT / 2.0)
    words = [f"M{points[0][0]:.1f} {points[0][1]:.1f}"]
    for (a, b), (c, d) in zip(points, points[1:], strict=False):
        middle = (b + d) / 2.0
        words.append(f"C{a:.1f} {middle:.1f} {c:.1f} {middle:.1f} {c:.1f} {d:.1f}")
    return "".join(words)
