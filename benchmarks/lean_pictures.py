"""The pictures of `benchmarks.lean`: ratios to the float model as bars, and the memory over a step as curves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness import BASELINE, Comparison
from torchquant._figures import new_figure
from torchquant._files import write_whole

COLOURS = {
    BASELINE: "#555555",
    "plain": "#9ecae1",
    "lean": "#2171b5",
    "lean, recomputed": "#08306b",
    "Brevitas": "#fdae6b",
    "torch.fake_quantize": "#bdbdbd",
}
CURVES = (BASELINE, "plain", "lean", "lean, recomputed")
MEASURES = {"saved": "bytes saved for backward", "peak": "peak memory of a step", "time": "time of a step"}
Cells = Mapping[str, Mapping[str, Mapping[str, Any]]]


def draw(cells: Cells, out: Path) -> list[Path]:
    """Draw the pictures of what is measured, beside the JSON file; return their paths."""
    figures = {"": bars(cells), "_memory": curves(cells)}
    return [
        write_whole(
            out.with_name(f"{out.stem}{end}.png"),
            lambda temporary, figure=figure: figure.savefig(temporary, format="png", dpi=100),
        )
        for end, figure in figures.items()
    ]


def ratio_of(found: Mapping[str, Any], way: str, measure: str) -> float | None:
    """Return a measure of a way over that of the float model, None if it is not there or its control failed."""
    if measure == "time":
        seconds = found.get("time", {}).get("seconds", {})
        compared = Comparison(seconds)
        return compared.ratio(way).median if way in seconds and compared.is_valid else None
    held, base = (found.get(name, {}).get(measure) for name in (way, BASELINE))
    return None if held is None or base is None else held / base


def bars(cells: Cells) -> Any:
    """Draw a panel for each measure and size."""
    sizes = _sizes(cells)
    figure = new_figure(6.5 * len(sizes), 9.0, layout="constrained")
    panels = figure.subplots(len(MEASURES), len(sizes), squeeze=False)
    ways = [way for way in COLOURS if way != BASELINE]
    width = 0.8 / len(ways)
    for row, (measure, title) in zip(panels, MEASURES.items(), strict=True):
        for axes, size in zip(row, sizes, strict=True):
            for i, way in enumerate(ways):
                found = [ratio_of(cells[name].get(size, {}), way, measure) for name in cells]
                places = [x + (i - (len(ways) - 1) / 2) * width for x in range(len(cells))]
                axes.bar(places, [value or 0 for value in found], width, color=COLOURS[way], label=way)
            axes.axhline(1, color=COLOURS[BASELINE], linewidth=1)
            axes.set_xticks(range(len(cells)), list(cells), fontsize=8)
            axes.set_title(f"{title}, over float, {_said(size)}", fontsize=9)
    panels[0][0].legend(fontsize=8)
    return figure


def curves(cells: Cells) -> Any:
    """Draw a panel for each network at its largest size: megabytes over the share of the step's time."""
    figure = new_figure(4.2 * len(cells), 3.4, layout="constrained")
    panels = figure.subplots(1, len(cells), squeeze=False)[0]
    for axes, (name, sizes) in zip(panels, cells.items(), strict=True):
        size = max(sizes, key=lambda text: [int(part) for part in text.split("x")])
        for way in CURVES:
            curve = sizes[size].get(way, {}).get("curve")
            if curve:
                shares = [i / (len(curve) - 1) for i in range(len(curve))]
                axes.plot(shares, [kib / 1024 for kib in curve], color=COLOURS[way], label=way)
        axes.set_title(f"{name}, {_said(size)}", fontsize=9)
        axes.set_xlabel("share of the step", fontsize=8)
    panels[0].set_ylabel("MiB allocated", fontsize=8)
    panels[0].legend(["float" if way == BASELINE else way for way in CURVES], fontsize=8)
    return figure


def _sizes(cells: Cells) -> list[str]:
    return list(dict.fromkeys(size for sizes in cells.values() for size in sizes))


def _said(size: str) -> str:
    batch, _, pixels = size.partition("x")
    return f"batch {batch}, {pixels} px"
