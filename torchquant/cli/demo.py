"""`torchquant demo`: the main job, end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from torchquant.runs.console import Terminal
from torchquant.runs.demo import DemoConfig, run_demo


def command(
    out: Annotated[Path, "Folder for the report, checkpoints, the ONNX file."] = Path("demo_out"),
    seed: Annotated[int, "Same seed, same numbers."] = 0,
    quick: Annotated[bool, "Train less: sooner done, lower accuracy."] = False,
) -> None:
    """Train, quantize in six ways, export and compare, on handwritten digits."""
    terminal = Terminal()
    result = run_demo(DemoConfig.preset(seed, quick), out, terminal)
    terminal.table("torchquant demo", *result.table())
    terminal.message(f"report: {out / 'report.html'}")
