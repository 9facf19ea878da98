"""Run a comparison: each case once, saved in a file of its own, so that an interrupted comparison resumes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchquant._files import run_python_file, write_json
from torchquant._shown import shown
from torchquant.analysis import layer_errors, weight_bytes
from torchquant.compat.checkpoints import load_checkpoint
from torchquant.errors import ConfigError, require
from torchquant.quantizers import make_quantizer
from torchquant.runs.compare.settings import Case, Recipe
from torchquant.runs.console import NullProgress
from torchquant.runs.contents import changed_contents, contents_of, pinned
from torchquant.runs.data import DATA, TrainBatches, TrainingData, load_data
from torchquant.runs.float_cache import float_key, keep_float, take_float
from torchquant.runs.folder import (
    CONTENTS,
    REMAKE,
    claimed,
    read_as,
    read_checkpoint_into,
    read_settings,
    write_checkpoint,
)
from torchquant.runs.loop import accuracy_on, calibrate, train
from torchquant.runs.networks import network_of, tried
from torchquant.runs.options import RunOptions
from torchquant.runs.rehearsal import rehearse_quantizer
from torchquant.runs.settings import check_seed

MADE = ("float-seed*.pt", "runs/*.json")
"""Files from which a later comparison with the same recipe resumes."""
LOSSLESS_DB = 150.0  # the precision of float32; the SQNR of a layer without any error


@dataclass(frozen=True)
class CaseResult:
    """The result of one case. `accuracy` on the test images, 0..1; `float_accuracy` of the network it started from.

    `weight_sqnr_db`: mean over the layers, of the final weights. `seconds_per_epoch`: time of an epoch
    of quantization-aware training, None without one; an epoch has `steps_per_epoch` batches.
    """

    case: Case
    accuracy: float
    float_accuracy: float
    weight_bytes: int
    weight_sqnr_db: float
    seconds_per_epoch: float | None
    steps_per_epoch: int


def compare(
    cases: Sequence[Case],
    recipe: Recipe,
    out: str | os.PathLike[str],
    jobs: int = 1,
    plugins: Sequence[str | os.PathLike[str]] = (),
    show: NullProgress | None = None,
    options: RunOptions | None = None,
) -> list[CaseResult]:
    """Run the cases that `out` does not hold yet; return all results, in the order of `cases`.

    Every case starts from the float network of its seed and sees the same batches. Each result is a
    file `out/runs/NAME.json`, written whole: a killed comparison resumes where it was. `jobs` processes run at a time,
    with one thread each unless `options` say otherwise, so that the numbers do not depend on `jobs`. `plugins`: Python
    files with your own quantizers. `options`: how the cases are carried out. Raises ConfigError if `out` holds runs of
    another recipe.
    """
    if type(jobs) is not int or jobs < 1:
        raise ConfigError(f"jobs must be a whole number of at least 1, got {shown(jobs)}")
    if recipe.data == "digits":
        require("sklearn", "demo")
    for plugin in plugins:
        load_plugin(plugin)
    how = options or RunOptions()
    how = replace(how, threads=how.threads or 1)
    _check(cases, recipe)
    folder = Path(out)
    found = pinned(recipe.contents, contents_of([recipe.checkpoint, *([] if recipe.data in DATA else [recipe.data])]))
    settings = asdict(recipe) | how.that_change_numbers() | {CONTENTS: found}
    with (
        show or NullProgress() as screen,
        claimed(folder / "recipe.json", settings, "runs of another recipe", "recipe", MADE, screen.message, how.force),
    ):
        screen.start(len(cases) + len({case.seed for case in cases}))
        screen.message(f"{recipe.model} on {how.device or 'cpu'}, {jobs} at a time with threads: {how.threads}")
        missing = [case for case in cases if _is_missing(case, folder, screen)]
        screen.skip(len(cases) - len(missing))
        seeds = sorted({case.seed for case in missing})
        screen.advance(0, f"float networks; {len(cases) - len(missing)} of {len(cases)} cases have results already")
        floats = [(recipe, seed, str(folder), how) for seed in seeds]
        for n, words in enumerate(in_processes(_train_float, floats, jobs), 1):
            screen.message(words)
            screen.advance(1, f"float networks: {n} of {len(seeds)}")
        screen.advance(0, f"cases: {len(cases) - len(missing)} of {len(cases)}")
        (folder / "runs").mkdir(exist_ok=True)
        tasks = [(case, recipe, str(folder), tuple(map(str, plugins)), how) for case in missing]
        for n, (name, score) in enumerate(in_processes(_run_case, tasks, jobs), len(cases) - len(missing) + 1):
            screen.message(f"{name}: accuracy {score:.2%}")
            screen.advance(1, f"cases: {n} of {len(cases)}")
        return [_read(_path(case, folder))[0] for case in cases]


def _check(cases: Sequence[Case], recipe: Recipe) -> None:
    """Raise ConfigError for a case that would only fail after training."""
    if not cases:
        raise ConfigError("there are no cases to compare; give at least one")
    with torch.random.fork_rng(devices=[]):
        for case in cases:
            check_seed(case.seed)
        for slot, specs in (("weight", {c.weight for c in cases}), ("output", {c.acts for c in cases})):
            for spec in specs:
                rehearse_quantizer(spec, slot)
        network = network_of(recipe.model).build(_data(recipe, cases[0].seed))
        if recipe.checkpoint is not None:
            _load(network, recipe.checkpoint)
        tried(network, _data(recipe, cases[0].seed), recipe.model, None)


def _path(case: Case, folder: Path) -> Path:
    return folder / "runs" / f"{case.name}.json"


def _is_missing(case: Case, folder: Path, shown: NullProgress) -> bool:
    """Tell whether the case has no result yet, or has one of a quantizer whose source was different."""
    path = _path(case, folder)
    if not path.exists():
        return True
    former, known = _read(path)
    if former.case != case:
        shown.message(
            f"{case.name}: its result is of {former.case.weight} and {former.case.acts}, so the case runs again"
        )
        return True
    ours = _quantizer_contents(case)
    if known is None and ours:
        shown.message(f"{path} was written by a version that kept no contents; {', '.join(ours)} may have changed")
    changed = [] if known is None else changed_contents(known, ours)
    if changed:
        shown.message(f"{case.name}: {', '.join(changed)} has changed, so the case runs again")
    return bool(changed)


def _quantizer_contents(case: Case) -> dict[str, str]:
    """Return the contents of the plug-in files that define the quantizers of a case."""
    return contents_of([], [make_quantizer(case.weight), make_quantizer(case.acts, site="output")])


def load_plugin(path: str | os.PathLike[str]) -> None:
    """Run a Python file, which registers quantizers. Raises ConfigError if there is none."""
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"the plug-in {file} is not a file; give the path of a Python file that registers quantizers")
    _load_once(str(file.resolve()))


@cache
def _load_once(path: str) -> None:
    run_python_file(Path(path), "plugin")


def in_processes(work: Any, tasks: Sequence[tuple[Any, ...]], jobs: int) -> Iterator[Any]:
    """Yield the results as they are finished; with one job, the work runs in this process."""
    if jobs == 1 or len(tasks) < 2:
        for task in tasks:
            threads = torch.get_num_threads()
            with torch.random.fork_rng(devices=[]):
                yield work(*task)
            torch.set_num_threads(threads)
        return
    try:
        with (
            ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _end_at_once) as pool,
            _ended_with_this_process(),
        ):
            for future in as_completed([pool.submit(work, *task) for task in tasks]):
                yield future.result()
    except BrokenProcessPool as error:
        raise ConfigError(
            f"one of {jobs} processes was killed from outside, probably because memory ran out; give fewer "
            "jobs. Finished cases are kept"
        ) from error


def _end_at_once() -> None:
    """Let Ctrl-C end a worker without a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def _ended_with_this_process() -> Iterator[None]:
    """End the workers that are started meanwhile when Ctrl-C stops this process, which would wait for them."""
    others = multiprocessing.active_children()
    try:
        yield
    except (KeyboardInterrupt, GeneratorExit):
        for process in multiprocessing.active_children():
            if process not in others:
                process.terminate()
        raise


