"""`torchquant search`: words of the command line into a search, or a study of searches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torchquant.runs.console import NullProgress, Terminal
from torchquant.runs.ranks import is_first_of_environment
from torchquant.runs.search import SearchConfig, run_search, run_study


def run(kind: str, model: str, options: dict[str, Any], out: Path, device: str | None, distributed: bool) -> None:
    """Run, and print the summary. Raises ConfigError, MissingDependencyError."""
    terminal = Terminal() if is_first_of_environment() or not distributed else NullProgress()
    result = run_search(SearchConfig(kind, model, **options), out, terminal, distributed, device)
    header, rows, note = result.table()
    terminal.table(f"torchquant search {kind} {model}", header, rows, "")
    terminal.message(note)
    terminal.message(f"plan: {out / 'plan.yaml'}; report: {out / 'report.html'}")


def study(
    kind: str, model: str, options: dict[str, Any], out: Path, trials: int, storage: str | None, name: str
) -> None:
    """Run the trials that are missing, and print all, the best one first. Raises ConfigError."""
    terminal = Terminal()
    result = run_study(SearchConfig(kind, model, **options), out, trials, storage, name, terminal)
    terminal.table(f"study {name}", *result.table())
    terminal.message(f"the best run: {result.best.folder}; all: {out / 'study.json'}")
