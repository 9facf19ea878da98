"""The section of a report about what a monitor saw while a model was trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torchquant.report import Details, Figure, Part, Section, Table, Text, lines
from torchquant.training import Look, read_looks, series

FILE = "monitor.csv"
MOST_LINES = 12
"""How many weights of the largest oscillation have a line of their own."""
Curves = Mapping[str, Sequence[tuple[float, float]]]
FIGURES: Sequence[tuple[str, str, Mapping[str, str], str]] = (
    (
        "Codes of weights that change",
        "share of weights",
        {"changed since the look before": "weight/flips", "turned back (oscillation)": "weight/oscillation"},
        "Weights that go to and fro between two levels do not learn; `dampening_loss` damps them.",
    ),
    (
        "Clipped values",
        "share of values",
        {
            **{"weights, below": "weight/below", "weights, above": "weight/above"},
            **{"activations, below": "activation/below", "activations, above": "activation/above"},
        },
        "Values beyond the lowest and the highest level.",
    ),
    (
        "Lowest SQNR of a quantizer",
        "dB",
        {"weights": "weight/lowest_sqnr", "activations": "activation/lowest_sqnr"},
        "Each quantizer alone: what it reads against what it returns.",
    ),
    (
        "Drift of scales",
        "relative change",
        {"weights": "weight/scale_drift", "activations": "activation/scale_drift"},
        "Mean relative change of the distance of levels since the look before.",
    ),
    (
        "Distance of weights to their thresholds",
        "steps",
        {"mean": "weight/distance"},
        "0.25 for uniform weights, 0.5 for weights on their levels.",
    ),
)
"""Title, name of the axis, name of a line -> figure of the monitor, and what the figure says."""
COLUMNS = {
    **{"sqnr": "SQNR, dB", "oscillation": "oscillation", "flips": "changed", "flipped_more": "changed 3 times or more"},
    **{"distance": "distance", "below": "clipped below", "above": "clipped above", "dead_codes": "unused codes"},
    **{"scale": "step", "scale_drift": "drift of the step", "scale_gradient": "gradient of the step"},
}
"""Figure of a monitor -> column of the table of the last look."""


def watched_sections(folder: Path) -> list[Section]:
    """Return the section about the monitor of a run, if its folder has the file that it wrote."""
    return curve_sections(read_looks(folder / FILE)) if (folder / FILE).exists() else []


def curve_sections(looks: Sequence[Look]) -> list[Section]:
    """Return the section with the curves of the looks of a monitor, and a table of the last one; none without looks.

    >>> curve_sections([])
    []
    """
    if not looks:
        return []
    curves = series(looks)
    words = f"{len(looks)} looks, the last one after step {looks[-1].step:,}, at a sample of each tensor."
    parts: list[Part] = [Text(words, is_note=True)]
    given = {name: curve for name, curve in curves.items() if "/" not in name}
    parts += [lines(f"{name} of a batch", {name: curve}, "step", name) for name, curve in given.items()]
    for title, axis, names, about in FIGURES:
        found = {words: curves[name] for words, name in names.items() if name in curves}
        parts += [lines(title, found, "step", axis, about)] if found else []
    parts += _oscillating(curves)
    return [Section("What the training did to the quantizers", [*parts, _last(looks[-1])])]


def _oscillating(curves: Curves) -> list[Figure]:
    """Return the curves of the weights that oscillate most, if any does."""
    each = {name: curve for name, curve in curves.items() if name.count("/") == 2 and name.endswith("/oscillation")}
    means = {name: sum(number for _, number in curve) / len(curve) for name, curve in each.items()}
    worst = [name for name in sorted(means, key=means.__getitem__, reverse=True)[:MOST_LINES] if means[name] > 0.0]
    found = {name.removesuffix("/oscillation"): each[name] for name in worst}
    title = f"Oscillation of the {len(found)} weights with the most of it"
    return [lines(title, found, "step", "share of weights")] if found else []


def _last(look: Look) -> Details:
    """Return the table of every quantizer at the last look, folded away."""
    places: dict[str, dict[str, float | None]] = {}
    for name, number in look.numbers.items():
        place, _, figure = name.rpartition("/")
        if "/" in place:
            places.setdefault(place, {})[figure] = number
    columns = {name: title for name, title in COLUMNS.items() if any(name in found for found in places.values())}
    rows = [[place, *(found.get(name) for name in columns)] for place, found in places.items()]
    return Details(f"Every quantizer after step {look.step:,}", [Table(["quantizer", *columns.values()], rows)])
