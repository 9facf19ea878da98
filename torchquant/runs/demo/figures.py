"""Draw the pictures of the report, as PNG in data URIs, with matplotlib and without a display."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from torchquant._figures import data_uri, new_figure
from torchquant.analysis import LayerError, SiteError
from torchquant.errors import require

COLUMNS = 5
REAL_COLOR = "#b8c4d6"
QUANTIZED_COLOR = "#d1495b"
MAX_DISTINCT = 40
"""Largest number of distinct quantized values that are drawn as single lines instead of a histogram."""


def histograms(layers: list[LayerError], site: str) -> str:
    """Draw one small histogram per layer, float filled and quantized in red; `site` is "weight" or "output"."""
    found = [(layer.path, error) for layer in layers if (error := getattr(layer, site)) is not None]
    n_rows = math.ceil(len(found) / COLUMNS)
    height = 1.65 * n_rows
    figure = new_figure(2.5 * COLUMNS, height)
    figure.subplots_adjust(0.01, 0.25 / height, 0.99, 1 - 0.25 / height, wspace=0.06, hspace=0.5)
    for i, (path, error) in enumerate(found):
        axes = figure.add_subplot(n_rows, COLUMNS, i + 1)
        _histogram(axes, error)
        axes.set_title(f"{path}  {_decibel(error.sqnr_db)}", fontsize=8)
    return data_uri(figure)


def _histogram(axes: Any, error: SiteError) -> None:
    real, quantized = error.real.numpy(), error.quantized.numpy()
    edges = np.histogram_bin_edges(np.concatenate([real, quantized]), bins=60)
    axes.stairs(np.histogram(real, edges)[0] / len(real), edges, fill=True, color=REAL_COLOR)
    levels, counts = np.unique(quantized, return_counts=True)
    if len(levels) <= MAX_DISTINCT:
        axes.vlines(levels, 0, counts / len(quantized), color=QUANTIZED_COLOR, linewidth=1.2)
    else:
        axes.stairs(np.histogram(quantized, edges)[0] / len(quantized), edges, color=QUANTIZED_COLOR, linewidth=0.9)
    axes.set_yscale("log", subs=[])
    axes.set_ylim(bottom=0.5 / len(real))
    axes.yaxis.set_visible(False)
    axes.locator_params(axis="x", nbins=4)
    axes.tick_params(labelsize=6, length=2)
    axes.spines[["top", "right", "left"]].set_visible(False)


def sqnr_bars(layers: dict[str, list[LayerError]], titles: dict[str, str], site: str) -> str:
    """Draw the SQNR of every layer in dB, one bar per scheme."""
    figure = new_figure(12.5, 3.4)
    figure.subplots_adjust(0.05, 0.3, 0.995, 0.9)
    axes = figure.add_subplot()
    paths = [layer.path for layer in next(iter(layers.values())) if getattr(layer, site) is not None]
    colors = require("matplotlib", "report").colormaps["viridis"](np.linspace(0.05, 0.92, len(layers)))
    width = 0.84 / len(layers)
    for i, (name, errors) in enumerate(layers.items()):
        heights = [error.sqnr_db for layer in errors if (error := getattr(layer, site)) is not None]
        finite = [h if math.isfinite(h) else 0.0 for h in heights]
        axes.bar(np.arange(len(paths)) + (i - (len(layers) - 1) / 2) * width, finite, width, color=colors[i])
        axes.plot([], [], color=colors[i], linewidth=6, label=titles[name])
    axes.set_xticks(np.arange(len(paths)), paths, rotation=35, ha="right", fontsize=8)
    axes.set_ylabel(f"SQNR of the {site}, dB", fontsize=9)
    axes.margins(x=0.01)
    axes.grid(axis="y", linewidth=0.4)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, ncols=len(layers), loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    return data_uri(figure)


def _decibel(value: float) -> str:
    return f"{value:.1f} dB" if math.isfinite(value) else "exact"
