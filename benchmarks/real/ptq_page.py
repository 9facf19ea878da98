"""The page of `benchmarks.ptq`: a table for each network and number of bits, and how the goals fare."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.real.ptq_ways import ADAROUND, AUTOROUND, GPTQ, NEAREST, SECTIONS, WAYS

Cells = Mapping[str, Mapping[str, Any]]
AGREEMENT = {
    "face": "pictures that both call a face or not",
    "lite0": "pictures with the same class",
    "pitch_small": "frames with the same pitch",
    "minilm": "sentences with the same nearest other one",
    "speaker": "utterances with the same nearest other one",
}
"""What agrees with the float model, by network."""
HEAD = """# Post-training algorithms on real networks

Written by `python -m benchmarks.ptq` from `ptq_results.json`; do not edit it by hand. Networks and inputs are those of
`benchmarks/real/networks.py`: real weights, calibrated on inputs that are not tested on. All tools get the same float
model and the same batches. The way to run it is in `benchmarks/README.md`.

- **dB**: SQNR of the output against the float model, on the test inputs. Bold: the best at these bits.
- **agrees**: how often the float model and the quantized one agree; see each network.
- **time**: seconds of one core for all of it, calibration included, over those of a float pass over the calibration
  inputs; in brackets those of the stages alone, for ours.
- **memory**: by how much the way raises the peak of the process over that of a float pass.
- **of weights**: the share of the multiplied weights that is quantized, where a tool leaves more of them float than
  the others of the table.
