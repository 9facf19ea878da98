"""`torchquant export`: write the model of a run as a file for other runtimes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from torchquant.cli._options import Count
from torchquant.cli.certify import RUN, SAMPLES, show
from torchquant.runs.console import Terminal
from torchquant.runs.export import export_run


def command(
    run: Annotated[Path, RUN],
    to: Annotated[str, "onnx; packed: codes at their true width; integer: a report."] = "onnx",
    certify: Annotated[bool, "Compare every code with ONNX Runtime."] = False,
    samples: Annotated[int, Count(SAMPLES)] = 256,
    out: Annotated[Path | None, "The file to write; default: a file in the folder."] = None,
) -> bool:
    """Write the model of a run as a file for other runtimes."""
    terminal = Terminal()
    made = export_run(run, to, certify, samples, out)
    terminal.message(f"{made.form}: {made.path}, {made.bytes:,} bytes")
    if made.integer_accuracy is not None:
        terminal.message(
            f"accuracy of the integer reference on {made.samples} test images: {made.integer_accuracy:.2%}"
        )
    return made.certificate is None or show(terminal, made.certificate, made.path)
