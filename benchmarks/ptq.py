"""Post-training algorithms on real networks with real weights, beside rounding to nearest.

    python -m benchmarks.ptq

Writes docs/ptq_results.json after every cell, and the page docs/ptq_results.md from it.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import torchquant as tq
from benchmarks.command import parser
from benchmarks.real.networks import NETWORKS, run, sqnr
from benchmarks.real_networks import shortened
from benchmarks.results import write_atomically
from torchquant import ptq

OUT = Path("docs/ptq_results.json")
RULES = "w4a8"
RECIPES = (
    *(
        "nearest",
        "nearest,bias_correction",
        "gptq",
        "gptq:act_order",
        "gpfq",
        "qronos",
        "autoround",
        "adaround:steps=300",
    ),
    *("gptq:act_order,descent,bias_correction", "clip,gptq:act_order,descent,bias_correction"),
)


def cell(name: str, recipe: str, batches: int) -> dict[str, Any]:
    """The quality and cost of a recipe on a network."""
    network = shortened(NETWORKS[name](), batches)
    began = time.perf_counter()
    reference = run(network.model, network.test, network.judged)
    float_seconds = time.perf_counter() - began
    model = tq.quantize(network.model, RULES, network.calibration[0])
    tq.calibrate(model, network.calibration, with_targets=False, show_progress=False)
    stages = ptq.find_recipe(recipe).stages
    began = time.perf_counter()
    report = ptq.run(model, stages, network.calibration, with_targets=False, show_progress=False)
    seconds = time.perf_counter() - began
    return {
        "db": sqnr(reference, run(model, network.test, network.judged)),
        "seconds": round(seconds, 1),
        "float_seconds": round(float_seconds, 2),
        "layers": len({step.path for step in report.steps if step.path}),
        "undone": sum(step.note.startswith("undone") for step in report.steps),
        "notes": sorted({step.note.split(":")[0] for step in report.steps if step.note}),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def page(content: dict[str, Any]) -> str:
    """The page of the results."""
    names = list(content["cells"])
    lines = [
        "# Post-training algorithms on real networks",
        "",
        "Written by `python -m benchmarks.ptq` from `ptq_results.json`; do not edit it by hand. Networks and inputs",
        "are those of `benchmarks/real/networks.py`: real weights, calibrated on inputs that are not tested on.",
        "",
        f"`{content['command']}`, torch {content['torch']}, {content['threads']} threads. Plan: `{RULES}`. SQNR of the",
        "output against the float model in dB, and behind it the seconds of the run over those of a float pass over",
        "the test inputs.",
        "",
        "| stages | " + " | ".join(names) + " |",
        "|---|" + "---|" * len(names),
    ]
    for recipe in content["recipes"]:
        row = []
        for name in names:
            found = content["cells"][name].get(recipe, {})
            best = max((c["db"] for c in content["cells"][name].values() if "db" in c), default=None)
            shown = f"{found['db']:.1f}" if "db" in found else found.get("fails", "")
            bold = "**" if "db" in found and found["db"] == best else ""
            more = f", {found['seconds'] / max(found['float_seconds'], 1e-3):.0f}x" if "db" in found else ""
            row.append(f"{bold}{shown}{bold}{more}")
        lines.append(f"| `{recipe}` | " + " | ".join(row) + " |")
    undone = [
        f"{name}, `{recipe}`: {found['undone']} of {found['layers']} layers"
        for name, cells in content["cells"].items()
        for recipe, found in cells.items()
        if found.get("undone")
    ]
    if undone:
        lines += ["", "Undone, because the error of the layer was above that of rounding to nearest:", ""]
        lines += [f"- {line}" for line in undone]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write."""
    options = parser(__doc__ or "", threads=1, rounds=1, adapters=False)
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    options.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=["lite0", "pitch_small", "minilm"])
    options.add_argument("--recipes", nargs="+", default=list(RECIPES))
    options.add_argument("--batches", type=int, default=4, help="at most so many batches to calibrate and to test on")
    options.set_defaults(out=OUT)
    given = options.parse_args(argv)
    torch.set_num_threads(given.threads)
    warnings.simplefilter("ignore")
    cells: dict[str, dict[str, Any]] = {}
    words = f"python -m benchmarks.ptq --networks {' '.join(given.networks)} --batches {given.batches}"
    for name in given.networks:
        for recipe in given.recipes:
            try:
                found = cell(name, recipe, given.batches)
            except Exception as error:  # whatever a network raises
                found = {"fails": f"{type(error).__name__}: {str(error)[:100]}"}
            cells.setdefault(name, {})[recipe] = found
            print(name, recipe, found, flush=True)
            content = {"command": words, "torch": torch.__version__, "threads": given.threads}
            content |= {"recipes": given.recipes, "cells": cells}
            write_atomically(given.out, json.dumps(content, indent=1) + "\n")
            write_atomically(given.out.with_suffix(".md"), page(content))


if __name__ == "__main__":
    main()
