"""Where a monitor writes its numbers: CSV, TensorBoard, W&B, MLflow, the terminal, or a function."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torchquant._arguments import checked, fits
from torchquant._files import UnwritableError, read_text, write_csv
from torchquant._registry import Registry
from torchquant._shown import shown
from torchquant.errors import ConfigError, require
from torchquant.training.growing_table import GrowingTable

STEP = "step"
"""The name of the steps, in a CSV file and where a library counts otherwise."""


@runtime_checkable
class Sink(Protocol):
    """Takes numbers after some steps of a training: `write(step, {name: number})`, and `close()` at the end."""

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Write the numbers of one step; steps rise, and names may come and go."""

    def close(self) -> None:
        """Finish; nothing is written afterwards."""


Write = Callable[[int, Mapping[str, float]], Any]
SinkLike = str | Sink | Write
"""A sink; a function of a step and its numbers; or the name of a sink with what it takes: "csv:FILE"."""
SINKS: Registry[Callable[..., Sink]] = Registry("sink")
"""Name -> what makes the sink, given the text behind the colon if there is one."""


class _Function:
    """A sink that calls a function."""

    def __init__(self, function: Write) -> None:
        self.write = function

    def close(self) -> None:
        """Do nothing."""


def open_sinks(to: SinkLike | Iterable[SinkLike]) -> list[Sink]:
    """Return a sink for each entry of `to`, or the one for `to` itself. Raises ConfigError, MissingDependencyError."""
    is_one = isinstance(to, str | bytes | Sink) or callable(to) or not isinstance(to, Iterable)
    return [_sink_of(one) for one in ([to] if is_one else to)]  # type: ignore[union-attr]


def _sink_of(one: object) -> Sink:
    name, _, text = one.partition(":") if isinstance(one, str) else ("", "", "")
    if name in SINKS:
        return SINKS[name](text) if text else SINKS[name]()
    if isinstance(one, Sink) and fits(Write, one.write):
        return one
    if callable(one) and fits(Write, one):
        return _Function(one)
    known = ", ".join(SINKS)
    raise ConfigError(
        f"a sink must be a name ({known}) such as 'csv:monitor.csv', an object with write(step, numbers) and close(), "
        f"or a function of step and numbers; got {shown(one)}"
    )


