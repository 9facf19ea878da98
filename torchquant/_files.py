"""Write files whole or not at all, read files with errors that name them, and run Python files."""

from __future__ import annotations

import csv
import errno
import hashlib
import importlib.util
import io
import json
import os
import re
import secrets
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from torchquant._locks import lock
from torchquant._user_code import failure
from torchquant.errors import ConfigError, TorchQuantError, one_line

FULL = (errno.ENOSPC, errno.EDQUOT)
PROBE = 1 << 16
"""Number of bytes that are written to test whether a disk is full."""


class UnwritableError(ConfigError, OSError):
    """A file could not be written: its folder does not exist, is not writable, or the disk is full."""


def write_whole(path: Path, write: Callable[[Path], object]) -> Path:
    """Let `write` fill a temporary file beside `path`, then move it into place in one step, safe from a power cut.

    An existing file keeps its mode, and a link stays a link: its target is written. A temporary file that a killed
    process left is removed by the next process that writes the same file. Raises UnwritableError.
    """
    if not path.name:
        raise ConfigError(f"'{path}' does not name a file to write; give a path that ends in a file name")
    target = Path(os.path.realpath(path))
    try:
        if path.is_dir():  # said here: `write` may be of a library with errors of its own
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if path.exists() and not path.is_file():  # a device, a pipe
            write(path)
            return path
        _remove_leftovers(target)
        with _temporary(target) as temporary:
            mode = temporary.stat().st_mode  # as the umask has it; some libraries put a file of another mode in place
            write(temporary)
            _settle(temporary, target, mode)
            os.replace(temporary, target)
        _flush_folder(target.parent)
    except UnwritableError:
        raise
    except OSError as error:
        raise _unwritable(path, error) from error
    return path


@contextmanager
def _temporary(target: Path) -> Iterator[Path]:
    """Make a new empty file beside `target`, locked while the context lasts."""
    path = target.with_name(f".tmp-{secrets.token_hex(4)}-{target.name}")
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        if sys.platform == "win32":
            os.close(descriptor)  # an open file cannot be renamed on Windows
        else:
            lock(descriptor)
        yield path
    except (OSError, TorchQuantError):
        raise
    except Exception as error:  # libraries wrap the error of the system, or leave it out
        reason = _what_disk_says(path)
        if reason is None:
            raise
        raise reason from error
    finally:
        if sys.platform != "win32":
            os.close(descriptor)
        path.unlink(missing_ok=True)


def _remove_leftovers(target: Path) -> None:
    """Remove temporary files of `target` whose process is gone."""
    form = re.compile(rf"\.tmp-[0-9a-f]{{8}}-{re.escape(target.name)}")
    if sys.platform == "win32":
        return
    for name in filter(form.fullmatch, os.listdir(target.parent)):
        with suppress(OSError):
            descriptor = os.open(target.parent / name, os.O_RDWR)
            try:
                if lock(descriptor):
                    (target.parent / name).unlink(missing_ok=True)
            finally:
                os.close(descriptor)


def _settle(temporary: Path, target: Path, mode: int) -> None:
    """Give the file the mode of the file that it replaces, otherwise `mode`, and flush it to disk."""
    with suppress(FileNotFoundError):
        mode = target.stat().st_mode
    os.chmod(temporary, mode & 0o7777)
    with temporary.open("rb") as file:
        if sys.platform != "win32":
            os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    if sys.platform == "win32":
        return
    with suppress(OSError):  # some file systems cannot
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _what_disk_says(path: Path) -> OSError | None:
    """Return the error of a full disk, if the disk is full."""
    try:
        with path.open("ab") as file:
            file.write(bytes(PROBE))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error
    return None


def _unwritable(path: Path, error: OSError) -> UnwritableError:
    reason = error.strerror or str(error)
    if error.errno in FULL:
        reason = f"the disk is full ({reason}); free some space and run it again: finished work is kept"
    elif isinstance(error, FileNotFoundError):
        reason = f"there is no folder {path.parent}"
    found = UnwritableError(f"cannot write {path}: {reason}")
    found.errno = error.errno
    return found


