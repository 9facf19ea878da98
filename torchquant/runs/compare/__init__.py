"""Every scheme in the same recipe, and the table that comes out: `torchquant compare`. Needs the extra `demo`."""

from torchquant.compare.leaderboard import Row as Row
from torchquant.compare.leaderboard import leaderboard as leaderboard
from torchquant.compare.leaderboard import markdown as markdown
from torchquant.compare.leaderboard import read_leaderboard as read_leaderboard
from torchquant.compare.leaderboard import write_leaderboard as write_leaderboard
from torchquant.compare.run import CaseResult as CaseResult
from torchquant.compare.run import compare as compare
from torchquant.compare.run import load_plugin as load_plugin
from torchquant.compare.settings import Case as Case
from torchquant.compare.settings import Recipe as Recipe
from torchquant.compare.settings import make_cases as make_cases

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
