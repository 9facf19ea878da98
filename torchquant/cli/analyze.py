"""`torchquant analyze`: which layer hurts, why, and what to do about it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from torchquant.runs.analyze import AnalyzeConfig, run_analysis
from torchquant.runs.console import Terminal
from torchquant.runs.options import RunOptions

MOST_ROWS = 12


def command(
    config: AnalyzeConfig,
    options: RunOptions,
    out: Annotated[Path, "Folder for the report, tables and advice; a stopped run resumes."] = Path("analysis_out"),
) -> None:
    """Find the layers that quantization hurts, say why, and try remedies."""
    terminal = Terminal()
    found = run_analysis(config, out, terminal, options)
    analysis, advice = found.analysis, found.advice
    terminal.message(f"{analysis.samples} images; everything quantized: {', '.join(analysis.summary())}")
    terminal.table(f"torchquant analyze {config.target}", *analysis.worst_table(MOST_ROWS))
    if advice is not None:
        terminal.message(f"\n{advice}")
    if config.apply:
        plan = out / "advised_plan.yaml"
        terminal.message(f"plan: {plan}; use it with torchquant quantize MODEL --rules {plan}")
    terminal.message(f"report: {out / 'report.html'}")
