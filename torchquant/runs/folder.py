"""The folder a run writes into: claimed by one process, tied to settings and contents, and the kinds of files in it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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

T = TypeVar("T")

CONTENTS = "contents"
"""Among the settings in the JSON file: what took part -> sha256. Older folders have none."""
PROCESSES = "processes"
"""Among the settings, where they were more than one: other shares of the data, other numbers."""
MOST_CHANGES = 6
LOCK = ".lock"
REMAKE = "delete it, and it is made again, or use another folder"
ELSEWHERE = "use another folder"


def output_folder(path: str | os.PathLike[str]) -> Path:
    """The folder, made if it is not there. Raises ConfigError if it cannot be one."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (FileExistsError, NotADirectoryError):
        raise ConfigError(f"the output must be a folder, but {folder} is (or lies under) a file") from None
    except OSError as error:
        raise ConfigError(f"cannot write into the output folder {folder}: {error.strerror}") from error
    return folder


@contextmanager
def claimed(
    path: Path, settings: Mapping[str, Any], holds: str, thing: str, made: Sequence[str], tell: Callable[[str], object]
) -> Iterator[Path]:
    """The folder of the JSON file `path`, this process's alone as long as the context lasts; keeps the settings there.

    A run of the same settings goes on. One that has made no file yet, since it failed or was killed, gives way.
    `holds` and `thing` are the words of a refusal: "runs of another recipe", "recipe". `made`: patterns of the files
    that are worth nothing without the settings. `tell` hears what cannot be known of an older folder. Raises
    ConfigError for a folder of other settings, or one that another process works in.
    """
    folder = output_folder(path.parent)
    with hold(folder / LOCK) as other:
        if other is not None:
            raise ConfigError(f"{folder} is in use by {other}; wait for it, or choose another folder")
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
    """Keep the settings in the folder, or check those that it holds; `claimed` calls it once it has the folder."""
    found = [file.name for pattern in made for file in path.parent.glob(pattern)]
    if path.exists() and _files(path.parent) != {path}:
        _compare(path, read_settings(path), settings, holds, thing, tell)
    elif found:
        raise ConfigError(
            f"{path} is not there, but {', '.join(found[:3])} of some run is; put it back, or choose another folder"
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
    if unknown := [name for name in known if name not in {*settings, CONTENTS, PROCESSES}]:
        raise ConfigError(
            f"{path} is of another, perhaps newer, version: no {shown(unknown[0])} is known here; use that version, or "
            "another folder"
        )
    names = [name for name in {**settings, **known} if name != CONTENTS]
    changed = [
        f"{name}: {brief_word(known.get(name))} there, {brief_word(settings.get(name))} now"
        for name in names
        if known.get(name) != settings.get(name)
    ]
    ours = settings.get(CONTENTS) or {}
    if known.get(CONTENTS) is not None:
        changed += [f"{name} has changed since" for name in changed_contents(known[CONTENTS], ours)]
    elif ours:
        tell(f"{path.parent} is of a version that kept no contents: whether {', '.join(ours)} changed is not known")
    if changed:
        words = ", ".join(changed[:MOST_CHANGES]) + (", ..." if len(changed) > MOST_CHANGES else "")
        raise ConfigError(
            f"{path.parent} holds {holds} ({words}); choose another folder, or that {thing}, which {path.name} has"
        )


def brief_word(value: Any) -> str:
    """A setting, for a message."""
    return value if isinstance(value, str) and len(value) < 100 else shown(value)


def read_settings(path: Path, remedy: str = ELSEWHERE) -> dict[str, Any]:
    """The settings or results in a JSON file of a run, perhaps with contents. Raises ConfigError that names it."""
    with reading(path, remedy):
        known = read_json(path)
        contents = known.get(CONTENTS) if isinstance(known, dict) else 0
        if not isinstance(known, dict) or not isinstance(contents, dict | None):
            raise ConfigError(f"{path} does not hold what a run writes there")
    return known


def read_as(path: Path, kind: type[T], found: Any, remedy: str) -> T:
    """A data class from what stood in a JSON file. Raises ConfigError that names the file and what is wrong in it."""
    with reading(path, remedy):
        fields: dict[str, Any] = kind.__dataclass_fields__  # type: ignore[attr-defined]
        if not isinstance(found, dict):
            raise ConfigError(f"{path} must hold {', '.join(fields)}, got {shown(found)}")
        if unknown := [name for name in found if name not in fields]:
            raise ConfigError(f"{path} is of another, perhaps newer, version: no {shown(unknown[0])} is known here")
        made = kind(**found)
        check_types(made)
        return made


def _files(folder: Path) -> set[Path]:
    """The files in the folder, without the lock and what a killed process left half-written."""
    return {p for p in folder.rglob("*") if p.is_file() and p.name != LOCK and not p.name.startswith(".tmp-")}


def write_checkpoint(path: Path, model: nn.Module) -> Path:
    """Write the `state_dict`; `torch.load(path, weights_only=True)` reads it."""
    return write_whole(path, lambda temporary: torch.save(model.state_dict(), temporary))


def read_checkpoint_into(model: nn.Module, path: Path, remedy: str = REMAKE) -> None:
    """Load what `write_checkpoint` wrote. Raises ConfigError that names it."""
    with reading(path, remedy):
        model.load_state_dict(read_saved(path))
