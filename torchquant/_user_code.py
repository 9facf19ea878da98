"""Tell the user's own code from installed code, so that a message can name the line of the user's file that failed."""

from __future__ import annotations

import functools
import os
import site
import sysconfig
import traceback
from pathlib import Path

from torchquant.errors import one_line

OURS = Path(__file__).parent
LONGEST_LINE = 100
PACKAGES = {"site-packages", "dist-packages"}
"""Names of folders of installed packages, also of another Python's that PYTHONPATH or a .pth file adds."""


@functools.cache
def is_installed(file: Path) -> bool:
    """Tell whether a file belongs to Python, an installed package or torchquant."""
    folders = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    folders += [*site.getsitepackages(), site.getusersitepackages(), str(OURS)]
    path = file.resolve()
    return not PACKAGES.isdisjoint(path.parts) or any(Path(folder).resolve() in path.parents for folder in folders)


def user_frame(error: BaseException) -> traceback.FrameSummary | None:
    """Find the innermost frame of the user's own code that an error came through; None if there is none.

    Frames of the errors that led to this one count too.
    """
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    for found in reversed(chain):
        for frame in reversed(traceback.extract_tb(found.__traceback__)):
            file = Path(frame.filename)
            if file.is_file() and not is_installed(file):
                return frame
    return None


def place_of(error: BaseException) -> str:
    """Name the file and the line of the user's own code that an error came through; "" if there is none."""
    frame = user_frame(error)
    return "" if frame is None else f"{brief_path(Path(frame.filename))}, line {frame.lineno}"


def line_of(error: BaseException) -> str:
    """Name the same in parentheses, to be put behind a message."""
    place = place_of(error)
    return place and f" ({place})"


def failure(error: BaseException, otherwise: str) -> str:
    """Describe an error of the user's code by the line that failed; `otherwise` is named where no line is known.

    >>> failure(ValueError("no layers"), "net.py:build")
    'net.py:build failed: ValueError: no layers'
    """
    if isinstance(error, SyntaxError) and error.filename is not None:
        return (
            f"{brief_path(Path(error.filename))} is not Python: line {error.lineno}: {error.msg}{_quoted(error.text)}"
        )
    frame, place = user_frame(error), place_of(error)
    where = f"{place}," if place else otherwise
    return f"{where} failed: {type(error).__name__}: {one_line(error)}{_quoted(frame and frame.line)}"


def _quoted(line: str | None) -> str:
    return f" (in: {line.strip()[:LONGEST_LINE]})" if line and line.strip() else ""


def brief_path(file: Path) -> str:
    """Return the path relative to the current folder where that is shorter.

    >>> brief_path(Path.cwd() / "net.py")
    'net.py'
    """
    try:
        relative = os.path.relpath(file)
    except ValueError:  # another drive
        return str(file)
    return min(relative, str(file), key=len)
