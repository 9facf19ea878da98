"""`torchquant quantize`: quantize any model and write it into a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from torchquant.runs.console import Terminal
from torchquant.runs.options import RunOptions
from torchquant.runs.quantize import JobConfig, run_job


def command(
    config: JobConfig,
    options: RunOptions,
    out: Annotated[Path, "Folder for plan, checkpoints and results; a stopped run resumes."] = Path("quantize_out"),
    strict: Annotated[bool, "Fail if more stays float than the rules ask for."] = False,
) -> None:
    """Quantize any model: plan, calibrate, train, evaluate."""
    terminal = Terminal()
    result = run_job(config, out, terminal, strict, options)
    note = f"sites quantized: {result.n_sites}; places left float: {result.n_left_float}"
    terminal.table(f"torchquant quantize {config.model}", *result.table(), note)
    terminal.message(f"plan: {out / 'plan.yaml'}; results: {out / 'result.json'}; report: {out / 'report.html'}")
