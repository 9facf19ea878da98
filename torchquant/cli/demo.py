"""`torchquant demo`: run the whole workflow on handwritten digits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from torchquant.runs.console import Terminal
from torchquant.runs.demo import DemoConfig, run_demo


def command(
    out: Annotated[Path, "Folder for the report, the checkpoints and the ONNX file."] = Path("demo_out"),
    seed: Annotated[int, "Random seed; the same seed gives the same numbers."] = 0,
    quick: Annotated[bool, "Train for fewer epochs: faster, with lower accuracy."] = False,
) -> None:
    """Train, quantize with six schemes, export and compare, on handwritten digits."""
    terminal = Terminal()
    result = run_demo(DemoConfig.preset(seed, quick), out, terminal)
    terminal.table("torchquant demo", *result.table())
    terminal.message(f"report: {out / 'report.html'}")
