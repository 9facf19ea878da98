"""`torchquant demo`: run the whole workflow on handwritten digits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from torchquant.cli._options import Only
from torchquant.runs.console import Terminal
from torchquant.runs.demo import DemoConfig, run_demo
from torchquant.runs.options import RunOptions

TAKEN = ("device", "amp", "compile", "workers")
"""Options that the demo takes; it computes on one thread, and always starts anew."""


def command(
    options: Annotated[RunOptions, Only(lambda entry: entry.name in TAKEN)],
    out: Annotated[Path, "Folder for the report, the checkpoints and the ONNX file."] = Path("demo_out"),
    seed: Annotated[int, "Random seed; the same seed gives the same numbers."] = 0,
    quick: Annotated[bool, "Train for fewer epochs: faster, with lower accuracy."] = False,
) -> None:
    """Train, quantize with six schemes, export and compare, on handwritten digits."""
    terminal = Terminal()
    result = run_demo(DemoConfig.preset(seed, quick), out, terminal, options)
    terminal.table("torchquant demo", *result.table())
    terminal.message(f"report: {out / 'report.html'}")
