"""Each sink writes what the library of its own reads back."""

from __future__ import annotations

import io
import json
import math
import struct
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchquant as tq
from tests.processes import CONTEXT
from torchquant.errors import ConfigError, MissingDependencyError
from torchquant.training import (
    CSVSink,
    MLflowSink,
    Monitor,
    Sink,
    TensorBoardSink,
    TerminalSink,
    WandbSink,
    read_looks,
    series,
)
from torchquant.training.batches import make_bar
from torchquant.training.growing_table import MOST_ROWS, GrowingTable
from torchquant.training.sinks import open_sinks

ROWS: list[tuple[int, dict[str, float]]] = [
    (2, {"loss": 0.5, "0/weight/flips": 0.25}),
    (4, {"loss": 0.25, "0/weight/flips": 0.125, "0/weight/sqnr": math.inf}),
    (6, {"loss": 1e-12, "0/weight/sqnr": 31.25}),
]
CURVES = {
    "loss": [(2, 0.5), (4, 0.25), (6, 1e-12)],
    "0/weight/flips": [(2, 0.25), (4, 0.125)],
    "0/weight/sqnr": [(4, math.inf), (6, 31.25)],
}


def write_all(sink: Sink) -> None:
    for step, numbers in ROWS:
        sink.write(step, numbers)
    sink.close()


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "monitor.csv"
    write_all(CSVSink(path))
    assert path.read_text().splitlines()[:2] == ["step,loss,0/weight/flips,0/weight/sqnr", "2,0.5,0.25,"]
    assert series(read_looks(path)) == CURVES


def write_for_ever(path: Path) -> None:
    sink, step = CSVSink(path), 0
    while True:
        step += 1
        sink.write(step, {f"x{i}": step + i / 7 for i in range(300)})


def test_csv_of_a_killed_run_has_whole_lines(tmp_path: Path) -> None:
    """A process that is killed while it writes, again and again, leaves lines with all their columns."""
    path = tmp_path / "monitor.csv"
    run = CONTEXT.Process(target=write_for_ever, args=(path,))
    run.start()
    while not path.exists() or path.stat().st_size < 100_000:
        time.sleep(0.01)
    run.kill()
    run.join()
    looks = read_looks(path)
    assert len(looks) >= 20
    assert [look.step for look in looks] == list(range(1, len(looks) + 1))
    assert all(None not in look.numbers.values() and len(look.numbers) == 300 for look in looks)


def test_csv_that_a_run_goes_on_with(tmp_path: Path) -> None:
    path = tmp_path / "monitor.csv"
    write_all(CSVSink(path))
    with path.open("a") as file:
        file.write("8,0.1")  # a line that was cut off
    again = CSVSink(path)
    again.write(4, {"loss": 2.0, "new": 3.0})
    again.write(8, {"loss": 1.0})
    assert series(read_looks(path)) == {
        "loss": [(2, 0.5), (4, 2.0), (8, 1.0)],
        "0/weight/flips": [(2, 0.25)],
        "new": [(4, 3.0)],
    }


