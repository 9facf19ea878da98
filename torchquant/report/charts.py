"""Make the common figures of plain numbers; each has the same numbers as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torchquant.report.parts import Cell, Figure, Table

GREY, RED = "#b8c4d6", "#d1495b"
MAX_NAMED = 24
"""Largest number of lines that have a legend."""
MAX_NUMBERED = 16
"""Largest number of columns of a heat map with a number in each cell."""
Points = Sequence[tuple[float, float | None]]
"""(x, y) of each point of a line."""


def lines(
    title: str,
    series: Mapping[str, Points],
    x: str = "",
    y: str = "",
    caption: str = "",
    limits: Mapping[str, float] | None = None,
    spreads: Mapping[str, Sequence[float]] | None = None,
    is_log: bool = False,
    highlight: str | None = None,
    height: int = 320,
) -> Figure:
    """Draw one line for each series, name -> (x, y) points; a y of None is a gap.

    `x`, `y`: names of the axes. `limits`: name -> height of a dashed level. `spreads`: name -> half the length of the
    bar at each point. `is_log`: logarithmic y axis. `highlight`: a series that is drawn thick.
    """
    data: list[dict[str, Any]] = []
    for name, points in series.items():
        trace: dict[str, Any] = {"type": "scatter", "mode": "lines+markers", "name": name, "marker": {"size": 5}}
        trace |= {"x": [p[0] for p in points], "y": [p[1] for p in points]}
        if spreads is not None:
            trace["error_y"] = {"type": "data", "array": list(spreads[name]), "thickness": 1}
        if name == highlight:
            trace["line"] = {"width": 4, "color": "#1d2733"}
        data.append(trace)
    xs = sorted({p[0] for points in series.values() for p in points})
    found = {name: dict(points) for name, points in series.items()}
    rows = [[at, *(by_x.get(at) for by_x in found.values())] for at in xs]
    levels = list((limits or {}).items())
    dashed = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "line": {"color": RED, "dash": "dash"}}
    shapes = [dashed | {"y0": level, "y1": level} for _, level in levels]
    note = {"xref": "paper", "x": 1, "xanchor": "right", "yanchor": "bottom", "showarrow": False}
    notes = [note | {"text": name, "y": math.log10(at) if is_log else at} for name, at in levels]  # plotly's exponents
    layout = {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}, "type": "log" if is_log else "linear"}}
    layout |= {"shapes": shapes, "annotations": notes, "showlegend": 1 < len(series) <= MAX_NAMED}
    if xs and all(float(at).is_integer() for at in xs):
        layout["xaxis"] |= {"tickformat": "d"} | ({"dtick": 1} if xs[-1] - xs[0] < 12 else {})  # type: ignore[operator]
    return Figure(title, data, layout, Table([x or "x", *series], rows), caption, height)


def bars(
    title: str,
    names: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    y: str = "",
    caption: str = "",
    is_log: bool = False,
    height: int = 320,
) -> Figure:
    """Draw a group of bars for each of `names`; `series`: name -> one height each, None for no bar."""
    data = [{"type": "bar", "name": name, "x": list(names), "y": list(heights)} for name, heights in series.items()]
    rows = [[name, *(heights[i] for heights in series.values())] for i, name in enumerate(names)]
    layout = {
        "yaxis": {"title": {"text": y}, "type": "log" if is_log else "linear"},
        "xaxis": {"type": "category", "tickangle": -40 if len(names) > 8 else 0, "automargin": True},
        "barmode": "group",
        "showlegend": len(series) > 1,
    }
    return Figure(title, data, layout, Table(["", *series], rows), caption, height)


def heatmap(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float]],
    caption: str = "",
    are_numbered: bool = True,
    limits: tuple[float, float] = (0.0, 1.0),
) -> Figure:
    """Draw one row of shades for each of `rows`; `are_numbered`: with its number in each cell if there is room."""
    trace: dict[str, Any] = {
        "type": "heatmap",
        "x": list(columns),
        "y": list(rows),
        "z": [list(line) for line in values],
        "zmin": limits[0],
        "zmax": limits[1],
        "colorscale": [[0, "#f2f6fa"], [0.5, "#8db4d9"], [1, "#1f5a93"]],
        "xgap": 1,
        "ygap": 1,
        "showscale": False,
    }
    if are_numbered and len(columns) <= MAX_NUMBERED:
        trace |= {"texttemplate": "%{z:.2f}", "textfont": {"size": 10}}
    layout = {
        "xaxis": {"type": "category", "side": "top", "automargin": True, "tickangle": -30},
        "yaxis": {"type": "category", "autorange": "reversed", "automargin": True},
    }
    table = Table(["", *columns], [[name, *line] for name, line in zip(rows, values, strict=True)])
    return Figure(title, [trace], layout, table, caption, 150 + 20 * len(rows))


def histogram(
    title: str,
    edges: Sequence[float],
    shares: Mapping[str, Sequence[float]],
    levels: Sequence[float] = (),
    x: str = "",
    caption: str = "",
    height: int = 240,
) -> Figure:
    """Draw the share of values in each bin between `edges`, name -> shares, and a mark at each level of a grid.

    The first series has wide grey bars, the others narrow red ones; the axis of the shares is logarithmic.
    """
    middles = [(a + b) / 2.0 for a, b in zip(edges, edges[1:], strict=False)]
    width = min((b - a for a, b in zip(edges, edges[1:], strict=False)), default=1.0)
    steps: list[dict[str, Any]] = []
    for i, (name, found) in enumerate(shares.items()):
        bar = {"type": "bar", "name": name, "x": middles, "y": [share or None for share in found]}
        steps.append(bar | {"width": width * (0.35 if i else 1.0), "marker": {"color": RED if i else GREY}})
    least = min((s for found in shares.values() for s in found if s > 0.0), default=1.0)
    if levels:
        marks = {"symbol": "line-ns-open", "size": 9, "color": "#1d2733"}
        at = {"x": list(levels), "y": [least / 2.0] * len(levels)}
        steps.append({"type": "scatter", "mode": "markers", "name": "levels", "marker": marks, "hoverinfo": "x"} | at)
    layout = {
        "xaxis": {"title": {"text": x}, "zeroline": False},
        "yaxis": {"type": "log", "title": {"text": "share"}, "range": [math.log10(least / 3.0), 0.1]},
        "barmode": "overlay",
        "bargap": 0,
    }
    kept = [i for i in range(len(middles)) if any(found[i] for found in shares.values())]
    rows: list[list[float | Cell]]
    rows = [[Cell(f"{edges[i]:.4g} to {edges[i + 1]:.4g}", edges[i]), *(f[i] for f in shares.values())] for i in kept]
    return Figure(title, steps, layout, Table(["values", *shares], rows), caption, height)
