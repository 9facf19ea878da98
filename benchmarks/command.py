"""Code that the commands share: options, the choice of adapters, and the end of a run."""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.adapters import ADAPTERS
from benchmarks.adapters.base import Adapter
from benchmarks.harness import Clock
from benchmarks.machine import command_line, keep_memory_mapped, machine_facts
from benchmarks.results import Report


def parser(description: str, threads: int, rounds: int, adapters: bool = True) -> argparse.ArgumentParser:
    """Make a parser with the options of every command; `adapters`: whether it compares the adapters of this folder."""
    options = argparse.ArgumentParser(description=description)
    if adapters:
        options.add_argument("--adapters", nargs="+", choices=list(ADAPTERS), default=list(ADAPTERS), metavar="NAME")
    options.add_argument("--rounds", type=int, default=rounds, help="number of turns of every candidate (%(default)s)")
    options.add_argument("--threads", type=int, default=threads, help="threads of torch (%(default)s)")
    options.add_argument("--out", type=results_path, help="also write the results to this .json or .csv file")
    options.add_argument(
        "--mallopt",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="let glibc keep large blocks mapped, for every candidate (%(default)s)",
    )
    return options


CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}


def add_clock(options: argparse.ArgumentParser) -> None:
    """Add the option that chooses what is counted."""
    about = "seconds of the wall, or of the cores: for one thread on a busy machine (%(default)s)"
    options.add_argument("--clock", choices=list(CLOCKS), default="wall", help=about)


def results_path(text: str) -> Path:
    """Check a path for `Report.write` before the measurement rather than after it."""
    path = Path(text)
    if path.suffix not in (".json", ".csv"):
        raise argparse.ArgumentTypeError(f"must end in .json or .csv, got '{text}'")
    return path


def start(benchmark: str, ratio_unit: str, saved_unit: str, options: argparse.Namespace) -> Report:
    """Set threads and allocator; return an empty report that records both."""
    torch.set_num_threads(options.threads)
    is_memory_kept = options.mallopt and keep_memory_mapped()
    return Report(benchmark, ratio_unit, saved_unit, machine_facts(is_memory_kept), command_line())


def available(names: Sequence[str], report: Report) -> list[Adapter]:
    """Return the adapters whose library is installed; the report names the others."""
    adapters = [ADAPTERS[name] for name in names]
    for adapter in adapters:
        if adapter.missing is not None:
            report.notes.append(f"{adapter.name}: skipped, {adapter.missing}")
    return [adapter for adapter in adapters if adapter.missing is None]


def finish(report: Report, out: Path | None) -> int:
    """Print the table and write the file; return 1 if a control failed, else 0."""
    print(report.table())
    if out is not None:
        report.write(out)
    return 0 if report.is_valid else 1


def alone(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What is measured in a forked process, so that no cell holds the memory of another; or what stopped it."""
    forked = multiprocessing.get_context("fork")
    receives, sends = forked.Pipe(duplex=False)
    process = forked.Process(target=lambda: sends.send(_attempted(measure)))
    process.start()
    sends.close()
    try:
        found: dict[str, Any] = receives.recv()
    except EOFError:
        found = {"fails": "the process was killed"}
    process.join()
    return found


def _attempted(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the progress of the other tools
            return measure()
    except Exception as error:  # whatever a network or another tool raises
        lines = [line for line in str(error).strip().splitlines() if line.strip()]
        said = lines[-1].strip()[:100].replace("|", "/") if lines else ""
        return {"fails": f"{type(error).__name__}: {said}".rstrip(": ")}
