"""`torchquant export`: the model of a run as a file that runs elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from torchquant.cli._options import Count
from torchquant.cli.certify import RUN, SAMPLES, show
from torchquant.runs.console import Terminal
from torchquant.runs.export import export_run


def command(
    run: Annotated[Path, RUN],
    to: Annotated[str, "onnx; packed: codes of their true width; integer: a report."] = "onnx",
    certify: Annotated[bool, "Compare every code with ONNX Runtime's."] = False,
    samples: Annotated[int, Count(SAMPLES)] = 256,
    out: Annotated[Path | None, "The file; otherwise one in the folder."] = None,
) -> bool:
    """Write the model of a run as a file that runs elsewhere."""
    terminal = Terminal()
    made = export_run(run, to, certify, samples, out)
    terminal.message(f"{made.form}: {made.path}, {made.bytes:,} bytes")
    if made.integer_accuracy is not None:
        terminal.message(
            f"accuracy of the integer reference on {made.samples} test images: {made.integer_accuracy:.2%}"
        )
    return made.certificate is None or show(terminal, made.certificate, made.path)
