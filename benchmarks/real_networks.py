"""Real networks with real weights: torchquant beside other tools, its choices, and its files.

    python -m benchmarks.real_networks

Writes docs/real_networks.json after every cell, and the page docs/real_networks.md from it. An interrupted run goes on
with --resume; --from writes the page of a file without measuring anything.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import io
import json
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.command import parser, start
from benchmarks.real import files, sweep
from benchmarks.real.networks import NETWORKS, Real, run, sqnr
from benchmarks.real.page import page
from benchmarks.real.peers import OURS, PEERS
from benchmarks.real.peers._base import shares
from benchmarks.real.remarks import REMARKS
from benchmarks.results import write_atomically

TABLES = ("peers", "files", "calibration", "defaults")
OUT = Path("docs/real_networks.json")
VERSIONS = ("torch", "onnxruntime", "openvino", "nncf", "torchao", "brevitas", "transformers", "timm")
FEWER = {"pitch": 2}
"""Network -> the most batches of it, where a pass takes long."""

Measure = Callable[[], dict[str, Any]]


@dataclass
class Results:
    """The JSON file: written whole after every cell. `settings`: what all its cells have in common."""

    path: Path
    settings: dict[str, Any]
    runs: list[dict[str, Any]] = field(default_factory=list)
    cells: dict[str, dict[str, dict[str, dict[str, Any]]]] = field(default_factory=dict)

    @classmethod
    def resumed(cls, path: Path, settings: dict[str, Any]) -> Results:
        """The results of the file, to go on with. Raises SystemExit where they were measured otherwise."""
        held = json.loads(path.read_text())
        if held["settings"] != settings:
            raise SystemExit(
                f"{path} was measured with {held['settings']}, now given are {settings}; give another --out"
            )
        return cls(path, settings, held["runs"], held["cells"])

    def has(self, table: str, network: str, cell: str) -> bool:
        """Whether the cell is there; one that failed, or whose control did, is tried again."""
        found = self.cells.get(table, {}).get(network, {}).get(cell)
        return found is not None and "fails" not in found and found.get("valid", True)

    def add(self, table: str, network: str, cell: str, measured: dict[str, Any]) -> None:
        self.cells.setdefault(table, {}).setdefault(network, {})[cell] = measured
        self.write()

    def write(self) -> None:
        """Write the file, and the page beside it."""
        content = {
            "settings": self.settings,
            "runs": self.runs,
            "versions": {name: _version(name) for name in VERSIONS},
            "ways": {name: way.about for name, way in PEERS.items()},
            "ours": list(OURS),
            "dynamic": [name for name, way in PEERS.items() if way.is_dynamic],
            "factors": {name: list(values) for name, values in sweep.FACTORS.items()},
            "remarks": REMARKS,
            "cells": self.cells,
        }
        write_atomically(self.path, json.dumps(content, indent=1) + "\n")
        write_page(self.path)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def write_page(source: Path) -> Path:
    """The page of a JSON file, beside it."""
    target = source.with_suffix(".md")
    write_atomically(target, page(json.loads(source.read_text()), source.name))
    return target


def shortened(network: Real, most: int | None) -> Real:
    """The network with at most so many batches of each part, all of one shape: some tools fix it."""
    shapes = [tensor.shape for tensor in network.calibration[0]]
    calibration, test = (
        [batch for batch in batches if [tensor.shape for tensor in batch] == shapes][:most]
        for batches in (network.calibration, network.test)
    )
    return replace(network, calibration=calibration, test=test)


@dataclass(frozen=True)
class Subject:
    """A network to measure, with what its float model says and where files of it are kept."""

    name: str
    network: Real
    reference: Tensor
    folder: Path

    def quality(self, call: Callable[..., Any]) -> float:
        """SQNR in dB over the test inputs. Raises ValueError for outputs that are not numbers."""
        found = sqnr(self.reference, run(call, self.network.test, self.network.judged))
        if math.isnan(found):
            raise ValueError("outputs are NaN")
        return found


def cells_of(subject: Subject, table: str, options: argparse.Namespace) -> Iterator[tuple[str, Measure]]:
    """The cells of a network in a table: name, and what measures it."""
    network, folder = subject.network, subject.folder
    if table == "peers":
        for name in options.peers:
            if not PEERS[name].networks or subject.name in PEERS[name].networks:
                yield name, lambda name=name: peer_cell(subject, name)
    elif table == "calibration":
        for choice in sweep.timed_observers() if options.rounds else ():
            yield choice.value, lambda choice=choice: sweep.calibration_cost(network, choice, options.rounds)
    elif table == "defaults":
        for choice in sweep.choices(subject.name):
            yield choice.name, lambda choice=choice: choice_cell(subject, choice)
            if options.rounds and choice.is_timed:
                yield choice.cost, lambda choice=choice: sweep.calibration_cost(network, choice, options.rounds)
    else:
        yield "sizes", lambda: files.sizes(network, folder)
        yield "certificate", lambda: files.certificate(network, folder)
        if options.rounds:
            yield "times", lambda: files.times(network, folder, options.rounds)


def peer_cell(subject: Subject, name: str) -> dict[str, Any]:
    peer = PEERS[name]
    missing = [package for package in peer.packages if importlib.util.find_spec(package) is None]
    if missing:
        return {"fails": f"not installed: {', '.join(missing)}"}
    made = peer.build(subject.network, subject.folder)
    share, tables = shares(made.weights, subject.network.model)
    quality = subject.quality(made.call)
    if math.isinf(quality):
        raise ValueError("it quantizes nothing: the outputs are those of the float model")
    return {"db": quality, "share": share, "tables": tables}


def choice_cell(subject: Subject, choice: sweep.Choice) -> dict[str, Any]:
    return {"db": subject.quality(sweep.calibrated(subject.network, choice.made()))}


def attempted(measure: Measure) -> dict[str, Any]:
    """What a cell measures, or what stopped it."""
    begin = time.perf_counter()
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the progress of the other tools
            found = measure()
    except Exception as error:  # whatever a tool raises
        lines = [line for line in str(error).strip().splitlines() if line.strip()]
        found = {"fails": f"{type(error).__name__}: {lines[0][:200] if lines else ''}".rstrip(": ")}
    return {**found, "seconds": round(time.perf_counter() - begin, 1)}


def measure_all(results: Results, options: argparse.Namespace) -> None:
    for name in options.networks:
        wanted = dict.fromkeys(options.tables)
        with tempfile.TemporaryDirectory() as temporary:
            try:
                network = shortened(NETWORKS[name](), options.fewer.get(name, options.batches))
            except Exception as error:  # a package of its weights is missing
                print(f"{name}: cannot be built, {error}", flush=True)
                continue
            reference = run(network.model, network.test, network.judged)
            subject = Subject(name, network, reference, Path(temporary))
            for table in wanted:
                for cell, measure in cells_of(subject, table, options):
                    if not results.has(table, name, cell):
                        measured = attempted(measure)
                        results.add(table, name, cell, measured)
                        print(f"{table}, {name}, {cell}: {_shown(measured)}", flush=True)


def _shown(measured: Mapping[str, Any]) -> str:
    parts = [f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in measured.items()]
    return ", ".join(parts)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    options = parser(__doc__ or "", threads=2, rounds=5, adapters=False)
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    options.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS), metavar="NAME")
    options.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES), metavar="NAME")
    options.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS), metavar="NAME")
    options.add_argument("--batches", type=int, help="at most so many batches to calibrate and to test on")
    options.add_argument("--resume", action="store_true", help="keep the cells that --out holds")
    options.add_argument(
        "--from", dest="source", type=Path, metavar="FILE", help="only write the page of this JSON file"
    )
    options.set_defaults(out=OUT)
    given = options.parse_args(argv)
    given.fewer = {name: min(n, given.batches or n) for name, n in FEWER.items()}
    if given.out.suffix != ".json":
        options.error(f"--out must end in .json, got '{given.out}'")
    return given


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write."""
    options = arguments(argv)
    if options.source is not None:
        print(write_page(options.source))
        return 0
    report = start("real_networks", "", "", options)
    settings = {"batches": options.batches, "fewer": options.fewer}
    is_resumed = options.resume and options.out.exists()
    results = Results.resumed(options.out, settings) if is_resumed else Results(options.out, settings)
    results.runs.append({"command": report.command, "machine": report.machine})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the other tools, and of what ours says of each network
        measure_all(results, options)
    print(write_page(options.out))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