def test_csv_that_cannot_be_written_or_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no folder"):
        CSVSink(tmp_path / "none" / "monitor.csv")
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match="not a CSV file of a monitor"):
        CSVSink(other).write(1, {"loss": 1.0})
    assert other.read_text() == "a,b\n1,2\n"


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed: torchquant[tensorboard]")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_all(TensorBoardSink(tmp_path))
    events = EventAccumulator(str(tmp_path)).Reload()
    found = {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert found == {name: [(step, pytest.approx(x)) for step, x in curve] for name, curve in CURVES.items()}


def test_tensorboard_with_a_writer_of_the_user(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed: torchquant[tensorboard]")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as writer:
        write_all(TensorBoardSink(writer=writer))
        assert writer.file_writer is not None


def records_of(file: Path) -> Iterator[Any]:
    """The records in a file of an offline run: its messages, in a log of blocks as LevelDB's."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, block, parts = file.read_bytes(), 7, 2**15, b""
    while at + 7 <= len(data):
        if block - at % block < 7:
            at += block - at % block
            continue
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(parts)
            parts = b""


def test_wandb_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="Weights & Biases is not installed: torchquant[wandb]")
    write_all(WandbSink("torchquant", mode="offline", dir=str(tmp_path)))
    (file,) = tmp_path.rglob("*.wandb")
    found: dict[str, list[tuple[int, float]]] = {}
    for record in records_of(file):
        items = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
        for name in items.keys() & CURVES.keys():
            found.setdefault(name, []).append((int(items[WandbSink.AXIS]), float(json.loads(items[name]))))
    assert found == CURVES


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="MLflow is not installed: torchquant[mlflow]")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(tmp_path.as_uri())
    sink = MLflowSink("qat")
    write_all(sink)
    client = mlflow.MlflowClient()
    found = {name: [(m.step, m.value) for m in client.get_metric_history(sink.run_id, name)] for name in CURVES}
    assert found == CURVES
    assert client.get_run(sink.run_id).info.status == "FINISHED"
    with mlflow.start_run() as run:
        write_all(MLflowSink())
        assert client.get_metric_history(run.info.run_id, "loss")[-1].value == 1e-12
    assert client.get_run(run.info.run_id).info.status == "FINISHED"


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_library_that_is_missing_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match=rf"pip install 'torchquant\[{name}\]'"):
        open_sinks(f"{name}:x")


def terminal(is_terminal: bool) -> tuple[TerminalSink, io.StringIO]:
    from rich.console import Console

    text = io.StringIO()
    return TerminalSink(Console(file=text, force_terminal=is_terminal, width=160)), text


def test_lines_off_a_terminal() -> None:
    sink, text = terminal(False)
    sink.write(50, {"loss": 0.25, "weight/flips": 0.031, "weight/oscillation": 0.02, "0/weight/flips": 0.5})
    sink.close()
    assert text.getvalue().startswith("training: step 50, loss 0.25, oscillation 2.00 %, flips 3.10 %, clipped w -")
    assert text.getvalue().count("\n") == 1


def test_a_table_that_grows_on_a_terminal() -> None:
    sink, text = terminal(True)
    for step in range(1, MOST_ROWS + 3):
        sink.write(step, {"loss": 1.0 / step, "weight/lowest_sqnr": 20.0})
    sink.close()
    shown = text.getvalue()
    assert "20.0 dB" in shown
    last = shown[shown.rfind("training") :]
    assert "│ 2 " not in last
    assert f"│ {MOST_ROWS + 2} " in last


def test_a_table_whose_names_come_and_go() -> None:
    table = GrowingTable("training")
    for cells in ({"step": "1", "loss": "2"}, {"step": "3", "rate": "4", "loss": "5"}, {"step": "6", "rate": "7"}):
        table.add(cells)
    found = {column.header: list(column.cells) for column in table.render().columns}
    assert found == {"step": ["1", "3", "6"], "loss": ["2", "5", "-"], "rate": ["-", "4", "7"]}


@pytest.mark.parametrize("allows_two", [True, False])
def test_a_table_beside_the_bar_of_a_training(allows_two: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where rich shows one display at a time, as before version 14.1, the rows are lines above the bar."""
    from rich.errors import LiveError
    from rich.live import Live

    sink, text = terminal(True)
    with make_bar(sink._console) as bar:
        bar.add_task("training", total=2)
        if not allows_two:

            def refuse(self: Live) -> None:
                raise LiveError("Only one live display may be active at once")

            monkeypatch.setattr(Live, "start", refuse)
        for step in (1, 2):
            sink.write(step, {"loss": 0.5})
    sink.close()
    assert ("│ 2 " in text.getvalue()) is allows_two
    assert ("training: step 2, loss 0.5" in text.getvalue()) is not allows_two


def test_what_can_be_a_sink(tmp_path: Path) -> None:
    class Own:
        def write(self, step: int, numbers: Mapping[str, float]) -> None: ...

        def close(self) -> None: ...

    found: list[Any] = []
    own = Own()
    opened = open_sinks([f"csv:{tmp_path / 'a.csv'}", own, lambda step, numbers: found.append((step, numbers))])
    assert isinstance(opened[0], CSVSink)
    assert opened[1] is own
    opened[2].write(3, {"a": 1.0})
    assert found == [(3, {"a": 1.0})]
    with (tmp_path / "a.txt").open("w") as file:
        for wrong in ("nonsense", "x" * 5000, 3, file, lambda: None):
            with pytest.raises(ConfigError, match="a sink must be a name"):
                open_sinks([wrong])  # type: ignore[list-item]


def test_a_monitor_writes_what_it_remembers(tmp_path: Path) -> None:
    path = tmp_path / "monitor.csv"
    model = tq.quantize(nn.Sequential(nn.Linear(4, 4)), "w4a8", torch.rand(2, 4))
    tq.calibrate(model, [torch.rand(8, 4)])
    tq.set_qmodule_state(model, tq.QModuleState.QUANT_AWARE_TRAIN)
    with Monitor(model, every=1, to=[f"csv:{path}"]) as monitor:
        for _ in range(3):
            model(torch.rand(8, 4)).sum().backward()
            monitor.step()
    remembered, written = series(monitor.history), series(read_looks(path))
    assert written.keys() == remembered.keys()
    for name, curve in remembered.items():
        assert written[name] == [(step, pytest.approx(number, rel=1e-8)) for step, number in curve], name
