"""The benchmark harness computes what it says, and every adapter trains. Nothing here is timed."""

from __future__ import annotations

import importlib.util
import json
import math
import statistics
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks import calibration, deploy, fake_quant, machine, monitor, qat_step, search_accuracy
from benchmarks.adapters import ADAPTERS
from benchmarks.adapters.base import AFFINE, CASES, WEIGHT, Adapter
from benchmarks.harness import BASELINE, CONTROL, Comparison, compare, memory_pass, percentile
from benchmarks.machine import machine_facts
from benchmarks.models import FUSED, build_float, image_batch
from benchmarks.results import Report, write_atomically
from benchmarks.saved_bytes import saved_bytes, state_tensors
from torchquant.quantizers_functional import affine_params, affine_quantize


def comparison(control: list[float], other: list[float]) -> Comparison:
    return Comparison({BASELINE: [1.0, 2.0, 4.0], "other": other, CONTROL: control})


def report_of(*groups: tuple[str, Comparison]) -> Report:
    report = Report("demo", "x", "saved", machine_facts(is_memory_kept=False), "python -m demo")
    for name, compared in groups:
        report.add(name, compared, {"other": 0.5}, target=1.5, saved_target=0.4)
    return report


def test_ratio_is_the_median_of_ratios_within_a_round() -> None:
    """A slow round slows both sides: medians of each side would say 6 / 2."""
    ratio = comparison([1.0, 2.0, 4.0], [3.0, 6.0, 4.0]).ratio("other")
    assert ratio.median == statistics.median([3.0, 3.0, 1.0]) == 3.0
    assert ratio.minima == 3.0
    assert ratio.ms == 4000.0
    assert (ratio.low, ratio.high) == (pytest.approx(1.4), 3.0)


def test_percentile_interpolates() -> None:
    assert percentile([0.0, 10.0], 0.25) == 2.5
    assert percentile([7.0], 0.9) == 7.0
    assert percentile([1.0, 2.0, 3.0], 1.0) == 3.0


@pytest.mark.parametrize(("control", "is_valid"), [(0.94, False), (0.96, True), (1.04, True), (1.06, False)])
def test_a_control_outside_its_limits_fails_the_comparison(control: float, is_valid: bool) -> None:
    assert comparison([control * s for s in (1.0, 2.0, 4.0)], [1.0, 2.0, 4.0]).is_valid is is_valid


def test_differences_below_the_noise_are_named() -> None:
    compared = comparison([1.0, 2.2, 4.0], [1.05, 2.1, 4.2])
    assert compared.noise == pytest.approx(0.08)
    assert compared.indistinct_pairs() == [(BASELINE, "other")]
    assert comparison([1.0, 2.2, 4.0], [1.5, 3.0, 6.0]).indistinct_pairs() == []


def test_every_round_calls_every_candidate_and_the_order_moves_on() -> None:
    calls: list[str] = []
    candidates = {name: (lambda name=name: calls.append(name)) for name in ("a", "b")}
    compared = compare(lambda: calls.append("base"), candidates, rounds=4, control=lambda: calls.append("control"))
    assert {len(seconds) for seconds in compared.seconds.values()} == {4}
    turns = calls[8:]  # two warm-up calls each before
    rounds = [turns[i : i + 4] for i in range(0, 16, 4)]
    assert rounds[0] == ["base", "a", "b", "control"]
    assert all(later == [*earlier[1:], earlier[0]] for earlier, later in pairwise(rounds))


def test_short_calls_are_repeated_to_fill_a_sample() -> None:
    count = [0]

    def call() -> None:
        count[0] += 1

    compare(lambda: None, {"counted": call}, rounds=1, sample_s=1e-4)
    assert count[0] > 10


def test_compare_refuses_what_it_cannot_mean() -> None:
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        compare(lambda: None, {}, rounds=0)
    with pytest.raises(ValueError, match="'control'.*another name"):
        compare(lambda: None, {CONTROL: lambda: None}, rounds=1)


class _SavesOne(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor, kept: Tensor) -> Tensor:
        ctx.save_for_backward(kept)
        return x * 1

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.saved_tensors[0], None


