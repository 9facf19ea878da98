"""Run many searches with settings that Optuna proposes, in a storage that several machines can join."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torchquant._files import read_saved, reading, write_json, write_whole
from torchquant._locks import hold
from torchquant.errors import ConfigError, require
from torchquant.runs.console import NullProgress
from torchquant.runs.folder import ELSEWHERE, LOCK, REMAKE, keep_settings, output_folder
from torchquant.runs.options import RunOptions
from torchquant.runs.search.results import amount
from torchquant.runs.search.run import checked_settings, search_from
from torchquant.runs.search.settings import SearchConfig

SPACES: dict[str, dict[str, tuple[float, float]]] = {
    "qss": {"arch_rate": (5e-3, 3e-1), "temperature": (1.0, 10.0), "penalty": (0.1, 30.0)},
    "qpl": {"arch_rate": (3e-3, 3e-1), "penalty": (0.1, 30.0)},
}
"""Settings in which trials differ: name -> smallest and largest value, on a logarithmic scale."""


PATIENCE = 100
"""How many tenths of a second to wait until the settings of a study are written."""


@dataclass(frozen=True)
class Trial:
    """One search of a study. `accuracy`: on the test images, 0..1; `costs`: the costs of its plan."""

    number: int
    settings: dict[str, float]
    accuracy: float
    costs: dict[str, float]
    folder: str


@dataclass(frozen=True)
class StudyResult:
    """The finished trials of a study, sorted by falling accuracy."""

    trials: tuple[Trial, ...]

    @property
    def best(self) -> Trial:
        """The trial with the highest accuracy."""
        return self.trials[0]

    def table(self) -> tuple[list[str], list[list[str]], str]:
        """Return header, rows and a note of a table."""
        names = list(self.best.settings)
        rows = [
            [str(t.number), f"{t.accuracy:.2%}", amount(t.costs["bytes"]), *(f"{t.settings[n]:.3g}" for n in names)]
            for t in self.trials
        ]
        return ["trial", "accuracy", "bytes", *names], rows, "trials are chosen on the test images"


def run_study(
    config: SearchConfig,
    out: str | os.PathLike[str],
    trials: int = 20,
    storage: str | None = None,
    name: str = "search",
    show: NullProgress | None = None,
    options: RunOptions | None = None,
) -> StudyResult:
    """Run searches that differ in the settings of `SPACES`, in `out/trial-N`, until `trials` of them are finished.

    `storage`: a URL such as "sqlite:///study.db" or "mysql://...", or a journal file "study.log", which also works on a
    shared file system; None: `out/study.db`. Every process that names the same storage and study joins it. A trial that
    was stopped resumes where it was, in the same folder. The float network is trained once. `out/study.json` has the
    finished trials. Accuracy is measured on the test images, so the best trial is chosen by them. Needs the extra
    `search`. `options`: how each search is carried out. Raises ConfigError, MissingDependencyError.
    """
    if config.kind not in SPACES:
        raise ConfigError(
            f"a study needs the kind {' or '.join(SPACES)}, got {config.kind!r}; an allocation is deterministic"
        )
    if trials < 1:
        raise ConfigError(f"trials must be at least 1, got {trials}")
    optuna = require("optuna", "search")
    how = options or RunOptions()
    if how.force:
        raise ConfigError("a study may be shared with other machines, so force deletes none; use another folder")
    settings = checked_settings(config, how)
    folder, shown = output_folder(out), show or NullProgress()
    with _quiet(optuna), _opened(optuna, storage, folder) as opened:
        _claim(settings, folder, shown)
        with reading(Path(storage or folder / "study.db"), ELSEWHERE):
            study = optuna.create_study(storage=opened, study_name=name, direction="maximize", load_if_exists=True)
        for trial in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
            if (folder / f"trial-{trial.number}").is_dir():
                _perform(study, optuna.trial.Trial(study, trial._trial_id), config, folder, shown, how)
        while len(_finished(study)) < trials:
            trial = study.ask()
            for setting, (least, most) in SPACES[config.kind].items():
                trial.suggest_float(setting, least, most, log=True)
            _perform(study, trial, config, folder, shown, how)
        result = StudyResult(tuple(sorted(_finished(study), key=lambda t: -t.accuracy)))
    write_json(folder / "study.json", [asdict(trial) for trial in result.trials])
    return result


def _claim(settings: dict[str, Any], folder: Path, shown: NullProgress) -> None:
    """Keep the settings of the study in its folder, which several processes may share. Raises ConfigError."""
    for _ in range(PATIENCE):
        with hold(folder / LOCK) as other:
            if other is None:
                keep_settings(
                    folder / "config.json", settings, "a study of another search", "search", (), shown.message
                )
                return
        time.sleep(0.1)
    raise ConfigError(f"{folder} is in use by {other}; wait for it, or choose another folder")


def _perform(
    study: Any, trial: Any, config: SearchConfig, folder: Path, shown: NullProgress, options: RunOptions
) -> None:
    """Run one trial, unless another process runs it, or it was stopped before its settings were known."""
    own = output_folder(folder / f"trial-{trial.number}")
    with hold(folder / f".trial-{trial.number}.lock") as other:
        finished = {t.number for t in _finished(study)}
        if other is not None or trial.number in finished or set(trial.params) != set(SPACES[config.kind]):
            return
        kept = folder / "float.pt"
        if kept.exists():
            with reading(kept, REMAKE):
                read_saved(kept)
        words = ", ".join(f"{name} {value:.3g}" for name, value in trial.params.items())
        shown.message(f"trial {trial.number}: {words}")
        result = search_from(
            replace(config, **trial.params), own, shown, options=options, float_file=kept if kept.exists() else None
        )
        if not kept.exists():
            write_whole(kept, lambda path: path.write_bytes((own / "float.pt").read_bytes()))
        trial.set_user_attr("costs", result.costs)
        trial.set_user_attr("folder", str(own))
        study.tell(trial.number, result.accuracy)


def _finished(study: Any) -> list[Trial]:
    trials = [t for t in study.get_trials(deepcopy=False) if t.state.name == "COMPLETE"]
    return [Trial(t.number, t.params, t.value, t.user_attrs["costs"], t.user_attrs["folder"]) for t in trials]


@contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    """Silence the messages of Optuna."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)


@contextmanager
def _opened(optuna: Any, storage: str | None, folder: Path) -> Iterator[Any]:
    """Open the storage behind a URL or a file. Raises ConfigError."""
    place = f"sqlite:///{(folder / 'study.db').resolve()}" if storage is None else storage
    try:
        if "://" in place:
            opened = optuna.storages.RDBStorage(place)
        else:
            opened = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(place))
    except Exception as error:  # database drivers raise many kinds of errors
        raise ConfigError(
            f"the storage {place!r} cannot be opened ({str(error).splitlines()[0]}); give a URL such as "
            "sqlite:///study.db, or a journal file such as study.log"
        ) from error
    try:
        yield opened
    finally:
        opened.remove_session()
        if "://" in place:
            opened.engine.dispose()
