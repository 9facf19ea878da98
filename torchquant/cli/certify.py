"""`torchquant certify`: prove that an exported file computes what the model of a run computes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from torchquant.cli._options import Count
from torchquant.deploy import Certificate
from torchquant.runs.console import Terminal
from torchquant.runs.export import certify_run

RUN = "Folder of a finished run of `torchquant quantize`, `ptq` or `search`."
SAMPLES = "Number of test images to compare on."


def command(
    run: Annotated[Path, RUN],
    onnx: Annotated[Path | None, "The ONNX file; default: model.onnx in the folder."] = None,
    samples: Annotated[int, Count(SAMPLES)] = 256,
) -> bool:
    """Prove that an exported file computes what the model computes; exit status 1 if it does not."""
    return show(Terminal(), certify_run(run, onnx, samples), run if onnx is None else onnx)


def show(terminal: Terminal, certificate: Certificate, path: Path) -> bool:
    """Show a certificate and the place of its files; return whether it passed."""
    terminal.table("parity: codes", *certificate.summary(), "")
    terminal.table("parity: outputs", *certificate.outputs_table(), "")
    for reason in (*certificate.failures, *certificate.incomplete):
        terminal.message(reason)
    where = path if path.is_dir() else path.parent
    terminal.message(f"parity certificate: {certificate.verdict}; {where / 'certificate.json'}, certificate.txt")
    terminal.message("; ".join(f"{c.way}: {c.share} compared" for c in certificate.comparisons))
    return certificate.passed