def test_saved_bytes_of_a_graph_counted_by_hand() -> None:
    x = torch.randn(10, 20, requires_grad=True)
    weight = nn.Parameter(torch.randn(20, 5))

    def forward() -> Tensor:
        y = x.exp()  # saves its result, 800 bytes
        z = y @ weight  # saves y again, and weight
        return z.relu().sum()  # saves the output of relu, 200 bytes

    assert saved_bytes(forward) == 800 + 400 + 200
    assert saved_bytes(forward, exclude=[weight]) == 800 + 200


def test_saved_bytes_sees_custom_functions_views_and_dropped_branches() -> None:
    x = torch.randn(100, requires_grad=True)
    mask = torch.ones(100, dtype=torch.int8)
    assert saved_bytes(lambda: _SavesOne.apply(x, mask)) == 100
    assert saved_bytes(lambda: _SavesOne.apply(x, mask[:10])) == 100  # the whole storage stays alive

    def dropped() -> Tensor:
        x.exp()  # nobody keeps this node
        return x * 2

    assert saved_bytes(dropped) == 0


def test_saved_bytes_excludes_the_state_of_a_model() -> None:
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3)).train()
    x = torch.randn(8, 4)
    statistics_bytes = 2 * 3 * 4  # mean and inverse deviation of the batch
    counted = saved_bytes(lambda: model(x), exclude=[x, *state_tensors(model)])
    assert counted == 8 * 3 * 4 + statistics_bytes


def test_table_marks_targets_noise_and_failed_controls() -> None:
    good, bad = comparison([1.0, 2.0, 4.0], [2.0, 4.0, 8.0]), comparison([2.0, 4.0, 8.0], [1.0, 2.0, 4.0])
    report = report_of(("quiet", good), ("noisy", bad))
    table = report.table()
    assert not report.is_valid
    assert "WARNING: noisy: the control left 0.95..1.05" in table
    assert "WARNING: quiet" not in table
    assert "<= 1.5 MISSED" in table
    assert "<= 1.5 unknown" in table
    assert "<= 0.4 MISSED" in table
    assert "quiet: differences below 0.0% are noise" in table
    assert report_of(("quiet", good)).is_valid


@pytest.mark.parametrize("suffix", ["json", "csv"])
def test_results_file_holds_rows_machine_and_command(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "deep" / f"results.{suffix}"
    report_of(("quiet", comparison([1.0, 2.0, 4.0], [2.0, 4.0, 8.0]))).write(path)
    text = path.read_text()
    assert torch.__version__ in text
    assert "python -m demo" in text
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    if suffix == "json":
        loaded = json.loads(text)
        assert loaded["valid"] is True
        assert loaded["groups"]["quiet"]["seconds"]["other"] == [2.0, 4.0, 8.0]
        assert {"cpu", "threads", "torch", "mallopt"} <= loaded["machine"].keys()
    else:
        assert len(text.splitlines()) == 1 + 3


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new \ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match=r"must end in .json or .csv, got 'a.txt'"):
        report_of().write(tmp_path / "a.txt")


class _FakeLibc:
    def __init__(self, answer: int) -> None:
        self.calls: list[tuple[int, int]] = []
        self.answer = answer

    def mallopt(self, parameter: int, value: int) -> int:
        self.calls.append((parameter, value))
        return self.answer


@pytest.mark.parametrize("answer", [0, 1])
def test_mallopt_reports_whether_it_took_effect(answer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    libc = _FakeLibc(answer)
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda _: libc)
    assert machine.keep_memory_mapped() is bool(answer)
    assert libc.calls[0] == (-3, 2**30)
    assert all(value < 2**31 for _, value in libc.calls)


def test_mallopt_is_ignored_where_libc_lacks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda _: object())
    assert machine.keep_memory_mapped() is False


def test_memory_pass_reads_and_writes_every_element(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Tensor] = []
    add = torch.add
    monkeypatch.setattr(torch, "add", lambda *args, out: written.append(add(*args, out=out)))
    memory_pass(16)()
    assert [tuple(y.shape) for y in written] == [(16,)]


def _params() -> list[object]:
    """The adapters; other libraries may warn as they like."""
    lenient = pytest.mark.filterwarnings("ignore")
    return [pytest.param(name, marks=() if name == "torchquant" else lenient) for name in ADAPTERS]


@pytest.fixture(params=_params())
def adapter(request: pytest.FixtureRequest) -> Adapter:
    chosen = ADAPTERS[request.param]
    if chosen.missing is not None:
        pytest.skip(chosen.missing)
    return chosen