@cache
def _data(recipe: Recipe, seed: int) -> TrainingData:
    return load_data(recipe.data, seed, recipe.test_copies)


def _train_float(recipe: Recipe, seed: int, folder: str, options: RunOptions) -> str:
    """Make the float network of a seed; return what was done, in words."""
    path = Path(folder) / f"float-seed{seed}.pt"
    if path.exists():
        return f"float network of seed {seed}: found in the folder"
    torch.set_num_threads(options.threads or 1)
    kind, data = network_of(recipe.model), _data(recipe, seed)
    torch.manual_seed(seed)
    network = kind.build(data).to(options.device or "cpu")
    words = "loaded from the checkpoint"
    if recipe.checkpoint is None:
        given = [recipe.float_epochs, kind.float_rate, seed, recipe.test_copies, options.device]
        contents = contents_of([] if recipe.data in DATA else [recipe.data], [network], recipe.model)
        settings = {"training": given, "contents": contents, "amp": options.amp, "compile": options.compile}
        key = float_key(network, data, settings)
        words = "taken over from a run with the same training"
        if not (options.reuse_float and take_float(network, key)):
            train(network, data, recipe.float_epochs, kind.float_rate, seed, options=options)
            keep_float(network, key)
            words = "trained"
    else:
        _load(network, recipe.checkpoint)
    write_checkpoint(path, network)
    return f"float network of seed {seed}: {words}"


