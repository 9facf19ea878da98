"""`torchquant compare`: words of the command line into a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchquant.errors import ConfigError
from torchquant.runs.compare import Recipe, compare, leaderboard, load_plugin, make_cases, write_leaderboard
from torchquant.runs.compare.board import HEADER, cells
from torchquant.runs.console import Terminal

TERMINAL_COLUMNS = 7
"""Those that fit on a terminal; the files have all."""


def run(
    schemes: Sequence[str],
    bits: str,
    acts: str,
    seeds: int,
    recipe: dict[str, Any],
    jobs: int,
    plugins: Sequence[Path],
    out: Path,
) -> None:
    """Run, print the leaderboard, write it. Raises ConfigError, UnknownNameError."""
    for plugin in plugins:
        load_plugin(plugin)
    cases = make_cases(schemes, whole_numbers("bits", bits), whole_numbers("acts", acts), seeds)
    made = Recipe(**recipe)
    terminal = Terminal()
    rows = leaderboard(compare(cases, made, out, jobs, plugins, terminal))
    flags = [f"--schemes {','.join(schemes)}", f"--bits {bits}", f"--acts {acts}", f"--seeds {seeds}"]
    flags += [f"--{name.replace('_', '-')} {value}" for name, value in recipe.items()]
    flags += [f"--plugin {plugin}" for plugin in plugins]
    write_leaderboard(rows, made, " ".join(["torchquant compare", *flags]), out)
    narrow = slice(0, TERMINAL_COLUMNS)
    shown = [cells(row)[narrow] for row in rows]
    terminal.table("leaderboard", list(HEADER[narrow]), shown, "mean over the seeds, +- standard deviation")
    terminal.message(f"leaderboard: {out / 'leaderboard.html'}")


def whole_numbers(name: str, text: str) -> list[int]:
    """Whole numbers with commas between them. Raises ConfigError."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--{name} takes whole numbers with commas, such as 2,4,8; got {text!r}") from None