@pytest.mark.parametrize("case", CASES)
def test_adapter_micro_call_has_finite_gradients(adapter: Adapter, case: str) -> None:
    layer = nn.Conv2d(4, 8, 3, bias=False)
    module = adapter.fake_quant(case, layer)
    if module is None:
        assert case not in (AFFINE, WEIGHT)
        return
    call = fake_quant.forward_backward(module, layer.weight)
    call()
    gradients = call()
    assert all(bool(torch.isfinite(g).all()) for g in gradients)
    assert gradients[0].count_nonzero() > 0
    quantized = module(layer.weight)
    assert quantized.shape == layer.weight.shape
    assert quantized.unique().numel() < 256 * 8
    if case == AFFINE:
        assert (quantized - layer.weight).abs().max() < 0.05


@pytest.mark.parametrize("name", ["plain", "torch"])
def test_reference_adapters_agree_with_the_functional_quantizer(name: str) -> None:
    x = torch.randn(1000, requires_grad=True)
    delta, zero_point, _, _ = affine_params(x.detach().min(), x.detach().max(), 8)
    quantized = ADAPTERS[name].fake_quant(AFFINE, nn.Identity())(x)
    wanted = affine_quantize(x, delta, zero_point, 256, gradient="clipped")
    assert (quantized - wanted).abs().max() < 1.01 * delta  # torch multiplies by 1 / delta: ties may fall either way
    assert torch.isclose(quantized, wanted, atol=1e-5).float().mean() > 0.99
    (gradient,) = torch.autograd.grad(quantized.sum(), x)
    assert gradient.mean() > 0.99


@pytest.mark.slow
def test_adapter_trains_every_parameter(adapter: Adapter) -> None:
    net = build_float("resnet18", 32)
    before = net.conv1.weight.clone()
    images, labels = image_batch(2, 32)
    step = qat_step.TrainingStep(adapter.quantize_model(net), images, labels)
    step()
    step()
    assert step.void_because() == ""
    assert math.isfinite(float(step.loss().detach()))
    assert step.saved_bytes() > 0
    assert torch.equal(net.conv1.weight, before)


def test_a_step_without_gradients_is_void() -> None:
    net = build_float("resnet18", 32)
    step = qat_step.TrainingStep(net, *image_batch(2, 32))
    step()
    net.fc.weight.grad = None
    net.fc.bias.grad.fill_(float("nan"))
    assert step.void_because() == "VOID: 2 of 62 parameters have no finite gradient"


@pytest.mark.parametrize("name", FUSED)
def test_every_model_is_built_and_quantized(name: str) -> None:
    net = build_float(name, 32)
    model = ADAPTERS["torchquant"].quantize_model(net)
    layers = sum(isinstance(m, nn.Conv2d | nn.Linear) for m in net.modules())
    weights = sum(hasattr(m, "weight_quantizer") and m.weight_quantizer is not None for m in model.modules())
    assert weights == layers


def test_adapter_calibrates(adapter: Adapter) -> None:
    model = adapter.quantize_model(build_float("resnet18", 32)).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    missing = torch.empty(0)
    adapter.calibrate(model, [image_batch(2, 32, seed)[0] for seed in range(2)])
    changed = [key for key, value in model.state_dict().items() if not torch.equal(value, before.get(key, missing))]
    assert len(changed) >= 20
    assert all("quantizer" in key for key in changed)


