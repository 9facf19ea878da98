"""Manage the folder of a run: one process claims it, and its files belong to one set of settings and contents."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from torchquant._files import read_json, read_saved, reading, write_json, write_whole
from torchquant._locks import hold
from torchquant._shown import shown
from torchquant.errors import ConfigError
from torchquant.runs.contents import changed_contents
from torchquant.runs.settings import check_types
from torchquant.training.loop import epochs_done

T = TypeVar("T")

CONTENTS = "contents"
"""Key of the settings in the JSON file: name of each input file -> sha256. Older folders do not have it."""
PROCESSES = "processes"
"""Key of the settings with the number of processes, if more than one: other shares of the data give other numbers."""
SETTINGS = ("config.json", "recipe.json", "analyze.json")
"""Names of the JSON file with the settings, one of which is in the folder of a run that resumes."""
WRITTEN = (
    *SETTINGS,
    *("float.pt", "float-seed*.pt", "calibrated.pt", "trained.pt", "searched.pt", "quantized.pt", "*.progress.pt"),
    *("model.onnx", "model.onnx.data", "model.safetensors", "integer.json", "certificate.json", "certificate.txt"),
    *("plan.yaml", "advised_plan.yaml", "sites.csv", "slots.csv", "monitor.csv", "choices.csv", "history.csv"),
    *("losses.json", "result.json", "history.json", "pareto.json", "sensitivity.json", "analysis.json", "advice.json"),
    *("report.html", "leaderboard.*", "study.json", "study.db", "runs", "run", "steps", "trial-*"),
)
"""Patterns of what runs write into their folder."""
BESIDE = (CONTENTS, PROCESSES, "amp")
"""Keys of the settings that are no fields of the settings class of the run."""
MOST_CHANGES = 6
LOCK = ".lock"
REMAKE = "delete it, and it is made again, or use another folder"
ELSEWHERE = "use another folder"


def output_folder(path: str | os.PathLike[str]) -> Path:
    """Return the folder, made if it does not exist. Raises ConfigError if it cannot be made or written."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (FileExistsError, NotADirectoryError):
        raise ConfigError(
            f"the output must be a folder, but {folder} is a file or is inside a file; choose another path"
        ) from None
    except OSError as error:
        raise ConfigError(f"cannot write into the output folder {folder}: {error.strerror}") from error
    return folder


@contextmanager
def _made_folder(path: Path) -> Iterator[Path]:
    """Make the folder, and remove it after an error if it was new and nothing is in it."""
    was_there = path.exists()
    folder = output_folder(path)
    try:
        yield folder
    except BaseException:
        if not was_there:
            with suppress(OSError):
                folder.rmdir()
        raise


@contextmanager
def claimed(
    path: Path,
    settings: Mapping[str, Any],
    holds: str,
    thing: str,
    made: Sequence[str],
    tell: Callable[[str], object],
    force: bool = False,
) -> Iterator[Path]:
    """Claim the folder of the JSON file `path` for this process while the context lasts, and keep the settings in it.

    A run with the same settings resumes. A run that failed or was killed before it made a file is replaced.
    `holds` and `thing` are words for the error: "runs of another recipe", "recipe". `made`: patterns of the files
    that are useless without the settings. `tell` is called with a note where an older folder cannot be checked.
    `force`: delete what a run left in the folder first. Raises ConfigError for a folder with other settings, or one
    that another process uses.
    """
    with _made_folder(path.parent) as folder, hold(folder / LOCK) as other:
        if other is not None:
            raise ConfigError(f"{folder} is in use by {other}; wait for it, or choose another folder")
        if force and any((folder / name).is_file() for name in SETTINGS):
            _clear(folder, settings.get(CONTENTS) or ())
        before = _files(folder)
        keep_settings(path, settings, holds, thing, made, tell)
        try:
            yield folder
        except BaseException:
            if not before & {path} and _files(folder) == before | {path}:
                path.unlink()  # nothing was made, so that the folder is free for other settings
            raise


def keep_settings(
    path: Path, settings: Mapping[str, Any], holds: str, thing: str, made: Sequence[str], tell: Callable[[str], object]
) -> None:
    """Write the settings into the folder, or compare them with the settings there; `claimed` calls it."""
    found = [file.name for pattern in made for file in path.parent.glob(pattern)]
    if path.exists() and _files(path.parent) != {path}:
        _compare(path, read_settings(path), settings, holds, thing, tell)
    elif found:
        raise ConfigError(
            f"{path} is missing, but {', '.join(found[:3])} of some run is there; restore it, or choose another folder"
        )
    else:
        write_json(path, settings)


