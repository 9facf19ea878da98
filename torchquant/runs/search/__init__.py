"""A search of schemes or bit widths for any model, into a folder: `torchquant search`."""

from torchquant.search_run.results import SearchRunResult as SearchRunResult
from torchquant.search_run.results import write_report as write_report
from torchquant.search_run.settings import SearchConfig as SearchConfig
from torchquant.search_run.stages import run_search as run_search
from torchquant.search_run.study import StudyResult as StudyResult
from torchquant.search_run.study import Trial as Trial
from torchquant.search_run.study import run_study as run_study

__all__ = ["SearchConfig", "SearchRunResult", "StudyResult", "Trial", "run_search", "run_study", "write_report"]