def write_json(path: Path, value: Any) -> Path:
    """Write `value` as indented JSON. Raises ValueError for NaN and infinity, which JSON does not have."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    return write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write `rows` under `header`."""
    table = io.StringIO()
    writer = csv.DictWriter(table, header, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return write_whole(path, lambda temporary: temporary.write_text(table.getvalue(), encoding="utf-8"))


def is_file(name: str) -> bool:
    """Tell whether the name is that of an existing file; False for names that no file system accepts."""
    try:
        return Path(name).is_file()
    except (OSError, ValueError):
        return False


def read_text(path: str | os.PathLike[str]) -> str:
    """Read the text of a file. Raises ConfigError that names the file."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not text: {error}") from error


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file. Raises ConfigError that names it."""
    try:
        return json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error


def read_saved(path: str | os.PathLike[str]) -> Any:
    """Read tensors and plain data that `torch.save` wrote, onto the CPU. Raises ConfigError that names the file."""
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"there is no file {file}")
    try:
        return torch.load(file, weights_only=True, map_location="cpu")
    except Exception as error:  # the unpickler raises many kinds of errors for other files
        raise ConfigError(f"{file} holds no state dict that can be read safely: {_why(file, error)}") from error


def _why(file: Path, error: Exception) -> str:
    """Say why a file is not a checkpoint; torch's own messages advise to run the code in it."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    with file.open("rb") as opened:
        start = opened.read(2)
    if not start:
        return "it is empty"
    if zipfile.is_zipfile(file) and "eights" in str(error):
        return "it holds Python objects besides tensors and plain data; save model.state_dict() instead"
    if start == b"PK":
        return "it is damaged or truncated"
    if start[:1] == b"\x80":
        return "it is a pickle of something else, or damaged"
    return "torch.save did not write it"


@contextmanager
def reading(path: Path, remedy: str) -> Iterator[None]:
    """Turn errors that the contents of a file cause into a ConfigError that names the file. `remedy`: what to do."""
    try:
        yield
    except ConfigError as error:
        message = str(error) if str(path) in str(error) else f"{path}: {error}"
        raise ConfigError(message if message.endswith(remedy) else f"{message}; {remedy}") from error
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        kind = "" if isinstance(error, RuntimeError) else f"{type(error).__name__}: "
        raise ConfigError(
            f"{path} is damaged, or was written by another version: {kind}{one_line(error)}; {remedy}"
        ) from error


def check_format(where: str, data: Any, key: str, known: int, what: str) -> None:
    """Raise ConfigError for data that is not `what` in the format version `known`, given under `key`."""
    found = data.get(key) if isinstance(data, dict) else None
    if type(found) is int and found > known:
        raise ConfigError(
            f"{where} is {what} of a newer version (format {found}; this version reads {known}); use the newer version"
        )
    if type(found) is not int or found != known:
        raise ConfigError(f"{where} is not {what}: it must begin with '{key}: {known}'")


def digest_of(path: Path) -> str:
    """Compute the sha256 of a file, or of the names and contents of a folder's visible files. Raises ConfigError."""
    found = hashlib.sha256()
    try:
        if path.is_dir():
            inside = (Path(at) / name for at, _, names in os.walk(path, followlinks=True) for name in names)
            for file in sorted(file for file in inside if not file.name.startswith(".")):
                found.update(f"{file.relative_to(path).as_posix()}\0{digest_of(file)}\n".encode())
        else:
            with path.open("rb") as opened:
                while block := opened.read(1 << 20):
                    found.update(block)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    return found.hexdigest()


def run_python_file(path: Path, kind: str) -> ModuleType:
    """Run a Python file as the module `torchquant_KIND_STEM`, which pickle and torch.compile find by this name.

    Raises ConfigError that names the file and the line that failed; an AssertionError of the file passes unchanged.
    """
    name = f"torchquant_{kind}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} is not a Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    former = sys.modules.get(name)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        sys.modules.pop(name)
        if former is not None:
            sys.modules[name] = former
        if isinstance(error, TorchQuantError | AssertionError) or not isinstance(error, Exception | SystemExit):
            raise
        raise ConfigError(failure(error, str(path))) from error
    return module