def _compare(
    path: Path,
    known: Mapping[str, Any],
    settings: Mapping[str, Any],
    holds: str,
    thing: str,
    tell: Callable[[str], object],
) -> None:
    if unknown := [name for name in known if name not in {*settings, *BESIDE}]:
        raise ConfigError(
            f"{path} was written by another, perhaps newer, version: {shown(unknown[0])} is unknown here; use that "
            "version or another folder"
        )
    names = [name for name in {**settings, **known} if name != CONTENTS]
    changed = [
        f"{name}: {brief_word(known.get(name))} there, {brief_word(settings.get(name))} now"
        for name in names
        if known.get(name) != settings.get(name)
    ]
    ours = settings.get(CONTENTS) or {}
    if known.get(CONTENTS) is not None:
        changed += [f"{name} has changed" for name in changed_contents(known[CONTENTS], ours)]
    elif ours:
        tell(f"{path.parent} was written by a version that kept no contents; {', '.join(ours)} may have changed")
    if changed:
        words = ", ".join(changed[:MOST_CHANGES]) + (", ..." if len(changed) > MOST_CHANGES else "")
        raise ConfigError(
            f"{path.parent} holds {holds} ({words}); choose another folder, use the {thing} that {path.name} "
            "holds, or replace it with --force"
        )


def brief_word(value: Any) -> str:
    """Shorten a setting for a message."""
    return value if isinstance(value, str) and len(value) < 100 else shown(value)


def read_settings(path: Path, remedy: str = ELSEWHERE) -> dict[str, Any]:
    """Read settings or results from a JSON file of a run. Raises ConfigError that names the file."""
    with reading(path, remedy):
        known = read_json(path)
        contents = known.get(CONTENTS) if isinstance(known, dict) else 0
        if not isinstance(known, dict) or not isinstance(contents, dict | None):
            raise ConfigError(f"{path} does not hold a JSON object as a run writes it")
    return known


def read_as(path: Path, kind: type[T], found: Any, remedy: str) -> T:
    """Make a data class from the contents of a JSON file. Raises ConfigError that names the file and the fault."""
    with reading(path, remedy):
        fields: dict[str, Any] = kind.__dataclass_fields__  # type: ignore[attr-defined]
        if not isinstance(found, dict):
            raise ConfigError(f"{path} must hold {', '.join(fields)}, got {shown(found)}")
        if unknown := [name for name in found if name not in fields]:
            raise ConfigError(
                f"{path} was written by another, perhaps newer, version: {shown(unknown[0])} is unknown here"
            )
        made = kind(**found)
        check_types(made)
        return made


def _clear(folder: Path, inputs: Iterable[str]) -> None:
    """Delete what a run has written into its folder; other files stay. Raises ConfigError if an input is among it."""
    found = [path for pattern in WRITTEN for path in folder.glob(pattern)]
    for name in inputs:
        if any(path.resolve() in (Path(name).resolve(), *Path(name).resolve().parents) for path in found):
            raise ConfigError(f"force would delete {name}, which this run reads; move it out of {folder} first")
    for path in found:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def contents_in_words(folder: Path) -> str:
    """Name what a run has made in its folder, with the finished epochs of trainings under way; "" if nothing.

    >>> contents_in_words(Path("no folder"))
    ''
    """
    if not any((folder / name).is_file() for name in SETTINGS):
        return ""
    words = []
    for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime):
        if path.is_dir() and (n := len(_files(path))):
            words.append(f"{path.name}/ ({n} file{'s' * (n > 1)})")
        elif path.match("*.progress.pt"):
            words.append(path.name)
            with suppress(ConfigError):  # progress of something that has no epochs
                words[-1] += f" (after epoch {epochs_done(path)})"
        elif not path.name.startswith(".") and path.name not in SETTINGS and path.is_file():
            words.append(path.name)
    return ", ".join(words)


def _files(folder: Path) -> set[Path]:
    """The files in the folder, without locks and half-written files of killed processes."""
    return {p for p in folder.rglob("*") if p.is_file() and p.name != LOCK and not p.name.startswith(".tmp-")}


def write_checkpoint(path: Path, model: nn.Module) -> Path:
    """Write the `state_dict`; `torch.load(path, weights_only=True)` reads it."""
    return write_whole(path, lambda temporary: torch.save(model.state_dict(), temporary))


def read_checkpoint_into(model: nn.Module, path: Path, remedy: str = REMAKE) -> None:
    """Load a file of `write_checkpoint` into the model. Raises ConfigError that names the file."""
    with reading(path, remedy):
        model.load_state_dict(read_saved(path))
