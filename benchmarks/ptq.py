"""Post-training algorithms on real networks with real weights, beside rounding to nearest and Brevitas.

    python -m benchmarks.ptq

Writes docs/ptq_results.json after every cell, and the page docs/ptq_results.md from it. An interrupted run goes on
with --resume. Each cell is measured in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import torchquant as tq
from benchmarks.command import parser
from benchmarks.real.networks import NETWORKS, Real, run, sqnr
from benchmarks.real.peers import brevitas
from benchmarks.real_networks import shortened
from benchmarks.results import write_atomically
from torchquant import ptq

OUT = Path("docs/ptq_results.json")
SHOWN = ("lite0", "face", "pitch_small", "minilm")
CLASSIFIERS = ("lite0", "pitch_small")
"""Networks whose largest output is a class."""
PLAIN, PEER = "w4a8 ", "brevitas "
WAYS = (
    *("w8a8 nearest", "w4a8-minmax nearest", "w4a8 nearest", "w4a8 nearest,bias_correction"),
    *("w4a8-minmax gptq:act_order", "w4a8 gptq:act_order", "w4a8 adaround", "w4a8 autoround"),
    "w4a8 gptq:act_order,descent,bias_correction",
    *(f"{PEER}{algorithm}" for algorithm in brevitas.ALGORITHMS),
)
"""A plan and the stages, or an algorithm of Brevitas."""
Made = tuple[nn.Module, dict[str, Any]]


def ours(network: Real, way: str) -> Made:
    """The network by a plan and stages, in one core's seconds."""
    rules, _, stages = way.partition(" ")
    model = tq.quantize(network.model, rules, network.calibration[0])
    tq.calibrate(model, network.calibration, with_targets=False, show_progress=False)
    began = time.process_time()
    found = ptq.find_recipe(stages).stages
    report = ptq.run(model, found, network.calibration, with_targets=False, show_progress=False)
    seconds = time.process_time() - began
    return model, {
        "seconds": seconds,
        "layers": len({step.path for step in report.steps if step.path}),
        "undone": sum(step.note.startswith("undone") for step in report.steps),
    }


def theirs(network: Real, way: str) -> Made:
    began = time.process_time()
    model = brevitas.rounded(network, way.removeprefix(PEER))
    return model, {"seconds": time.process_time() - began}


def cell(network: Real, name: str, way: str) -> dict[str, Any]:
    """The quality and the cost of a way on a network; seconds are those of one core."""
    began = time.process_time()
    reference = run(network.model, network.test, network.judged)
    float_seconds, before = time.process_time() - began, _peak_mb()
    model, found = (theirs if way.startswith(PEER) else ours)(network, way)
    found |= {"float_seconds": float_seconds, "peak_mb": _peak_mb(), "peak_before_mb": before}
    output = run(model, network.test, network.judged)
    found["db"] = sqnr(reference, output)
    if name in CLASSIFIERS:
        found["top1"] = float((reference.argmax(-1) == output.argmax(-1)).double().mean())
    return {key: round(value, 3) if isinstance(value, float) else value for key, value in found.items()}


