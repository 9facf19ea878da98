"""A monitor sees what a slow recomputation on whole tensors finds, and a training does not notice it."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torchquant as tq
from tests.processes import run_ranks
from tests.training.test_weight_slot_users import TOKENS, network
from torchquant.errors import ConfigError
from torchquant.qmodule import QModuleState, QWrapper
from torchquant.quantizers import QUANTIZERS, Quantizer
from torchquant.quantizers._laws.devices import FakeDevice
from torchquant.training import Monitor, OscillationTracker, read_looks, series
from torchquant.training.looks import spread_positions

X = torch.rand(4, 3, 8, 8)
SHARES = ("below", "above", "dead_codes", "flips", "oscillation", "flipped_never", "flips_by_1")


def conv_net(weight: str = "affine:4,symmetric=narrow/channel", output: str | None = "affine:4") -> nn.Module:
    return copy.deepcopy(made_once(weight, output))


@functools.cache
def made_once(weight: str, output: str | None) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 5))
    model = tq.quantize(net, [{"weight": weight, "output": output}], X)
    tq.calibrate(model, [X])
    tq.set_qmodule_state(model, QModuleState.QUANT_AWARE_TRAIN)
    return model


def train(model: nn.Module, n_steps: int, after: Callable[[], object], rate: float = 0.1, x: Tensor = X) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for _ in range(n_steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        after()


def last(monitor: Monitor) -> dict[str, float | None]:
    return dict(monitor.history[-1].numbers)


def to_threshold(w: np.ndarray, levels: np.ndarray, thresholds: np.ndarray) -> float:
    """The distance of one number to its nearest threshold, in distances of the levels beside that."""
    place = int(np.searchsorted(thresholds, w))
    beside = [i for i in (place - 1, place) if 0 <= i < len(thresholds)]
    return min(min(abs(w - thresholds[i]) / (levels[i + 1] - levels[i]), 1.0) for i in beside)


class Oracle:
    """The figures of one weight by Python loops over all elements, from the public methods of its quantizer alone."""

    def __init__(self, slot: Any) -> None:
        self.slot = slot
        self.codes = self.encoded()
        self.direction = np.zeros_like(self.codes)
        self.flips = np.zeros_like(self.codes)
        self.levels = slot.quantizer.levels().double().numpy()

    def encoded(self) -> np.ndarray:
        codes: np.ndarray = self.slot.quantizer.encode(self.slot.seen()).numpy().astype(np.int64).ravel()
        return codes

    def figures(self) -> dict[str, float]:
        quantizer: Quantizer = self.slot.quantizer
        w = self.slot.seen().detach()
        codes, turned = self.encoded(), 0
        for i, (new, old) in enumerate(zip(codes, self.codes, strict=True)):
            change = int(np.sign(new - old))
            turned += change * self.direction[i] < 0
            self.direction[i] = change or self.direction[i]
            self.flips[i] += change != 0
        size = np.abs(codes - self.codes)
        self.codes = codes
        real = w.double().numpy()
        noise = real - quantizer(w).detach().double().numpy()
        levels, thresholds = quantizer.levels().double().numpy(), quantizer.thresholds().double().numpy()
        rows = real.reshape(len(real), -1) if levels.ndim == 2 else real.reshape(1, -1)
        each = zip(rows, np.atleast_2d(levels), np.atleast_2d(thresholds), strict=True)
        distances = [to_threshold(number, *beside) for row, *beside in each for number in row]
        low, high = quantizer.code_range
        ends = np.atleast_2d(levels)[:, [0, -1]]
        steps = (
            np.atleast_2d(self.levels[..., -1] - self.levels[..., 0]),
            np.atleast_2d(levels[..., -1] - levels[..., 0]),
        )
        self.levels = levels
        gradients = [p.grad.double().square().sum() for p in quantizer.parameters() if p.grad is not None]
        return {
            "sqnr": 10 * math.log10(np.square(real).sum() / np.square(noise).sum()),
            "dead_codes": 1 - len(np.unique(codes)) / (high - low + 1),
            "distance": float(np.mean(distances)),
            "scale": float(np.mean((ends[:, 1] - ends[:, 0]) / (high - low))),
            "scale_drift": float(np.mean(np.abs(steps[1] - steps[0]) / steps[0])),
            "flips": float(np.mean(size > 0)),
            "flips_by_1": float(np.mean(size == 1)),
            "flips_by_2": float(np.mean(size == 2)),
            "flips_by_more": float(np.mean(size > 2)),
            "oscillation": turned / len(codes),
            "flipped_never": float(np.mean(self.flips == 0)),
            "flipped_once": float(np.mean(self.flips == 1)),
            "flipped_twice": float(np.mean(self.flips == 2)),
            "flipped_more": float(np.mean(self.flips > 2)),
            **({"scale_gradient": math.sqrt(sum(gradients))} if gradients else {}),
        }


@pytest.mark.parametrize(
    "spec",
    [
        "affine:4,symmetric=narrow/channel",
        "affine:3",
        "lsq:4/channel",
        "esb:4,k=1/channel",
        "ternary",
        "binary",
        "nf4:4",
    ],
)
def test_figures_of_a_weight_are_those_of_a_slow_recomputation(spec: str) -> None:
    model = conv_net(spec)
    monitor = Monitor(model, every=1, samples=None)
    oracle = Oracle(model[0].weight_slots()[0])
    seen = set()

    def compare() -> None:
        with torch.no_grad():
            model[0].weight.add_(torch.randn(6, 3, 3, 3), alpha=0.05)
        monitor.step()
        numbers = last(monitor)
        for name, expected in oracle.figures().items():
            assert numbers[f"0/weight/{name}"] == pytest.approx(expected, rel=1e-4, abs=1e-6), name
            seen.update({name} if expected else ())

    train(model, 8, compare, rate=0.01)
    assert seen >= {"flips", "oscillation", "flipped_once", "sqnr", "distance"}


def test_figures_of_activations_are_those_of_what_their_quantizer_did() -> None:
    model = conv_net(output="affine:3")
    quantizer, calls = model[0].acts_quantizer, []
    quantizer.register_forward_hook(lambda *call: calls.append((call[1][0], call[2], call[3])), with_kwargs=True)
    monitor = Monitor(model, every=1, samples=None)

    def compare() -> None:
        numbers, (x, given, y) = last(monitor), calls[-1]
        real, made = (
            t.detach().double().numpy() for t in (x.clamp(*given.get("clamp", (None, None))) if given else x, y)
        )
        step = float(quantizer.affine_params().delta)
        assert numbers["0/output/sqnr"] == pytest.approx(
            10 * math.log10(np.square(real).sum() / np.square(real - made).sum()), rel=1e-4
        )
        assert numbers["0/output/above"] == pytest.approx(np.mean(real > made.max() + step / 2), abs=1e-6)
        assert numbers["0/output/below"] == pytest.approx(np.mean(real < made.min() - step / 2), abs=1e-6)
        assert numbers["0/output/dead_codes"] == pytest.approx(1 - len(np.unique(made)) / 8)
        assert numbers["0/output/scale"] == pytest.approx(step)

    train(model, 3, lambda: (monitor.step(), compare()))


def wrapper(spec: str, output: str | None = None) -> QWrapper:
    layer = nn.Linear(4, 4, bias=False)
    made = tq.make_quantizer(spec), None if output is None else tq.make_quantizer(output, "output")
    return QWrapper(layer, *made)


def test_planted_oscillation_is_counted() -> None:
    model = wrapper("affine:3,symmetric=narrow")
    model.weight_quantizer.observer.force_ranges(-3.0, 3.0)
    with torch.no_grad():
        model.weight.copy_(torch.zeros(4, 4))
    monitor, tracker = Monitor(model, every=1, samples=None), OscillationTracker(model, momentum=1.0)
    for step in range(1, 7):
        with torch.no_grad():
            model.weight[0] = float(step % 2)  # a quarter goes to and fro, by 1
            model.weight[1, :2] += 0.5 * (step % 2)  # an eighth drifts
            model.weight[2, 0] = 3.0 * (step % 2)  # a sixteenth, by 3
        monitor.step()
        tracker.step()
        numbers = last(monitor)
        assert numbers["root/weight/oscillation"] == (5 / 16 if step > 1 else 0.0)
        assert numbers["root/weight/flips_by_more"] == 1 / 16
        assert numbers["root/weight/oscillation"] == tracker.report()[0].oscillating
    assert numbers["root/weight/flipped_more"] == 5 / 16
    assert numbers["root/weight/flipped_never"] == 9 / 16
    assert numbers["weight/oscillation"] == 5 / 16


def test_planted_dead_codes_and_clipping_are_counted() -> None:
    model = wrapper("affine:2,symmetric=false", "affine:2,symmetric=false")
    model.weight_quantizer.observer.force_ranges(0.0, 3.0)
    model.acts_quantizer.observer.force_ranges(0.0, 3.0)
    with torch.no_grad():
        model.weight.copy_(torch.eye(4) * torch.tensor([1.0, 1.0, 1.0, 9.0]) - 2.0 * torch.eye(4).roll(1, 0))
    tq.set_qmodule_state(model, QModuleState.QUANT_EVAL)
    monitor = Monitor(model, every=1, samples=None)
    model(torch.tensor([[1.0, 1.0, 1.0, 9.0]]))
    monitor.step()
    numbers = last(monitor)
    assert numbers["root/weight/below"] == 4 / 16
    assert numbers["root/weight/above"] == 1 / 16
    assert numbers["root/weight/dead_codes"] == 1 / 4  # there is no 2
    assert numbers["root/output/above"] == 1 / 4  # 1, 1, 1 and 27
    assert numbers["root/output/dead_codes"] == 2 / 4


@pytest.mark.parametrize("name", QUANTIZERS)
def test_every_scheme_is_watched(name: str) -> None:
    kind = QUANTIZERS[name]
    for axis in (None, 0):
        example = kind.examples(axis)[0] if name not in ("mx", "nvfp4") or axis is None else None
        layer = nn.Conv2d(4, 8, 3)
        model = QWrapper(layer, copy.deepcopy(example) if "weight" in kind.sites else None, kind.examples(None)[0])
        tq.set_qmodule_state(model, QModuleState.QUANT_AWARE_TRAIN)
        x = torch.rand(2, 4, 6, 6)
        model(x)
        monitor = Monitor(model, every=2, samples=64)
        train(model, 4, monitor.step, rate=0.01, x=x)
        numbers = last(monitor)
        assert numbers.get("activation/dead_codes") == numbers["root/output/dead_codes"]
        for key, number in numbers.items():
            assert number is None or not math.isnan(number), key
            assert number is None or not key.endswith(SHARES) or 0.0 <= number <= 1.0, key
        quantizer = model.acts_quantizer
        assert (numbers["root/output/sqnr"] is None) == (not quantizer.is_idempotent)


def test_every_kind_of_module_is_watched() -> None:
    model = network()
    monitor = Monitor(model, every=2)
    train(model, 2, monitor.step, x=TOKENS)
    numbers = last(monitor)
    places = {name.rpartition("/")[0] for name in numbers}
    assert places >= {"table/weight", "lstm/weight_ih_l0", "attention/out_proj.weight", "head/weight", "lstm/output"}
    silent = {name.rpartition("/")[2] for name, number in numbers.items() if number is None}
    assert silent == {"scale_gradient", "dead_codes"}  # nothing is learned, and outputs have fewer elements than codes


def test_a_quantizer_in_two_places_counts_once() -> None:
    head = wrapper("affine:4", "affine:4")
    head.observe_weight()
    places = {site.key for site in Monitor(nn.ModuleDict({"a": head, "b": nn.Sequential(head)}))._each()}
    assert places == {"a/weight", "a/output"}


def test_the_calls_of_a_shared_module_are_added() -> None:
    model = wrapper("affine:4", "affine:4,symmetric=false")
    model.acts_quantizer.observer.force_ranges(0.0, 1.0)
    model.observe_weight()
    with torch.no_grad():
        model.weight.copy_(torch.eye(4))
    tq.set_qmodule_state(model, QModuleState.QUANT_EVAL)
    monitor = Monitor(model, every=1, samples=None)
    model(torch.full((3, 4), 0.5))
    model(torch.full((1, 4), 7.0))
    monitor.step()
    assert last(monitor)["root/output/above"] == 1 / 4


class Drawn(Quantizer):
    """Of a user: it has no codes, and draws a step for each element."""

    n_bits = 8

    def quantize(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.rand_like(x)


def test_a_training_does_not_notice() -> None:
    """The same numbers bit for bit, with numbers that are drawn and with dropout."""

    def trained(watch: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(
            wrapper("binary"),
            nn.Dropout(0.5),
            QWrapper(nn.Linear(4, 4), Drawn(), Drawn()),
            QWrapper(nn.Linear(4, 4), None, tq.make_quantizer("bnn:1,stochastic=true", "output")),
        )
        tq.set_qmodule_state(model, QModuleState.QUANT_AWARE_TRAIN)
        monitor = Monitor(model, every=2) if watch else None
        train(model, 5, monitor.step if monitor else lambda: None, x=torch.rand(3, 4))
        if monitor:
            assert last(monitor)["2/weight/sqnr"] is not None
            assert last(monitor)["2/weight/flips"] is None
        return dict(model.state_dict())

    with_it, without = trained(True), trained(False)
    assert all(torch.equal(with_it[name], without[name]) for name in without)


@pytest.mark.parametrize("n_elements", [5000, 4096 * 27, 512 * 512 * 9, 1 << 24])
def test_positions_are_different_and_cover_every_part(n_elements: int) -> None:
    found = spread_positions(n_elements, 4096, torch.device("cpu"))
    assert found is not None
    assert len(found.unique()) == 4096
    assert int(found.max()) < n_elements
    parts = torch.histc(found.double(), 16, 0, n_elements)
    assert parts.max() - parts.min() <= 4
    for stride in (3, 9, 27, 64):
        if n_elements % stride == 0:
            counts = torch.bincount(found % stride, minlength=stride)
            assert int(counts.max() - counts.min()) <= 64 * 4096 // stride // 16


def test_a_sample_is_near_the_whole() -> None:
    big = QWrapper(
        nn.Linear(300, 200),
        tq.make_quantizer("affine:4,symmetric=narrow/channel"),
        tq.make_quantizer("affine:4", "output"),
    )
    tq.set_qmodule_state(big, QModuleState.QUANT_AWARE_TRAIN)
    x = torch.randn(500, 300)
    big(x)
    some, every = Monitor(big, every=2), Monitor(big, every=2, samples=None)
    train(big, 2, lambda: (some.step(), every.step()), rate=1.0, x=x)
    for name, number in last(every).items():
        if number is not None and "dead_codes" not in name:
            assert last(some)[name] == pytest.approx(number, rel=0.05, abs=0.02), name


def test_the_state_is_saved() -> None:
    def made() -> tuple[nn.Module, Monitor]:
        model = conv_net("lsq:4/channel")
        return model, Monitor(model, every=2)

    model, monitor = made()
    train(model, 7, monitor.step)
    saved = copy.deepcopy((model.state_dict(), monitor.state_dict()))
    train(model, 3, monitor.step)
    again, resumed = made()
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1], strict=True)
    assert resumed.n_steps == 7
    train(again, 3, resumed.step)
    assert [look.step for look in resumed.history] == [8, 10]
    assert last(resumed) == last(monitor)
    other = conv_net("lsq:4/channel")
    with pytest.raises(RuntimeError, match="size mismatch"):
        Monitor(other, samples=10).load_state_dict(saved[1])
    with pytest.raises(ConfigError, match=r"the state is of a monitor of \d+ quantizers, and this one watches 2"):
        Monitor(wrapper("affine:8", "affine:4")).load_state_dict(saved[1])


def test_the_state_is_plain_tensors(tmp_path: Path) -> None:
    monitor = Monitor(conv_net())
    torch.save(monitor.state_dict(), tmp_path / "state.pt")
    monitor.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))


@pytest.mark.parametrize("spec", ["affine:8,symmetric=narrow/channel", "lsq:4/channel", "esb:4,k=1", "nf4:4", "ttq"])
def test_a_look_on_a_device_waits_for_nothing(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a fake GPU, where operations that wait or mix devices raise, with numbers on their way and no event to ask."""
    model = wrapper(spec, "affine:4")
    tq.set_qmodule_state(model, QModuleState.QUANT_AWARE_TRAIN)
    model(torch.randn(3, 4)).sum().backward()
    device = FakeDevice()
    moved, x = device.copy(model), device.tensor(torch.randn(3, 4))
    for parameter in moved.parameters():
        parameter.grad = device.tensor(torch.ones_like(parameter, device="cpu"))

    class Event:
        def __init__(self, device: torch.device) -> None:
            assert device.type == "cuda"

        def record(self, stream: object) -> None: ...

        def query(self) -> bool:
            return False

    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: None)
    with device.watch():
        monitor = Monitor(moved, every=1)
        moved(x)
        monitor.step()
        assert monitor._pending is not None


