"""Draw the pictures of a search report, as PNG in data URIs, with matplotlib and without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from torchquant._figures import data_uri, new_figure
from torchquant.errors import require
from torchquant.search.budget import Budget
from torchquant.search.settings import EpochRecord

MOST_NAMED = 24
"""Largest number of lines that have their names beside them."""
MOST_NUMBERS = 16
"""Largest number of columns of a heat map that has numbers."""
INK, ACCENT = "#1d2733", "#d1495b"


def heatmap(
    points: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float]], numbers: bool = True
) -> str:
    """Draw one row per search point, one column per scheme, `values` 0..1 as shades and, with room, as numbers."""
    height = 1.5 + 0.24 * len(points)
    figure = new_figure(min(12.5, 3.6 + 0.9 * len(columns)), height)
    axes = figure.add_subplot()
    axes.imshow(np.array(values), cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
    axes.set_yticks(range(len(points)), points, fontsize=7)
    axes.set_xticks(range(len(columns)), columns, rotation=35, ha="left", fontsize=7)
    axes.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=2)
    if numbers and len(columns) <= MOST_NUMBERS:
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                color = "white" if value > 0.6 else INK
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=6, color=color)
    figure.tight_layout()
    return data_uri(figure)


def bit_widths(history: Sequence[EpochRecord], budgets: Sequence[Budget]) -> str:
    """Draw learned widths over the epochs, one line per point; the mean in bold, a budget of bits as a dashed line."""
    told = {name for record in history for name, cost in record.costs.items() if cost}
    sides = [(side, what) for side, what in (("bits", "weights"), ("act_bits", "activations")) if side in told]
    figure = new_figure(12.0, 4.2)
    for i, (measure, what) in enumerate(sides):
        axes = figure.add_subplot(1, len(sides), i + 1)
        names = [name for name in history[0].widths if name.endswith(".weight") == (what == "weights")]
        colors = require("matplotlib", "report").colormaps["viridis"](np.linspace(0.0, 0.92, max(len(names), 1)))
        epochs = [record.epoch for record in history]
        for name, color in zip(names, colors, strict=False):
            drawn = [record.widths[name] for record in history]
            axes.plot(epochs, drawn, color=color, linewidth=1.0, marker=".", markersize=4, label=name)
        drawn = [record.costs[measure] for record in history]
        axes.plot(epochs, drawn, color=INK, linewidth=2.4, marker="o", markersize=4, label="mean")
        _limit(axes, budgets, measure)
        _finish(axes, f"bits of the {what}")
        if len(names) <= MOST_NAMED:
            axes.legend(fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.tight_layout()
    return data_uri(figure)


def losses(history: Sequence[EpochRecord]) -> str:
    """Draw both losses, and the entropy of the schemes' shares, over the epochs."""
    figure = new_figure(12.0, 3.4)
    epochs = [record.epoch for record in history]
    axes = figure.add_subplot(1, 2, 1)
    axes.plot(epochs, [r.loss for r in history], color=INK, marker=".", label="weights' batches")
    told = [r for r in history if r.arch_loss is not None]
    axes.plot([r.epoch for r in told], [r.arch_loss for r in told], color=ACCENT, marker=".", label="search's batches")
    _finish(axes, "loss")
    axes.legend(fontsize=8, frameon=False)
    axes = figure.add_subplot(1, 2, 2)
    axes.plot(epochs, [r.entropy for r in history], color=INK, marker=".")
    axes.set_ylim(-0.03, 1.03)
    _finish(axes, "entropy: 1 undecided, 0 decided")
    figure.tight_layout()
    return data_uri(figure)


def costs(history: Sequence[EpochRecord], budgets: Sequence[Budget]) -> str:
    """Draw the expected cost over the epochs for each measure with a budget, and the budget; by default, bytes."""
    measures = list(dict.fromkeys(budget.measure for budget in budgets)) or ["bytes"]
    figure = new_figure(12.0, 3.2)
    for i, measure in enumerate(measures):
        axes = figure.add_subplot(1, len(measures), i + 1)
        axes.plot([r.epoch for r in history], [r.costs[measure] for r in history], color=INK, marker=".")
        _limit(axes, budgets, measure)
        _finish(axes, f"{measure}, expected")
    figure.tight_layout()
    return data_uri(figure)


def pareto_front(front: Mapping[str, Any], chosen: tuple[float, float] | None = None) -> str:
    """Draw predicted degradation over cost from `Pareto.to_dict`, with the chosen (cost, degradation) in red."""
    figure = new_figure(8.0, 3.8)
    axes = figure.add_subplot()
    drawn = [(point["cost"], point["predicted"]) for point in front["points"]]
    axes.plot(*zip(*drawn, strict=True), color=INK, marker="o", markersize=4, linewidth=1.2)
    if chosen is not None:
        axes.plot(*chosen, color=ACCENT, marker="D", markersize=7)
    axes.set_xlabel(front["measure"], fontsize=9)
    axes.set_yscale("log" if min(degradation for _, degradation in drawn) > 0.0 else "linear")
    _finish(axes, front["harm"], is_over_epochs=False)
    figure.tight_layout()
    return data_uri(figure)


def _limit(axes: Any, budgets: Sequence[Budget], measure: str) -> None:
    for budget in budgets:
        if budget.measure == measure:
            axes.axhline(budget.limit, color=ACCENT, linestyle="--", linewidth=1.2, label="budget")


def _finish(axes: Any, name: str, is_over_epochs: bool = True) -> None:
    axes.set_ylabel(name, fontsize=9)
    if is_over_epochs:
        axes.set_xlabel("epoch", fontsize=9)
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y", linewidth=0.4)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
