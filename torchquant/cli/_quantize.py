"""`torchquant quantize`: words of the command line into a job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torchquant.runs.console import Terminal
from torchquant.runs.quantize import JobConfig, run_job


def run(model: str, options: dict[str, Any], out: Path, strict: bool = False) -> None:
    """Run, and print the summary. Raises ConfigError, MissingDependencyError."""
    terminal = Terminal()
    result = run_job(JobConfig(model, **options), out, terminal, strict)
    note = f"{result.n_sites} sites quantized, {result.n_left_float} places left float"
    terminal.table(f"torchquant quantize {model}", *result.table(), note)
    terminal.message(f"plan: {out / 'plan.yaml'}; results: {out / 'result.json'}")