def _peak_mb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def alone(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What is measured in a forked process, so that no cell holds the memory of another; or what stopped it."""
    forked = multiprocessing.get_context("fork")
    receives, sends = forked.Pipe(duplex=False)
    process = forked.Process(target=lambda: sends.send(_attempted(measure)))
    process.start()
    sends.close()
    try:
        found: dict[str, Any] = receives.recv()
    except EOFError:
        found = {"fails": "the process was killed"}
    process.join()
    return found


def _attempted(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return measure()
    except Exception as error:  # whatever a network or another tool raises
        return {"fails": f"{type(error).__name__}: {str(error)[:100]}"}


def page(content: dict[str, Any]) -> str:
    """The page of the results."""
    names = list(content["cells"])
    lines = [
        "# Post-training algorithms on real networks",
        "",
        "Written by `python -m benchmarks.ptq` from `ptq_results.json`; do not edit it by hand. Networks and inputs",
        "are those of `benchmarks/real/networks.py`: real weights, calibrated on inputs that are not tested on.",
        "",
        f"`{content['command']}`, torch {content['torch']}, {content['threads']} threads. SQNR of the output against",
        "the float model in dB; in brackets how often a classifier names the class that the float model names; then",
        "the seconds of the run over those of a float pass over as many inputs, and by how much it raises the peak of",
        "the memory. `w4a8` takes scales of least squared error, `w4a8-minmax` those of the largest weight; both, and",
        "the algorithms, keep the first and the last layer in 8 bits. Brevitas: `layerwise_quantize`, 4 bits a channel",
        "with scales of least squared error, 8 bits of what each layer reads, the first and the last layer float.",
        "",
        "| way | " + " | ".join(names) + " |",
        "|---|" + "---|" * len(names),
    ]
    ways = dict.fromkeys(way for cells in content["cells"].values() for way in cells)
    for way in ways:
        lines.append(f"| `{way}` | " + " | ".join(_shown(content["cells"][name], way) for name in names) + " |")
    lines += _gains(content["cells"]) + _undone(content["cells"])
    return "\n".join(lines) + "\n"


def _shown(cells: dict[str, Any], way: str) -> str:
    found = cells.get(way, {})
    if "db" not in found:
        return str(found.get("fails", ""))
    best = max((c["db"] for w, c in cells.items() if "db" in c and not w.startswith("w8")), default=None)
    text = f"**{found['db']:.1f}**" if found["db"] == best else f"{found['db']:.1f}"
    text += f" ({found['top1']:.0%})" if "top1" in found else ""
    rise = found["peak_mb"] - found["peak_before_mb"]
    return f"{text}, {found['seconds'] / max(found['float_seconds'], 1e-3):.0f}x, +{rise} MB"


def _gains(cells: dict[str, Any]) -> list[str]:
    """Lines on what each algorithm gains over rounding to nearest on the same scales and on those of minmax."""
    wanted = {way.removeprefix(PLAIN): way for found in cells.values() for way in found if way.startswith(PLAIN)}
    lines = ["", "Gain over rounding to nearest on the same scales, and on those of the largest weight, in dB:", ""]
    for name, found in cells.items():
        near = [found.get(f"{rules} nearest", {}).get("db") for rules in ("w4a8", "w4a8-minmax")]
        gains = [
            f"{short} " + " / ".join("-" if base is None else f"{found[way]['db'] - base:+.1f}" for base in near)
            for short, way in wanted.items()
            if short.partition(":")[0] in ("gptq", "adaround", "autoround") and "db" in found.get(way, {})
        ]
        lines.append(f"- {name}: {', '.join(gains)}")
    return lines


def _undone(cells: dict[str, Any]) -> list[str]:
    found = [
        f"- {name}, `{way}`: {cell['undone']} of {cell['layers']} layers"
        for name, ways in cells.items()
        for way, cell in ways.items()
        if cell.get("undone")
    ]
    head = ["", "Undone, because the error of the layer was above that of rounding to nearest:", ""]
    return [*head, *found] if found else []


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write."""
    options = parser(__doc__ or "", threads=1, rounds=1, adapters=False)
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    options.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(SHOWN))
    options.add_argument("--ways", nargs="+", default=list(WAYS), help="plans with stages, and algorithms of Brevitas")
    options.add_argument("--batches", type=int, default=4, help="at most so many batches to calibrate and to test on")
    options.add_argument("--resume", action="store_true", help="keep the cells that --out holds")
    options.set_defaults(out=OUT)
    given = options.parse_args(argv)
    torch.set_num_threads(given.threads)
    warnings.simplefilter("ignore")
    is_resumed = given.resume and given.out.exists()
    cells: dict[str, dict[str, Any]] = json.loads(given.out.read_text())["cells"] if is_resumed else {}
    words = f"python -m benchmarks.ptq --batches {given.batches}"
    for name in given.networks:
        network = None
        for way in given.ways:
            if "db" in cells.get(name, {}).get(way, {}):
                continue
            network = network or shortened(NETWORKS[name](), given.batches)
            cells.setdefault(name, {})[way] = alone(partial(cell, network, name, way))
            print(name, way, cells[name][way], flush=True)
            content = {"command": words, "torch": torch.__version__, "threads": given.threads, "cells": cells}
            write_atomically(given.out, json.dumps(content, indent=1) + "\n")
            write_atomically(given.out.with_suffix(".md"), page(content))


if __name__ == "__main__":
    main()
