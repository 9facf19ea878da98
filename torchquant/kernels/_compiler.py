"""Compile the C++ kernels with any compiler. Standard library only, since setup.py runs this file on its own."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

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


class CompileError(Exception):
    """The kernels cannot be compiled; the message says why."""


def is_switched_off() -> bool:
    """Whether the environment says that the kernels are not wanted."""
    return os.environ.get(SWITCH, "1") == "0"


def find_compiler() -> list[str]:
    """Return the command of a C++ compiler: the environment variable CXX, else the first installed one.

    Raises CompileError.
    """
    named = os.environ.get("CXX")
    for command in [named] if named else ["c++", "g++", "clang++"]:
        words = shlex.split(command)
        if words and shutil.which(words[0]):
            return words
    if named:
        raise CompileError(f"CXX names a C++ compiler that is not installed: {named}")
    raise CompileError("there is no C++ compiler: install g++ or clang++, or name one in CXX")


def sources() -> list[Path]:
    """Return the files of the library: those that are compiled, and what they include."""
    return sorted([*SOURCE.glob("*.cpp"), *SOURCE.glob("*.h")])


def key(compiler: list[str] | None = None, flags: tuple[str, ...] = ()) -> str:
    """Return a name for the library of these sources, this compiler (None: any) and this processor."""
    found = hashlib.sha256("\0".join((*FLAGS, *flags, sys.platform, platform.machine(), processor())).encode())
    if compiler is not None:
        executable = os.stat(os.path.realpath(shutil.which(compiler[0]) or compiler[0]))
        found.update(f"{compiler} {executable.st_size} {executable.st_mtime_ns}".encode())
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


def compile_library(compiler: list[str], path: Path, flags: tuple[str, ...] = ()) -> None:
    """Compile the sources to the library `path`. Raises CompileError with the last lines of the compiler."""
    files = [str(source) for source in sources() if source.suffix == ".cpp"]
    output = ""
    for native in NATIVE:
        command = [*compiler, *FLAGS, *native, *flags, *files, "-o", str(path)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=LONGEST_BUILD_S)
        except subprocess.TimeoutExpired:
            output = f"it was not done within {LONGEST_BUILD_S} s"
            break
        except OSError as error:
            output = str(error)
            break
        if done.returncode == 0:
            return
        output = done.stderr
    last = "\n".join(output.strip().splitlines()[-LAST_LINES:])
    raise CompileError(f"{shlex.join(compiler)} did not compile the kernels:\n{last}")
