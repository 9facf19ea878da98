"""`torchquant compare`: train every scheme with the same recipe and write the leaderboard."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from torchquant.runs.compare import Recipe, compare, leaderboard, load_plugin, make_cases, write_leaderboard
from torchquant.runs.compare.board import HEADER, cells
from torchquant.runs.console import Terminal
from torchquant.runs.options import RunOptions
from torchquant.runs.settings import split_list, widths, words_of

TERMINAL_COLUMNS = 7
"""Columns that fit on a terminal; the files have all of them."""


def command(
    recipe: Recipe,
    options: RunOptions,
    schemes: Annotated[str, "Names of schemes, separated by commas, or all."] = "all",
    bits: Annotated[str, "Weight bits, such as 4, 2,3,4 or 2-8."] = "2,3,4,8",
    acts: Annotated[str, "Activation bits, such as 8 or 2-8."] = "8",
    seeds: Annotated[int, "Number of runs of each case, with seeds 0, 1, ..."] = 3,
    jobs: Annotated[int, "Number of parallel processes."] = 1,
    plugin: Annotated[list[Path] | None, "A Python file that registers your own quantizers."] = None,
    out: Annotated[Path, "Folder for runs and leaderboard; a stopped run resumes."] = Path("compare_out"),
) -> None:
    """Train every scheme with the same recipe and write a leaderboard."""
    plugins = plugin or []
    for file in plugins:
        load_plugin(file)
    names = split_list(schemes)
    cases = make_cases(names, widths("bits", bits), widths("acts", acts), seeds)
    terminal = Terminal()
    rows = leaderboard(compare(cases, recipe, out, jobs, plugins, terminal, options))
    words = ["torchquant compare", f"--schemes {','.join(names)}", f"--bits {bits}", f"--acts {acts}"]
    words += [f"--seeds {seeds}", *words_of(recipe), *(f"--plugin {file}" for file in plugins)]
    write_leaderboard(rows, recipe, " ".join(words), out)
    narrow = slice(0, TERMINAL_COLUMNS)
    shown = [cells(row)[narrow] for row in rows]
    terminal.table("leaderboard", list(HEADER[narrow]), shown, "mean over the seeds, +- standard deviation")
    terminal.message(f"leaderboard: {out / 'leaderboard.html'}")