_TINY = ["--models", "resnet18", "--batch", "2", "--size", "32"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (fake_quant, ["--cases", AFFINE, "--sizes", "1M"]),
        (qat_step, _TINY),
        (calibration, [*_TINY, "--batches", "1"]),
        (calibration, [*_TINY, "--batches", "1", "--observer", "histogram", "--clock", "cpu"]),
    ],
    ids=["fake_quant", "qat_step", "calibration", "calibration-histogram"],
)
def test_commands_write_their_file(
    command: object, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results.json"
    common = ["--adapters", "torchquant", "brevitas", "--rounds", "1", "--threads", "1", "--no-mallopt"]
    threads = torch.get_num_threads()
    try:
        code = command.main([*arguments, *common, "--out", str(out)])
    finally:
        torch.set_num_threads(threads)
    written = json.loads(out.read_text())
    assert code == (0 if written["valid"] else 1)
    assert {BASELINE, CONTROL, "torchquant"} <= {row["name"] for row in written["rows"]}
    assert ("WARNING" in capsys.readouterr().out) is (not written["valid"])


@pytest.mark.slow
def test_the_cost_of_a_monitor_is_the_average_of_its_steps(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    words = ["--models", "resnet18", "--batch", "2", "--size", "32", "--rounds", "1", "--no-mallopt", "--out", str(out)]
    monitor.main(words)
    row = next(row for row in json.loads(out.read_text())["rows"] if row["name"] == monitor.LOOKED)
    assert row["saved"] == pytest.approx((row["ratio"] + 49) / 50, abs=1e-3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_deploy_writes_its_file_and_names_the_runtime_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("openvino", "nncf") else find_spec(name)
    )
    out = tmp_path / "results.json"
    small = ["--models", "resnet18", "--batch", "2", "--size", "32", "--batches", "1", "--rounds", "1", "--sample", "0"]
    threads = torch.get_num_threads()
    try:
        code = deploy.main([*small, "--threads", "1", "--no-mallopt", "--out", str(out)])
    finally:
        torch.set_num_threads(threads)
    written = json.loads(out.read_text())
    assert code == (0 if written["valid"] else 1)
    rows = {row["name"]: row for row in written["rows"]}
    both = {f"ort{mode} {name}" for mode in ("", " precise") for name in ("quantize_static", "torchquant")}
    assert {BASELINE, CONTROL, "ort float", *both} == rows.keys()
    assert {name for name, row in rows.items() if row["saved"] is not None} == {
        "ort torchquant",
        "ort precise torchquant",
    }
    for name in both:
        assert float(rows[name]["note"].split()[1]) > 5, "the int8 model does not compute what the float model does"
    assert "openvino: skipped, openvino and nncf not installed" in capsys.readouterr().out


def test_deploy_divides_ours_by_the_runtimes_own_round_by_round() -> None:
    rows = deploy.Rows()
    rows.add("ort", "own", theirs=lambda: np.zeros(1), ours=lambda: np.zeros(1))
    seconds = {BASELINE: [9.0, 9.0, 9.0], "ort own": [1.0, 2.0, 8.0], "ort torchquant": [1.1, 2.2, 4.0]}
    assert rows.over_own(Comparison(seconds)) == {"ort torchquant": pytest.approx(1.1)}
    assert deploy.sqnr_db(np.array([1.1, 0.0]), np.array([1.0, 0.0])) == pytest.approx(20)


@pytest.mark.slow
def test_searched_plans_are_compared_with_single_schemes_and_runs_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    kinds = ["clipq", "qss", "qss-model", "qpl", "allocate"]
    command = ["--nets", "demo", "--bits", "2", "--seeds", "1", "--out", str(tmp_path), "--float-epochs", "1"]
    command += ["--epochs", "2", "--search-epochs", "1", "--kinds", *kinds]
    assert search_accuracy.main(command) == 0
    rows = json.loads((tmp_path / "results.json").read_text())
    assert {row["kind"] for row in rows} == set(kinds)
    assert all(row["mean_bits"] <= 2.0 for row in rows)
    capsys.readouterr()
    assert search_accuracy.main(command) == 0
    assert "seed0:" not in capsys.readouterr().out


def test_a_failed_control_ends_with_exit_code_one(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = comparison([2.0, 4.0, 8.0], [1.0, 2.0, 4.0])
    monkeypatch.setattr(fake_quant, "compare", lambda *_, **__: bad)
    monkeypatch.setattr(fake_quant, "SIZES", {"1M": 64})
    assert fake_quant.main(["--cases", AFFINE, "--sizes", "1M", "--adapters", "plain", "--no-mallopt"]) == 1
    monkeypatch.setattr(fake_quant, "compare", lambda *_, **__: comparison([1.0, 2.0, 4.0], [9.0, 9.0, 9.0]))
    assert fake_quant.main(["--cases", AFFINE, "--sizes", "1M", "--adapters", "plain", "--no-mallopt"]) == 0


def test_an_out_file_of_another_kind_is_refused_before_measuring(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        qat_step.arguments(["--out", "results.txt"])
    assert "must end in .json or .csv" in capsys.readouterr().err