def _load(network: nn.Module, checkpoint: str) -> None:
    try:
        load_checkpoint(network, checkpoint)
    except ConfigError as error:
        raise ConfigError(
            f"{checkpoint} does not hold the state_dict of this network for this data: {error}"
        ) from error


def _run_case(
    case: Case, recipe: Recipe, folder: str, plugins: tuple[str, ...], options: RunOptions
) -> tuple[str, float]:
    for plugin in plugins:
        load_plugin(plugin)
    torch.set_num_threads(options.threads or 1)
    kind, data = network_of(recipe.model), _data(recipe, case.seed)
    torch.manual_seed(case.seed)
    network = kind.build(data)
    read_checkpoint_into(network, Path(folder) / f"float-seed{case.seed}.pt")
    network.to(options.device or "cpu")
    float_accuracy = accuracy_on(network, data)
    model = kind.quantize(
        network.eval(),
        lambda module: make_quantizer(case.weight),
        lambda module: make_quantizer(case.acts, site="output"),
        # Weights that leave their units need the batch norm for their scale; folding it in would undo the scale.
        "rescale" if _keeps_units(case.weight) else False,
    ).to(options.device or "cpu")
    calibrate(model, data, recipe.calibration_batches, case.seed)
    started = time.perf_counter()
    if recipe.epochs:
        rate = recipe.learning_rate or kind.rate
        train(model, data, recipe.epochs, rate, case.seed, quantized=True, options=options)
    seconds = (time.perf_counter() - started) / recipe.epochs if recipe.epochs else None
    found = layer_errors(model, data.test_images[:64].to(options.device or "cpu"))
    errors = [min(e.weight.sqnr_db, LOSSLESS_DB) for e in found if e.weight is not None]
    result = CaseResult(
        case,
        accuracy_on(model, data),
        float_accuracy,
        sum(site.total for site in weight_bytes(model)),
        sum(errors) / len(errors),
        seconds,
        len(TrainBatches(data)),
    )
    write_json(_path(case, Path(folder)), asdict(result) | {CONTENTS: _quantizer_contents(case)})
    return case.name, result.accuracy


@torch.no_grad()
def _keeps_units(spec: str) -> bool:
    """Tell whether a weight four times as large has values four times as large; signs without a scale have not."""
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    found = []
    for scale in (1.0, 4.0):
        quantizer = make_quantizer(spec)
        quantizer.allocate(len(x))
        quantizer.pre_observe(x * scale)
        found.append(quantizer.eval()(x * scale))
    return torch.allclose(found[1], 4.0 * found[0], rtol=1e-2, atol=1e-3)


def _read(path: Path) -> tuple[CaseResult, dict[str, str] | None]:
    """Read a result, and the contents of the plug-ins that took part, if they were saved."""
    found = read_settings(path, REMAKE)
    contents = found.pop(CONTENTS, None)
    case = read_as(path, Case, found.get("case"), REMAKE)
    return read_as(path, CaseResult, found | {"case": case}, REMAKE), contents
