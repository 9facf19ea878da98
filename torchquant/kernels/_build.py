"""Compile the C++ kernels at first use, and keep the library in a folder of the user.

Nothing is asked of the user: without a compiler, with one that fails, or with TORCHQUANT_KERNELS=0, there is no library
and a reason, which `python -m torchquant.info` prints.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torchquant._files import UnwritableError, write_whole
from torchquant._locks import hold
from torchquant.errors import ConfigError

SWITCH = "TORCHQUANT_KERNELS"
SOURCE = Path(__file__).parent
FLAGS = (
    *("-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    *("-fno-exceptions", "-fno-rtti", "-fvisibility=hidden", "-shared", "-fPIC"),
)
NATIVE = (("-march=native",), ("-mcpu=native",), ())
"""How compilers are told to use all of this processor; the first that is understood is taken."""
LONGEST_BUILD_S = 300
LAST_LINES = 15


@dataclass(frozen=True)
class Built:
    """A library, or the reason why there is none."""

    library: ctypes.CDLL | None = None
    path: Path | None = None
    reason: str = ""


_built: Built | None = None


def built() -> Built:
    """Return the library of this process, compiled and loaded once."""
    global _built
    if _built is None:
        _built = _find()
    return _built


def _find() -> Built:
    if os.environ.get(SWITCH, "1") == "0":
        return Built(reason=f"{SWITCH}=0 switches the kernels off")
    compiler = find_compiler()
    if compiler is None:
        return Built(reason="there is no C++ compiler: install g++ or clang++, or name one in CXX")
    try:
        path = compiled(compiler, cache_folder())
        return Built(ctypes.CDLL(str(path)), path)
    except (ConfigError, OSError) as error:
        return Built(reason=str(error))


def find_compiler() -> list[str] | None:
    """Return the command of a C++ compiler: the environment variable CXX, else the first that is installed."""
    named = os.environ.get("CXX")
    for command in [named] if named else ["c++", "g++", "clang++"]:
        words = shlex.split(command)
        if words and shutil.which(words[0]):
            return words
    return None


def sources() -> list[Path]:
    """Return the files of the library: those that are compiled, and what they include."""
    return sorted([*SOURCE.glob("*.cpp"), *SOURCE.glob("*.h")])


def key(compiler: list[str], flags: tuple[str, ...] = ()) -> str:
    """Return a name for the library of these sources, this compiler and this processor."""
    found = hashlib.sha256("\0".join((*compiler, *FLAGS, *flags, platform.machine(), processor())).encode())
    executable = os.stat(os.path.realpath(shutil.which(compiler[0]) or compiler[0]))
    found.update(f"{executable.st_size} {executable.st_mtime_ns}".encode())
    for source in sources():
        found.update(source.name.encode() + source.read_bytes())
    return found.hexdigest()[:16]


def processor() -> str:
    """Return what tells processors with different instructions apart."""
    if sys.platform == "linux":
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                name, _, value = line.partition(":")
                if name.strip() in ("flags", "Features"):
                    return " ".join(sorted(value.split()))
    return platform.processor()


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

    A failure is kept beside it, so that the next process does not try again. Raises ConfigError with the last lines of
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
                raise ConfigError(failure.read_text(encoding="utf-8"))
            if not target.exists():
                try:
                    write_whole(target, lambda path: compile_library(compiler, path, flags))
                except UnwritableError:
                    raise
                except ConfigError as error:
                    write_whole(failure, partial(_write, str(error)))
                    raise
    return target


def _write(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")


def compile_library(compiler: list[str], path: Path, flags: tuple[str, ...] = ()) -> None:
    """Compile the sources to the library `path`. Raises ConfigError with the last lines of the compiler."""
    files = [str(source) for source in sources() if source.suffix == ".cpp"]
    output = ""
    for native in NATIVE:
        command = [*compiler, *FLAGS, *native, *flags, *files, "-o", str(path)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=LONGEST_BUILD_S)
        except subprocess.TimeoutExpired:
            output = f"it was not done within {LONGEST_BUILD_S} s"
            break
        if done.returncode == 0:
            return
        output = done.stderr
    last = "\n".join(output.strip().splitlines()[-LAST_LINES:])
    raise ConfigError(f"{shlex.join(compiler)} did not compile the kernels:\n{last}")
