"""Describe the machine of a measurement, and set the allocator so that page faults do not count."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_MMAP_THRESHOLD = 1 << 30
_M_ARENA_MAX = -8
_TRIM_THRESHOLD = (1 << 31) - 1  # mallopt takes a C int


def keep_memory_mapped() -> bool:
    """Let glibc reuse large blocks instead of mapping and page-faulting each one anew.

    This changes the whole process, so it affects every candidate equally. Returns whether it took effect;
    False where the C library has no `mallopt` (macOS, Windows, musl).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD)) and bool(mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD))


def keep_one_arena() -> bool:
    """Let all threads of glibc share one arena, so that none keeps what it has freed from the others.

    Returns whether it took effect.
    """
    try:
        return bool(ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1))
    except (AttributeError, OSError, TypeError):
        return False


def cpu_model() -> str:
    """Return the name of the processor, as the system reports it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine_facts(is_memory_kept: bool) -> dict[str, str | int | float | bool]:
    """Return all facts about the machine that a number of this run depends on."""
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "mallopt": is_memory_kept,
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else -1.0,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def command_line() -> str:
    """Return the command that repeats this run."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    program = f"python -m {spec.name}" if spec is not None and spec.name else f"python {sys.argv[0]}"
    return " ".join([program, *sys.argv[1:]])
