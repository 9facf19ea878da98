"""Train every scheme with the same recipe and tabulate the results: `torchquant compare`. Needs the extra `demo`."""

from torchquant.runs.compare.board import Row as Row
from torchquant.runs.compare.board import leaderboard as leaderboard
from torchquant.runs.compare.board import markdown as markdown
from torchquant.runs.compare.board import read_leaderboard as read_leaderboard
from torchquant.runs.compare.board import write_leaderboard as write_leaderboard
from torchquant.runs.compare.run import CaseResult as CaseResult
from torchquant.runs.compare.run import compare as compare
from torchquant.runs.compare.run import load_plugin as load_plugin
from torchquant.runs.compare.settings import Case as Case
from torchquant.runs.compare.settings import Recipe as Recipe
from torchquant.runs.compare.settings import make_cases as make_cases

__all__ = [
    "Case",
    "CaseResult",
    "Recipe",
    "Row",
    "compare",
    "leaderboard",
    "load_plugin",
    "make_cases",
    "markdown",
    "read_leaderboard",
    "write_leaderboard",
]
