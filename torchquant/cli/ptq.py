"""`torchquant ptq`: post-training algorithms on any model, into a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from torchquant.ptq import PTQReport
from torchquant.runs.console import Terminal
from torchquant.runs.options import RunOptions
from torchquant.runs.ptq import PTQConfig, preview_ptq, run_ptq


def command(
    config: PTQConfig,
    options: RunOptions,
    out: Annotated[Path, "Folder for plan, steps, checkpoints, results; a stopped run resumes."] = Path("ptq_out"),
    dry_run: Annotated[bool, "Print units, steps, forward passes and bytes of the run, and do nothing."] = False,
    blocks: Annotated[bool, "Print the blocks of the model, and do nothing."] = False,
    strict: Annotated[bool, "Fail if more stays float than the rules ask."] = False,
) -> None:
    """Round a model after training: GPTQ, AdaRound and others; `torchquant algorithms` lists them."""
    terminal = Terminal()
    if dry_run or blocks:
        planned, found = preview_ptq(config, strict)
        terminal.message("\n\n".join(str(part) for part, is_asked in ((planned, dry_run), (found, blocks)) if is_asked))
        return
    result = run_ptq(config, out, terminal, strict, options)
    report = PTQReport.load(out / "steps")
    terminal.table(f"torchquant ptq {config.model}", *result.table(), f"{len(report.steps)} steps")
    terminal.message(
        f"steps: {out / 'steps' / 'steps.csv'}; results: {out / 'result.json'}; report: {out / 'report.html'}"
    )
