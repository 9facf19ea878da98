"""Search schemes or bit widths for any model, in a folder: `torchquant search`."""

from torchquant.runs.search.results import SearchRunResult as SearchRunResult
from torchquant.runs.search.results import write_report as write_report
from torchquant.runs.search.run import run_search as run_search
from torchquant.runs.search.settings import SearchConfig as SearchConfig
from torchquant.runs.search.study import StudyResult as StudyResult
from torchquant.runs.search.study import Trial as Trial
from torchquant.runs.search.study import run_study as run_study

__all__ = ["SearchConfig", "SearchRunResult", "StudyResult", "Trial", "run_search", "run_study", "write_report"]
