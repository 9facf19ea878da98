"""The library of the C++ kernels: shipped with the package, or compiled at first use and kept in a folder of the user.

Nothing is asked of the user: without a compiler, with one that fails, or with TORCHQUANT_KERNELS=0, there is no library
and a reason, which `python -m torchquant.info` prints.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torchquant._files import write_whole
from torchquant._locks import hold
from torchquant.errors import ConfigError
from torchquant.kernels._compiler import (
    SOURCE,
    SWITCH,
    CompileError,
    compile_library,
    find_compiler,
    is_switched_off,
    key,
)


@dataclass(frozen=True)
class Built:
    """A library, or the reason why there is none."""

    library: ctypes.CDLL | None = None
    path: Path | None = None
    reason: str = ""


_built: Built | None = None


def built() -> Built:
    """Return the library of this process, found or compiled, and loaded once."""
    global _built
    if _built is None:
        _built = _find()
    return _built


def _find() -> Built:
    if is_switched_off():
        return Built(reason=f"{SWITCH}=0 switches them off")
    try:
        shipped = SOURCE / f"{key()}.so"
        path = shipped if shipped.exists() else compiled(find_compiler(), cache_folder())
        return Built(ctypes.CDLL(str(path)), path)
    except (CompileError, ConfigError, OSError) as error:
        return Built(reason=str(error))


def cache_folder() -> Path:
    """Return a folder that this user can write and no other: the user's cache, else one for temporary files.

    Raises ConfigError if there is none.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "")
    for folder in (base / "torchquant" / "kernels", Path(tempfile.gettempdir()) / f"torchquant-kernels-{user}"):
        if not folder.is_absolute():  # there is no home
            continue
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = folder.stat()
            is_own = not hasattr(os, "getuid") or (found.st_uid == os.getuid() and not found.st_mode & 0o022)
            if is_own and os.access(folder, os.W_OK | os.X_OK):
                return folder
        except OSError:
            continue
    raise ConfigError(f"there is no folder to keep the compiled kernels: neither {base} nor the temporary folder")


def compiled(compiler: list[str], folder: Path, flags: tuple[str, ...] = ()) -> Path:
    """Return the library in `folder`, compiled by one process while the others wait.

    A failure is kept beside it, so that the next process does not try again. Raises CompileError with the last lines of
    the compiler.
    """
    name = key(compiler, flags)
    target, failure = folder / f"{name}.so", folder / f"{name}.failed"
    while not target.exists():
        with hold(folder / f"{name}.lock") as holder:
            if holder is not None:
                time.sleep(0.05)
                continue
            if failure.exists():
                raise CompileError(
                    f"{failure.read_text(encoding='utf-8')}\n(kept in {failure}; delete it to try again)"
                )
            if not target.exists():
                _compile(compiler, target, failure, flags)
    return target


def _compile(compiler: list[str], target: Path, failure: Path, flags: tuple[str, ...]) -> None:
    reasons: list[CompileError] = []

    def fill(path: Path) -> None:
        try:
            compile_library(compiler, path, flags)
        except CompileError as error:
            reasons.append(error)
            raise ConfigError(str(error)) from error

    try:
        write_whole(target, fill)
    except ConfigError:
        if not reasons:  # the folder, not the compiler
            raise
        write_whole(failure, partial(_write, str(reasons[0])))
        raise reasons[0] from None


def _write(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")
