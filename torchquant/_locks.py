"""Lock files; a lock ends with the process that holds it."""

from __future__ import annotations

import os
import socket
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torchquant.errors import ConfigError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

FAR = 1 << 16
"""A byte after all contents, which Windows locks instead of the file."""


@contextmanager
def hold(path: Path) -> Iterator[str | None]:
    """Hold the lock file `path`; gives None, or a description of its holder. The lock ends with the process.

    It works between threads, processes, and machines whose shared file system has locks; without locks it warns.
    """
    descriptor = _held(path)
    if descriptor is None:
        yield _holder(path)
        return
    try:
        os.truncate(descriptor, 0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}, since {since}".encode())
        yield None
    finally:
        with suppress(OSError):  # Windows refuses while the file is open
            path.unlink()
        os.close(descriptor)
        if sys.platform == "win32":
            path.unlink(missing_ok=True)


def _held(path: Path) -> int | None:
    """Return a locked descriptor of the file; None if another holder has it."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}") from error
        if not lock(descriptor):
            os.close(descriptor)
            return None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        os.close(descriptor)  # its former holder removed it in the meantime


def _holder(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8") or "another process"
    except OSError:
        return "another process"


def lock(descriptor: int) -> bool:
    """Lock an open file until it is closed; return False if another holder has it."""
    try:
        if sys.platform == "win32":
            os.lseek(descriptor, FAR, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            os.lseek(descriptor, 0, os.SEEK_SET)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        reason = f"this file system has no locks ({error.strerror}): let one process at a time write here"
        warnings.warn(reason, stacklevel=4)
    return True
