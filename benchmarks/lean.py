"""One training step at 8 bits: time, bytes saved for backward and peak memory, over the float model.

    python -m benchmarks.lean

Quantizers of every library are at the same sites, where `tq.quantize` puts them. Writes docs/lean.json after every cell
and, beside it, a picture of the ratios and one of the memory over a step. An interrupted run goes on with --resume.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import torchquant as tq
from benchmarks.adapters import ADAPTERS
from benchmarks.allocations import allocations
from benchmarks.command import alone, parser, start
from benchmarks.harness import BASELINE, CONTROL, Comparison, compare
from benchmarks.lean_pictures import draw
from benchmarks.models import MODELS, build_float
from benchmarks.qat_step import TrainingStep
from benchmarks.results import verdict, write_atomically
from benchmarks.saved_bytes import state_tensors
from torchquant._tables import text_table
from torchquant.utils import set_qmodule_state

OUT = Path("docs/lean.json")
MEASURES = ("bytes", "time")
POINTS = 120
"""Points of a memory curve that are kept."""


@dataclass(frozen=True)
class Way:
    """How the model is made: the quantizers of an adapter, and what is kept for backward. None: the float model."""

    adapter: str | None = None
    lean: bool = False
    recompute: bool = False


WAYS = {
    BASELINE: Way(),
    CONTROL: Way(),
    "plain": Way("torchquant"),
    "lean": Way("torchquant", lean=True),
    "lean, recomputed": Way("torchquant", lean=True, recompute=True),
    "Brevitas": Way("brevitas"),
    "torch.fake_quantize": Way("torch"),
}


@dataclass(frozen=True)
class Goal:
    """What is aimed at, over the float model: time, saved bytes of lean training, and of that with recomputation."""

    time: float
    saved: float | None = None
    recomputed: float | None = None

    def for_saved(self, way: str) -> float | None:
        """Return the goal of a way, None if it has none."""
        return self.recomputed if WAYS[way].recompute else self.saved if WAYS[way].lean else None


GOALS = {
    "resnet18": Goal(1.05, 0.7, 0.4),
    "mobilenet_v2": Goal(1.15, 0.45, 0.4),
    "efficientnet_b0": Goal(1.15, 0.75, 0.4),
    "vit_b_16": Goal(1.10, 0.75, 0.4),
    "bert": Goal(1.10),
}


def step_of(name: str, way: Way, batch: int, size: int) -> TrainingStep:
    """Make a step that has been run, so that ranges exist."""
    net = build_float(name, size)
    inputs, labels = MODELS[name].batch(batch, size)
    if way.adapter is not None:
        adapter = ADAPTERS[way.adapter]
        acts = adapter.acts_quantizer
        rules = [{"weight": adapter.weight_quantizer, "input": acts, "output": acts}]
        net = tq.quantize(net, rules, inputs[:2], inplace=True)
        set_qmodule_state(net, tq.QModuleState.QUANT_AWARE_TRAIN)
        tq.set_lean(net, way.lean, recompute=way.recompute)
    step = TrainingStep(net, inputs, labels)
    step()
    return step


def bytes_of(name: str, way: Way, batch: int, size: int) -> dict[str, Any]:
    """Count the saved bytes and the peak of a step beyond parameters, buffers, momentum and the batch."""
    step = step_of(name, way, batch, size)
    saved = step.saved_bytes()
    step.optimizer.zero_grad()
    gc.collect()
    allocated = allocations(step)
    return {
        "saved": saved,
        "peak": allocated.peak,
        "state": sum(tensor.nbytes for tensor in state_tensors(step.model)),
        "curve": [held >> 10 for held in allocated.sampled(POINTS)],
        "note": step.void_because(),
    }


def times_of(name: str, ways: Sequence[str], batch: int, size: int, rounds: int) -> dict[str, Any]:
    """Measure the seconds of a core that a step takes, all ways in turns."""
    steps = {way: step_of(name, WAYS[way], batch, size) for way in ways}
    base, control = steps.pop(BASELINE), steps.pop(CONTROL)
    comparison = compare(base, dict(steps), rounds, control, clock=time.process_time)
    return {"seconds": dict(comparison.seconds), "notes": {way: step.void_because() for way, step in steps.items()}}


def cells_of(name: str, size: str, options: argparse.Namespace) -> dict[str, Callable[[], dict[str, Any]]]:
    """List the cells of a network at a size: name -> what measures it."""
    batch, pixels = read_size(size)
    cells: dict[str, Callable[[], dict[str, Any]]] = {}
    if "bytes" in options.measure:
        cells |= {way: partial(bytes_of, name, WAYS[way], batch, pixels) for way in options.ways}
    if "time" in options.measure:
        cells["time"] = partial(times_of, name, options.ways, batch, pixels, options.rounds)
    return cells


def is_done(cell: dict[str, Any] | None) -> bool:
    """Tell whether a cell need not be measured; one that failed, or whose control did, is measured again."""
    if cell is None or "fails" in cell:
        return False
    return "seconds" not in cell or Comparison(cell["seconds"]).is_valid


def table(cells: dict[str, Any]) -> str:
    """Format the ratios to the float model, with the goals."""
    rows = []
    for name, sizes in cells.items():
        for size, found in sizes.items():
            for way in (way for way in WAYS if way in {*found, *_seconds(found)} and way != BASELINE):
                rows.append([name, size, way, *_ratios(name, way, found)])
    return text_table(["network", "size", "", "time", "goal", "saved", "goal", "peak", ""], rows)


def _seconds(found: dict[str, Any]) -> dict[str, list[float]]:
    return found.get("time", {}).get("seconds", {})


def _ratios(name: str, way: str, found: dict[str, Any]) -> list[str]:
    cell, base, goal = found.get(way, {}), found.get(BASELINE, {}), GOALS[name]
    shown = ["", "", "", "", ""]
    if way in _seconds(found):
        comparison = Comparison(found["time"]["seconds"])
        ratio, is_ours = comparison.ratio(way).median, way != CONTROL and WAYS[way].adapter == "torchquant"
        shown[:2] = f"{ratio:.2f}", verdict(ratio, goal.time if is_ours else None, comparison.is_valid)
    if "saved" in cell and "saved" in base:
        saved = cell["saved"] / base["saved"]
        shown[2:] = f"{saved:.3f}", verdict(saved, goal.for_saved(way), True), f"{cell['peak'] / base['peak']:.3f}"
    return [*shown, cell.get("fails", "") or cell.get("note", "")]


def read_size(text: str) -> tuple[int, int]:
    """Read "8x96": the batch, and pixels a side or tokens. Raises ValueError."""
    batch, _, size = text.partition("x")
    return int(batch), int(size)


def _size(text: str) -> str:
    read_size(text)
    return text


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    options = parser(__doc__ or "", threads=1, rounds=9, adapters=False)
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    options.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), metavar="NAME")
    options.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), metavar="NAME")
    options.add_argument(
        "--sizes", nargs="+", type=_size, default=["8x96", "32x128"], help="batch x pixels a side, or tokens"
    )
    options.add_argument("--measure", nargs="+", choices=MEASURES, default=list(MEASURES), help="%(default)s")
    options.add_argument("--resume", action="store_true", help="keep the cells that --out holds")
    options.set_defaults(out=OUT)
    given = options.parse_args(argv)
    if given.out.suffix != ".json":
        options.error(f"--out must end in .json, got '{given.out}'")
    given.ways = list(dict.fromkeys([BASELINE, CONTROL, *given.ways]))
    return given


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write; return 1 if a control failed."""
    options = arguments(argv)
    report = start("lean", "", "", options)
    content: dict[str, Any] = {"runs": [], "cells": {}}
    if options.resume and options.out.exists():
        content = json.loads(options.out.read_text())
    content["runs"].append({"command": report.command, "machine": report.machine})
    warnings.simplefilter("ignore")  # of the other libraries, and of what stays float
    for name in options.models:
        for size in options.sizes:
            held = content["cells"].setdefault(name, {}).setdefault(size, {})
            for cell, measure in cells_of(name, size, options).items():
                if not is_done(held.get(cell)):
                    held[cell] = alone(measure)
                    write_atomically(options.out, json.dumps(content) + "\n")
                    print(name, size, cell, held[cell].get("fails", ""), flush=True)
    print(table(content["cells"]))
    draw(content["cells"], options.out)
    times = [found["time"] for sizes in content["cells"].values() for found in sizes.values() if "time" in found]
    return 0 if all(map(is_done, times)) else 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    raise SystemExit(main())