"""
LEARNED = (GPTQ, ADAROUND, AUTOROUND)
"""The algorithms that the goals are about."""


def page(content: Mapping[str, Any]) -> str:
    """Write the page of the results."""
    cells: dict[str, Cells] = content["cells"]
    lines = [
        HEAD,
        f"`{content['command']}`, {content['threads']} thread; fewer batches where a network says so.",
        ", ".join(f"{name} {version}" for name, version in content["versions"].items()) + ".",
        *_goals(content),
    ]
    for name, found in cells.items():
        facts = content["networks"][name]
        lines += ["", f"## {name}", "", _facts(facts, AGREEMENT.get(name, "inputs with the same largest output"))]
        for section, title in SECTIONS.items():
            lines += _table(title, {WAYS[way]: cell for way, cell in found.items() if WAYS[way].section == section})
    return "\n".join(lines) + "\n"


def _facts(facts: Mapping[str, Any], agreement: str) -> str:
    return (
        f"Agrees: {agreement}. Calibrated on {facts['batches']} batches, tested on {facts['test_batches']}.\n"
        f"A float pass over the former takes {facts['float_seconds']:.2f} s. The model, two of the largest sets of\n"
        f"values between layers, and three Gram matrices of {facts['largest_k']} inputs take {facts['budget_mb']} MB."
    )


def _table(title: str, found: Mapping[Any, Mapping[str, Any]]) -> list[str]:
    if not found:
        return []
    whole = 0.95 * max((cell["share"] for cell in found.values() if "db" in cell), default=0.0)
    best = max((cell["db"] for cell in found.values() if "db" in cell and cell["share"] >= whole), default=None)
    rows = [f"| {way.tool} | {way.algorithm} | {_shown(cell, best, whole)} |" for way, cell in found.items()]
    return [
        "",
        f"### {title}",
        "",
        "| tool | algorithm | dB | agrees | time | memory |",
        "|---|---|--:|--:|--:|--:|",
        *rows,
    ]


def _shown(cell: Mapping[str, Any], best: float | None, whole: float) -> str:
    if "db" not in cell:
        return f"{cell['fails']} | | |"
    text = f"**{cell['db']:.1f}**" if cell["db"] == best else f"{cell['db']:.1f}"
    if cell["share"] < whole:
        text += f" ({cell['share']:.0%} of weights)"
    floats = max(cell["float_seconds"], 1e-3)
    time = f"{cell['seconds'] / floats:.0f}x"
    time += f" ({cell['stage_seconds'] / floats:.0f}x)" if "stage_seconds" in cell else ""
    memory = f"{cell['peak_mb'] - cell['peak_before_mb']} MB"
    undone = f", {cell['undone']} of {cell['layers']} layers undone" if cell.get("undone") else ""
    return f"{text}{undone} | {cell['agrees']:.0%} | {time} | {memory}"


def _goals(content: Mapping[str, Any]) -> Iterator[str]:
    """Yield lines on the goals, each with its figures and whether it is met."""
    yield from ("", "## Goals", "", "| goal | network | figures | |", "|---|---|---|---|")
    for name, cells in content["cells"].items():
        db = {
            (WAYS[way].section, WAYS[way].tool, WAYS[way].algorithm): c["db"] for way, c in cells.items() if "db" in c
        }
        near = db.get(("w4a8", "ours", NEAREST))
        for algorithm in LEARNED:
            mine = db.get(("w4a8", "ours", algorithm))
            if mine is not None and near is not None:
                yield _goal(
                    "3 dB over rounding to nearest", name, f"{algorithm}: {mine - near:+.1f} dB", mine >= near + 3
                )
            theirs = db.get(("w4a8", "Brevitas", algorithm.partition(":")[0]))
            if mine is not None and theirs is not None:
                figures = f"{algorithm}: {mine:.1f}, Brevitas {theirs:.1f} dB"
                yield _goal("the best of the same algorithm", name, figures, mine >= theirs)
        yield from _of_8_bits(name, cells)
        yield from _of_cost(name, cells, content["networks"][name])
    yield ""
    yield content["remarks"].rstrip()


def _of_8_bits(name: str, cells: Cells) -> Iterator[str]:
    """Yield the line that compares our static rule sets with the other tools that quantize as many weights."""
    found = {WAYS[way]: cell for way, cell in cells.items() if WAYS[way].section == "w8a8" and "db" in cell}
    mine = {way: cell["db"] for way, cell in found.items() if way.algorithm in ("`w8a8`", "`w8a8-products`")}
    theirs = {way: cell["db"] for way, cell in found.items() if way.tool != "ours" and cell["share"] >= 0.95}
    if mine and theirs:
        own, other = (max(ways, key=lambda way: ways[way]) for ways in (mine, theirs))
        figures = f"{own.algorithm}: {mine[own]:.1f}, {other.tool} {other.algorithm}: {theirs[other]:.1f} dB"
        yield _goal("8 bits within 0.3 dB of the best", name, figures, mine[own] >= theirs[other] - 0.3)
    ours = next((db for way, db in mine.items() if way.algorithm == "`w8a8`"), None)
    other = next((db for way, db in theirs.items() if way.algorithm == "min-max"), None)
    if ours is not None and other is not None:
        figures = f"`w8a8`: {ours:.1f}, ORT min-max: {other:.1f} dB"
        yield _goal("8 bits, ranges by min-max, within 0.3 dB", name, figures, ours >= other - 0.3)


def _of_cost(name: str, cells: Cells, facts: Mapping[str, Any]) -> Iterator[str]:
    cell = cells.get(f"w4a8 | ours | {GPTQ}", {})
    if "db" not in cell:
        return
    seconds, allowed = cell["stage_seconds"], 2 * cell["float_seconds"] + 0.1 * cell["layers"]
    figures = f"{GPTQ}: {seconds:.1f} s, allowed {allowed:.1f} s"
    yield _goal("2 float passes and 0.1 s a layer", name, figures, seconds <= allowed)
    rise = cell["peak_mb"] - cell["peak_before_mb"]
    figures = f"{GPTQ}: {rise} MB, allowed {facts['budget_mb']} MB"
    yield _goal("model, two cuts, 3 K^2 of memory", name, figures, rise <= facts["budget_mb"])


def _goal(goal: str, network: str, figures: str, is_met: bool) -> str:
    return f"| {goal} | {network} | {figures} | {'met' if is_met else 'missed'} |"