def test_a_model_may_move_after_its_monitor_was_made() -> None:
    model = wrapper("affine:8,symmetric=narrow/channel", "affine:4")
    tq.set_qmodule_state(model, QModuleState.QUANT_AWARE_TRAIN)
    model(torch.randn(3, 4))
    monitor, device = Monitor(model, every=1), FakeDevice()
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            held.update({name: device.tensor(tensor) for name, tensor in held.items() if tensor is not None})
    with device._mode:
        found = [site.look(None) for site in monitor._each()]
    assert {value.device.type for sums in found for value in sums.values()} == {"cuda"}


def test_numbers_are_written_when_they_have_come(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []
    model = conv_net()
    monitor = Monitor(model, every=2, to=lambda step, numbers: found.append(step))
    is_there = False
    monkeypatch.setattr("torchquant.training.monitor._Sent.is_there", property(lambda self: is_there))
    train(model, 3, monitor.step)
    assert found == []
    is_there = True
    train(model, 1, monitor.step)
    assert found == [2, 4]
    is_there = False
    train(model, 3, monitor.step)
    assert found == [2, 4]
    monitor.close()
    assert found == [2, 4, 6]


def test_hooks_are_there_only_when_they_are_needed() -> None:
    model = conv_net()
    n_hooks = lambda: len(model[0].acts_quantizer._forward_hooks)  # noqa: E731
    monitor = Monitor(model, every=3)
    counts: list[int] = []
    train(model, 6, lambda: (monitor.step(), counts.append(n_hooks())))
    assert counts == [0, 1, 0, 0, 1, 0]
    train(model, 2, monitor.step)
    monitor.close()
    assert n_hooks() == 0


def test_a_model_can_be_copied_and_pickled_while_it_is_watched() -> None:
    model = conv_net()
    monitor = Monitor(model, every=1, to=lambda step, numbers: None)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other(X)
    with pytest.warns(UserWarning, match="saw no activation in step 1"):
        monitor.step()
    assert last(monitor)["0/output/sqnr"] is None  # only the copies have run


def test_forwards_without_gradients_do_not_count() -> None:
    model = conv_net()
    monitor = Monitor(model, every=1, samples=None)
    model(X)
    tq.evaluate(model, [(100 * X, torch.zeros(4, dtype=torch.int64))])
    with torch.no_grad():
        model(100 * X)
    monitor.step()
    assert last(monitor)["0/output/above"] < 0.1  # type: ignore[operator]


def test_numbers_of_the_caller_are_written_with_a_look() -> None:
    monitor = Monitor(conv_net(output=None), every=2)
    for loss in (3.0, 2.0, 1.0, 0.5):
        monitor.step({"loss": torch.tensor(loss), "rate": 0.1})
    assert series(monitor.history)["loss"] == [(2, 2.0), (4, 0.5)]
    assert series(monitor.history)["rate"] == [(2, 0.1), (4, 0.1)]
    monitor.step()
    with pytest.raises(ConfigError, match="loss must be a tensor with one number"):
        monitor.step({"loss": torch.ones(2)})


def test_a_compiled_model_is_told_about() -> None:
    model = conv_net()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    monitor = Monitor(model, every=2)
    compiled(X).sum().backward()
    monitor.step()
    compiled(X).sum().backward()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        monitor.step()
    numbers = last(monitor)
    assert numbers["0/weight/sqnr"] is not None
    assert (numbers["0/output/sqnr"] is None) == any("saw no activation" in str(w.message) for w in caught)


def test_what_is_not_there_to_watch() -> None:
    with pytest.raises(ConfigError, match="has no quantizers to look at"):
        Monitor(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="every must be a whole number >= 1"):
        Monitor(conv_net(), every=0)


def test_sharded_weights_are_refused() -> None:
    model = conv_net()
    model[0].weight.full_tensor = lambda: None  # as a DTensor has it
    with pytest.raises(ConfigError, match="parameters of 0 are sharded over ranks"):
        Monitor(model)


def test_quantizers_without_ranges_are_watched_from_their_first_batch_on() -> None:
    model = tq.quantize(nn.Sequential(nn.Linear(4, 4)), "w4a4-lsq", torch.rand(2, 4))
    monitor = Monitor(model, every=1)
    monitor.step()
    assert set(last(monitor).values()) == {None}
    tq.set_qmodule_state(model, QModuleState.QUANT_AWARE_TRAIN)
    x = torch.rand(8, 4)
    for expected in (None, 0.0):
        model(x).sum().backward()
        monitor.step()
        assert last(monitor)["0/weight/flips"] == expected


def watched_rank(rank: int, port: int, folder: str) -> None:
    import os

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    model = conv_net()
    parallel = nn.parallel.DistributedDataParallel(model)
    monitor = Monitor(parallel, every=2, to=f"csv:{folder}/monitor.csv")
    train(parallel, 4, monitor.step, x=X * (rank + 1))
    monitor.close()
    seen = [look.numbers["module.0/weight/flips"] for look in monitor.history]
    both: list[Any] = [None, None]
    torch.distributed.all_gather_object(both, seen)
    assert both[0] == both[1]
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_every_rank_looks_and_the_first_one_writes(tmp_path: Path) -> None:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run_ranks(watched_rank, port, str(tmp_path))
    assert [look.step for look in read_looks(tmp_path / "monitor.csv")] == [2, 4]


def test_other_ranks_open_no_sinks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchquant.training.monitor.is_first_rank", lambda: False)
    monitor = Monitor(conv_net(output=None), every=1, to=f"csv:{tmp_path / 'monitor.csv'}")
    monitor.step()
    assert last(monitor)["weight/flips"] == 0.0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("lean", [True, False])
def test_lean_training_is_watched(lean: bool) -> None:
    model = conv_net()
    tq.set_lean(model, lean)
    monitor = Monitor(model, every=2, samples=None)
    train(model, 4, monitor.step)
    assert last(monitor)["0/output/sqnr"] == pytest.approx(LEAN.setdefault("sqnr", last(monitor)["0/output/sqnr"]))


LEAN: dict[str, float | None] = {}


def test_fit_goes_on_with_its_monitor(tmp_path: Path) -> None:
    """A training that is stopped after an epoch and resumed writes and sees the same as one that is not."""
    batches = [(X, torch.randint(5, (4,))) for _ in range(3)]

    def fitted(name: str, epochs: int, stop: bool = False) -> Monitor:
        model = conv_net("lsq:4/channel")
        monitor = Monitor(model, every=2, to=f"csv:{tmp_path / name}.csv")

        def after(epoch: int, loss: float) -> None:
            if stop:
                raise KeyboardInterrupt

        with contextlib.suppress(KeyboardInterrupt):
            tq.fit(model, batches, epochs, 1e-2, on_epoch=after, progress=tmp_path / f"{name}.pt", monitor=monitor)
        monitor.close()
        return monitor

    whole = fitted("whole", 3)
    fitted("parts", 3, stop=True)
    parts = fitted("parts", 3)
    assert parts.n_steps == 9
    assert (tmp_path / "parts.csv").read_text() == (tmp_path / "whole.csv").read_text()
    assert [look.step for look in whole.history] == [2, 4, 6, 8]
    assert "loss" in last(whole)
