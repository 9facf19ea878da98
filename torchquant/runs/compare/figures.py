"""Draw the picture of a leaderboard, as PNG in a data URI."""

from __future__ import annotations

import numpy as np

from torchquant._figures import data_uri, new_figure
from torchquant.errors import require


def accuracy_over_bits(points: list[tuple[str, int, float, float]]) -> str:
    """Draw accuracy over weight bits, one line per scheme. `points`: scheme, bits, accuracy 0..1, its spread or NaN."""
    figure = new_figure(10.5, 4.6)
    figure.subplots_adjust(0.07, 0.12, 0.76, 0.96)
    axes = figure.add_subplot()
    schemes = list(dict.fromkeys(scheme for scheme, *_ in points))
    colors = require("matplotlib", "report").colormaps["turbo"](np.linspace(0.05, 0.95, len(schemes)))
    for i, scheme in enumerate(schemes):
        bits, means, spreads = np.array(sorted(p[1:] for p in points if p[0] == scheme)).T
        shift = (i - (len(schemes) - 1) / 2) * 0.3 / len(schemes)  # so that equal accuracies do not hide each other
        axes.errorbar(
            bits + shift,
            100 * means,
            100 * np.nan_to_num(spreads),
            color=colors[i],
            marker="o",
            markersize=4,
            linewidth=1.2,
            capsize=2,
            label=scheme,
        )
    axes.set_xticks(sorted({p[1] for p in points}))
    axes.set_xlabel("weight bits", fontsize=9)
    axes.set_ylabel("accuracy, %", fontsize=9)
    axes.grid(axis="y", linewidth=0.4)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return data_uri(figure)