@SINKS.register("csv")
@checked
class CSVSink:
    """Writes a CSV file: one line for each step, one column for each name; empty where a step lacks a number.

    Each line is written whole and at once, so that a killed run leaves whole lines. In a file that exists, lines of
    steps from the first one on are replaced: a resumed training continues it, a new one begins it afresh.
    `read_looks` reads it. Raises UnwritableError.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "monitor.csv"
    >>> CSVSink(path).write(50, {"loss": 0.5})
    >>> path.read_text()
    'step,loss\\n50,0.5\\n'
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.parent.is_dir():
            raise UnwritableError(f"cannot write {self.path}: there is no folder {self.path.parent}")
        self._columns: list[str] = []

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        row = {STEP: str(step)} | {name: f"{number:.9g}" for name, number in numbers.items()}
        if not row.keys() <= set(self._columns):
            columns, rows = read_rows(self.path) if self.path.exists() else ([STEP], [])
            self._columns = list(dict.fromkeys([*columns, *row]))
            write_csv(self.path, self._columns, [kept for kept in rows if int(kept[STEP]) < step])
        line = io.StringIO()
        csv.DictWriter(line, self._columns, lineterminator="\n").writerow(row)
        try:
            with self.path.open("a", encoding="utf-8", newline="") as file:
                file.write(line.getvalue())
        except OSError as error:
            raise UnwritableError(f"cannot write {self.path}: {error.strerror}") from error

    def close(self) -> None:
        """Do nothing: each line is in the file as soon as it is written."""


def read_rows(path: str | Path) -> tuple[list[str], list[dict[str, str]]]:
    """Read the columns and the whole lines of a file of `CSVSink`. Raises ConfigError for another file."""
    text = read_text(path)
    lines = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
    columns, rows = list(lines.fieldnames or []), list(lines)
    if columns[:1] != [STEP] or not all(row[STEP].isdecimal() and None not in row.values() for row in rows):
        raise ConfigError(f"{path} is not a CSV file of a monitor, with a column {STEP!r}; name another file")
    return columns, rows


@SINKS.register("tensorboard")
@checked
class TensorBoardSink:
    """Writes scalars for TensorBoard into a folder, or with a SummaryWriter of yours, which stays open.

    Needs the extra `tensorboard`. Raises MissingDependencyError.
    """

    def __init__(self, folder: str | Path | None = None, writer: Any = None) -> None:
        require("tensorboard", "tensorboard")
        self._is_own = writer is None
        self.writer = (
            require("torch.utils.tensorboard", "tensorboard").SummaryWriter(folder) if writer is None else writer
        )

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, number in numbers.items():
            self.writer.add_scalar(name, number, step)
        self.writer.flush()

    def close(self) -> None:
        """Close the writer, unless it was given."""
        if self._is_own:
            self.writer.close()


@SINKS.register("wandb")
@checked
class WandbSink:
    """Logs to the current run of Weights & Biases, or to a new one of `project`; `options` go to `wandb.init`.

    `mode="offline"`, or WANDB_MODE=offline, needs no network. The numbers have an axis of their own,
    "torchquant_step", since the run counts its own steps. Needs the extra `wandb`. Raises MissingDependencyError.
    """

    AXIS = "torchquant_step"

    def __init__(self, project: str | None = None, run: Any = None, **options: Any) -> None:
        wandb = require("wandb", "wandb")
        found = run or (None if project or options else wandb.run)
        self._is_own = found is None
        self.run = wandb.init(project=project, **options) if found is None else found
        self._known: set[str] = set()

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        for name in numbers.keys() - self._known:
            self.run.define_metric(name, step_metric=self.AXIS)
        self._known |= numbers.keys()
        self.run.log({**numbers, self.AXIS: step})

    def close(self) -> None:
        """Finish the run, unless it was there before."""
        if self._is_own:
            self.run.finish()


@SINKS.register("mlflow")
@checked
class MLflowSink:
    """Logs metrics to the active run of MLflow, or to a new one of `experiment`, with the tracking URI that is set.

    Needs the extra `mlflow`. Raises MissingDependencyError.
    """

    MOST = 1000
    """How many metrics MLflow takes at once."""

    def __init__(self, experiment: str | None = None) -> None:
        mlflow = require("mlflow", "mlflow")
        active = None if experiment else mlflow.active_run()
        self._client, self._is_own = mlflow.MlflowClient(), active is None
        if active is None:
            found = None if experiment is None else mlflow.set_experiment(experiment).experiment_id
            active = self._client.create_run(found or "0")
        self.run_id: str = active.info.run_id

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        kind, now = require("mlflow.entities", "mlflow").Metric, int(time.time() * 1000)
        metrics = [kind(name, number, now, step) for name, number in numbers.items()]
        for start in range(0, len(metrics), self.MOST):
            self._client.log_batch(self.run_id, metrics[start : start + self.MOST])

    def close(self) -> None:
        """End the run, unless it was there before."""
        if self._is_own:
            self._client.set_terminated(self.run_id)


@SINKS.register("terminal")
@checked
class TerminalSink:
    """Shows a table that grows with each look, in place on a terminal; elsewhere a line for each look.

    `console`: a rich Console; None: one on standard output. Needs the extra `cli`. Raises MissingDependencyError.
    """

    def __init__(self, console: Any = None) -> None:
        self._console = console or require("rich", "cli").get_console()
        self._table = GrowingTable("training")
        self._live: Any = None

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        cells = cells_of(step, numbers)
        self._table.add(cells)
        if self._is_live():
            self._live.update(self._table.render(), refresh=True)
        else:
            self._console.print(self._table.line(cells), markup=False, highlight=False, soft_wrap=True)

    def _is_live(self) -> bool:
        """Start the display if there can be one: not off a terminal, nor beside another one with an older rich."""
        if self._live is None and self._console.is_terminal:
            live = require("rich.live", "cli").Live(console=self._console, auto_refresh=False)
            with suppress(require("rich.errors", "cli").LiveError):
                live.start()
                self._live = live
        return self._live is not None

    def close(self) -> None:
        """Leave the last table on the terminal."""
        if self._live is not None:
            self._live.stop()
            self._live = None


SHARES = {
    "oscillation": ("weight/oscillation",),
    "flips": ("weight/flips",),
    "clipped w": ("weight/below", "weight/above"),
    "clipped a": ("activation/below", "activation/above"),
    "dead w": ("weight/dead_codes",),
    "dead a": ("activation/dead_codes",),
    "drift": ("weight/scale_drift",),
}
"""Column of the table -> the numbers whose sum it shows, shares or relative changes."""
LOWEST = {"SQNR w": "weight/lowest_sqnr", "SQNR a": "activation/lowest_sqnr"}


def cells_of(step: int, numbers: Mapping[str, float]) -> dict[str, str]:
    """Return the row of a table: what the caller gave, such as the loss, and the figures of the whole model.

    >>> cells_of(50, {"loss": 0.25, "weight/flips": 0.031, "conv1/weight/flips": 0.5})["flips"]
    '3.10 %'
    """
    given = {name: f"{number:.4g}" for name, number in numbers.items() if "/" not in name}
    shares = {
        title: f"{100 * sum(numbers[name] for name in names):.2f} %" if names[0] in numbers else "-"
        for title, names in SHARES.items()
    }
    lowest = {title: f"{numbers[name]:.1f} dB" if name in numbers else "-" for title, name in LOWEST.items()}
    return {STEP: str(step), **given, **shares, **lowest}
