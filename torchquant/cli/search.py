"""`torchquant search`: search schemes or bit widths, or run a study of many searches."""

from dataclasses import Field
from pathlib import Path
from typing import Annotated, Any

from torchquant.cli._options import Only
from torchquant.runs.console import NullProgress, Terminal
from torchquant.runs.options import RunOptions
from torchquant.runs.ranks import is_first_of_environment
from torchquant.runs.search import SearchConfig, run_search, run_study
from torchquant.runs.search.settings import KINDS_OF
from torchquant.runs.search.study import SPACES

ABOUT = "Choose quantizers layer by layer, within a budget of bytes, bits or bit operations."
Out = Annotated[Path, "Folder for plan, checkpoints and report; a stopped run resumes."]
Distributed = Annotated[bool, "Run as one of several processes; start them with torchrun."]
OUT = Path("search_out")


def _of(kind: str) -> Only:
    """Select the settings of one kind of search."""
    return Only(lambda entry: kind in entry.metadata.get(KINDS_OF, (kind,)), {"kind": kind})


def qss(
    config: Annotated[SearchConfig, _of("qss")], options: RunOptions, out: Out = OUT, distributed: Distributed = False
) -> None:
    """Search a scheme for each layer, by gradient."""
    _run(config, options, out, distributed)


def qpl(
    config: Annotated[SearchConfig, _of("qpl")], options: RunOptions, out: Out = OUT, distributed: Distributed = False
) -> None:
    """Learn a bit width for each layer, by gradient."""
    _run(config, options, out, distributed)


def allocate(config: Annotated[SearchConfig, _of("allocate")], options: RunOptions, out: Out = OUT) -> None:
    """Allocate bits to each layer by sensitivity, for the least degradation."""
    _run(config, options, out, distributed=False)


def _run(config: SearchConfig, options: RunOptions, out: Path, distributed: bool) -> None:
    terminal = Terminal() if is_first_of_environment() or not distributed else NullProgress()
    header, rows, note = run_search(config, out, terminal, distributed, options).table()
    terminal.table(f"torchquant search {config.kind} {config.model}", header, rows, "")
    terminal.message(note)
    terminal.message(f"plan: {out / 'plan.yaml'}; report: {out / 'report.html'}")


def _is_studied(entry: Field[Any]) -> bool:
    """Tell whether all trials of a study share the setting."""
    return set(SPACES) <= set(entry.metadata.get(KINDS_OF, SPACES)) and not any(
        entry.name in s for s in SPACES.values()
    )


def study(
    config: Annotated[SearchConfig, Only(_is_studied)],
    options: Annotated[RunOptions, Only(lambda entry: entry.name != "force")],
    trials: Annotated[int, "Total number of finished trials, of all machines together."] = 20,
    storage: Annotated[str | None, "A URL, or a journal file; default: study.db in the folder."] = None,
    name: Annotated[str, "Name of the study in the storage."] = "search",
    out: Out = OUT,
) -> None:
    """Run many searches with settings that Optuna proposes; several machines can join."""
    terminal = Terminal()
    result = run_study(config, out, trials, storage, name, terminal, options)
    terminal.table(f"study {name}", *result.table())
    terminal.message(f"best run: {result.best.folder}; all runs: {out / 'study.json'}")


COMMANDS = (qss, qpl, allocate, study)
