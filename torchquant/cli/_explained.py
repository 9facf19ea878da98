"""Say in a few lines why a command ended early: bad input, an error in the user's own code, Ctrl-C, a fault of ours."""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torchquant._user_code import failure, user_frame
from torchquant.errors import TorchQuantError, one_line
from torchquant.runs.folder import contents_in_words

STOPPED = 130
"""Exit status of a command that Ctrl-C ended, as shells have it."""
ONCE = ("--force",)
"""Options that the line to resume must not repeat."""


@contextmanager
def explained(typer: Any, out: object = None) -> Iterator[None]:
    """Turn what ends a command early into a message without a traceback, and an exit status that is not 0.

    `out`: the folder of the run, where there is one. The traceback of an error that nobody foresaw is kept in a file.
    """
    try:
        yield
    except (TorchQuantError, OSError) as error:
        _end(typer, f"torchquant: {' '.join(str(error).split())}", 1)
    except KeyboardInterrupt:
        _end(typer, "\n".join(_stopped(out)), STOPPED)
    except Exception as error:
        if isinstance(error, typer.Exit | typer.Abort) or type(error).__module__.startswith(("click", "typer")):
            raise
        if user_frame(error) is not None:
            words = failure(error, "your code")
        else:
            words = f"an error that it did not foresee: {type(error).__name__}: {one_line(error)}; please report it"
        _end(typer, f"torchquant: {words}; traceback: {_kept(error)}", 1)


def _end(typer: Any, text: str, status: int) -> None:
    typer.echo(text, err=True)
    raise typer.Exit(status) from None


def _kept(error: BaseException) -> str:
    """Write the traceback into a new file; return its path."""
    descriptor, path = tempfile.mkstemp(".txt", "torchquant-traceback-")
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.writelines(traceback.format_exception(error))
    return path


def _stopped(out: object) -> Iterator[str]:
    """Yield lines about a command that was stopped: what its folder has kept, and the line that resumes it."""
    kept = contents_in_words(out) if isinstance(out, Path) else ""
    if not kept:
        yield "\ntorchquant: stopped; nothing was made yet that the next run could use"
        return
    yield f"\ntorchquant: stopped; {out} keeps {kept}"
    yield f"resume with: {resuming_line(sys.argv[1:])}"


def resuming_line(words: list[str]) -> str:
    """Return the command line that resumes the one with these words.

    >>> resuming_line(["quantize", "my nets.py:net", "--force"])
    "torchquant quantize 'my nets.py:net'"
    """
    start = "torchquant"
    if "LOCAL_WORLD_SIZE" in os.environ:
        start = f"torchrun --nproc-per-node {os.environ['LOCAL_WORLD_SIZE']} -m torchquant"
    return f"{start} {shlex.join(word for word in words if word not in ONCE)}"
