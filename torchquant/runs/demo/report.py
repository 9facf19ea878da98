"""Write the report of a run as one self-contained HTML file."""

from __future__ import annotations

import math
from typing import Any

from torchquant.analysis import LayerError, SiteError
from torchquant.errors import require
from torchquant.runs.demo.figures import histograms, sqnr_bars
from torchquant.runs.demo.results import DemoResult

HISTOGRAMS = (
    ("w8a8-ptq", "weight"),
    ("w8a8-ptq", "output"),
    ("w4a4-qat", "weight"),
    ("w4a4-qat", "output"),
    ("esb-qat", "weight"),
    ("ternary-qat", "weight"),
)
"""Schemes that are drawn layer by layer, and at which slot. The first two are open, the others collapsed."""


def render_report(result: DemoResult) -> str:
    """Return the HTML of the report; it needs no network and no other file. Raises MissingDependencyError."""
    jinja2 = require("jinja2", "report")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("torchquant.runs.demo", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    titles = {row.name: row.title for row in result.rows}
    header, rows, note = result.table()
    return environment.get_template("report.html.j2").render(
        result=result,
        header=header,
        parity=[result.onnx.certificate.summary(), result.onnx.certificate.outputs_table()],
        rows=rows,
        note=note,
        titles=[titles[name] for name in result.layers],
        sqnr_tables={site: _sqnr_table(result.layers, site) for site in ("weight", "output")},
        sqnr_pictures={site: sqnr_bars(result.layers, titles, site) for site in ("weight", "output")},
        histograms=[
            {"title": titles[name], "site": site, "picture": histograms(result.layers[name], site)}
            for name, site in HISTOGRAMS
        ],
    )


def _sqnr_table(layers: dict[str, list[LayerError]], site: str) -> list[dict[str, Any]]:
    """Make one row per layer with that slot: its path and a text for each scheme."""
    columns = [
        {layer.path: error for layer in errors if (error := getattr(layer, site)) is not None}
        for errors in layers.values()
    ]
    return [{"path": path, "cells": [_cell(column.get(path)) for column in columns]} for path in columns[0]]


def _cell(error: SiteError | None) -> str:
    if error is None:
        return "float"
    return f"{error.sqnr_db:.1f}" if math.isfinite(error.sqnr_db) else "exact"
