"""Ranges that are searched: once, when asked for; and as good as any on spiky, bounded and one-sided data."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torchquant as tq
from torchquant import QModuleState
from torchquant.errors import NonFiniteError
from torchquant.quantizers_functional.affine import AffineParams, quantize_uniform
from torchquant.range_observers import (
    OBSERVERS,
    ACIQObserver,
    EntropyObserver,
    HistogramObserver,
    MSEObserver,
    PercentileObserver,
    RangeObserver,
)
from torchquant.range_observers._histogram import histogram
from torchquant.range_observers._least_error import SquaredError

SEARCHED = ("histogram", "mse", "entropy")


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def normal(n: int = 100_000) -> Tensor:
    return torch.randn(n, generator=generator())


def heavy(n: int = 100_000) -> Tensor:
    return normal(n) * torch.rand(n, generator=torch.Generator().manual_seed(1)).clamp_min(1e-3).rsqrt()


DATA: dict[str, Callable[[], Tensor]] = {
    "gaussian": normal,
    "heavy tails": heavy,
    "relu": lambda: normal().relu(),
    "rare and large": lambda: ((normal() - 2.5).relu() * 50).clamp(max=216.0),
    "relu6": lambda: (normal() * 4).clamp(0.0, 6.0),
    "gelu": lambda: nn.functional.gelu(heavy() * 2),
    "silu": lambda: nn.functional.silu(heavy() * 2),
    "sigmoid": lambda: (normal() * 6 - 12).sigmoid(),
    "two classes": lambda: torch.cat([torch.full((999,), 0.01), torch.full((99,), 0.99)]) + normal(1098) * 1e-3,
    "few outliers": lambda: torch.cat([normal(), torch.tensor([-80.0, 195.0])]),
    "a constant": lambda: torch.full((100,), 3.0),
    "shifted": lambda: normal() + 5.0,
    "below 0": lambda: -heavy().abs(),
}


def mean_square(x: Tensor, low: float, high: float, n_bits: int = 8, symmetric: bool | str = False) -> float:
    quantizer = tq.AffineQuantizer(n_bits, tq.BatchMinMax(), symmetric).double()
    quantizer.observer.force_ranges(low, high)
    return float((quantizer(x.double()) - x.double()).square().mean())


def shown(observer: RangeObserver, *batches: Tensor) -> tuple[float, float]:
    for batch in batches:
        observer.observe_batch(batch)
    low, high = observer.get_ranges()
    return float(low), float(high)


def made(name: str, site: str = "output", n_bits: int = 8) -> RangeObserver:
    return tq.make_quantizer(f"affine:{n_bits},observer={name}", site=site).observer


# ------------------------------------------------------------------------------------------------ searched once
@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the observers that searched, one a search."""
    done: list[str] = []
    for kind in (HistogramObserver, MSEObserver, EntropyObserver):

        def choose(self: HistogramObserver, *args: Tensor, former=kind.choose) -> tuple[Tensor, Tensor]:  # noqa: ANN001
            done.append(type(self).__name__)
            return former(self, *args)

        monkeypatch.setattr(kind, "choose", choose)
    return done


@pytest.mark.parametrize("name", SEARCHED)
def test_batches_are_counted_and_the_range_is_searched_when_asked_for(name: str, searches: list[str]) -> None:
    observer = made(name)
    for _ in range(3):
        observer.observe_batch(normal(500))
    assert searches == []
    first = shown(observer)
    assert shown(observer) == first == (float(observer.range_min), float(observer.range_max))
    assert len(searches) == 1
    observer.observe_batch(normal(500) * 2)
    observer.state_dict()
    observer.get_ranges()
    assert len(searches) == 2


def test_leaving_calibration_searches_once_a_site_and_evaluation_never(searches: list[str]) -> None:
    rules = [{"weight": "affine:4,observer=mse/channel", "output": "affine:8,observer=entropy"}]
    model = tq.quantize(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)), rules, torch.randn(2, 6))
    tq.set_qmodule_state(model, QModuleState.CALIBRATION)
    for _ in range(4):
        model(torch.randn(8, 6))
    assert searches == ["MSEObserver"] * 2  # of weights, which did not change
    tq.set_qmodule_state(model, QModuleState.QUANT_EVAL)
    assert searches[2:] == ["EntropyObserver"] * 2
    model(torch.randn(8, 6))
    assert len(searches) == 4
    report = tq.state_report(model)
    assert "range_max" in str(report)
    assert all(np.isfinite(value) for value in report.scalars().values())


@pytest.mark.parametrize("layer", [nn.Embedding(7, 4), nn.GRU(4, 4), nn.MultiheadAttention(4, 2)], ids=type)
def test_unchanged_weights_of_modules_with_several_are_searched_once(layer: nn.Module, searches: list[str]) -> None:
    names = tq.qmodule.weights.weight_names(layer)
    quantizers = {name: tq.make_quantizer("affine:4,observer=mse/channel") for name in names}
    module = tq.qmodule.QWeights(layer, quantizers)
    x = torch.tensor([[1, 2]]) if isinstance(layer, nn.Embedding) else torch.randn(3, 2, 4)
    args = (x, x, x) if isinstance(layer, nn.MultiheadAttention) else (x,)
    with tq.qmodule_state(module, QModuleState.CALIBRATION):
        for _ in range(3):
            module(*args)
        assert len(searches) == len(names)
        with torch.no_grad():
            next(layer.parameters()).mul_(2.0)
        module(*args)
    assert len(searches) == 2 * len(names)


@pytest.mark.parametrize("name", SEARCHED)
@pytest.mark.parametrize("axis", [None, 1])
def test_what_was_put_off_is_in_every_copy(name: str, axis: int | None) -> None:
    def fresh() -> RangeObserver:
        bits = {} if name == "histogram" else {"n_bits": 4}
        return OBSERVERS[name](**bits, decay=1.0, axis=axis)

    observer = fresh()
    batches = [torch.randn(40, 3), 3 * torch.randn(40, 3)]
    for batch in batches:
        observer.observe_batch(batch)
    file = io.BytesIO()
    torch.save(observer.state_dict(), file)
    file.seek(0)
    loaded = fresh()
    loaded.load_state_dict(torch.load(file, weights_only=True))
    again = fresh()
    for batch in batches:
        again.observe_batch(batch)
    for other in (loaded, copy.deepcopy(again), pickle.loads(pickle.dumps(again)), again.double().float()):
        for found, expected in zip(other.get_ranges(), observer.get_ranges(), strict=True):
            assert torch.equal(found, expected)
    observer.observe_batch(batches[0])
    observer.force_ranges(*((-1.0, 1.0) if axis is None else (-torch.ones(3), torch.ones(3))))
    assert bool((observer.get_ranges()[1] == 1.0).all())


def test_checkpoints_with_and_without_counts_load() -> None:
    """Files written when every observer kept its counts, and observers that differ in `decay`."""
    x = torch.randn(4, 50)
    for decay in (0.0, 1.0):
        observer = MSEObserver(4, decay=decay, axis=0)
        former = {
            "range_min": torch.full((4,), -1.5),
            "range_max": torch.full((4,), 1.25),
            "histogram_min": x.amin(1),
            "histogram_max": x.amax(1),
            "counts": histogram(x, x.amin(1), x.amax(1), 2048),
            "observed_weight": torch.ones(()),
        }
        observer.load_state_dict(former)
        assert bool((observer.get_ranges()[0] == -1.5).all())
        assert bool((observer.get_ranges()[1] == 1.25).all())
        observer.observe_batch(x)
        assert float(observer.get_ranges()[1].max()) == pytest.approx(float(x.max()), rel=0.5)
    weights, acts = MSEObserver(4, axis=0), MSEObserver(4, decay=1.0, axis=0)
    weights.observe_batch(x)
    assert weights.counts.numel() == 0
    acts.load_state_dict(weights.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(acts.get_ranges(), weights.get_ranges(), strict=True))


def test_former_pickles_go_on() -> None:
    """Written when every observer kept its counts, and had no range to choose."""
    for observer in (MSEObserver(4, axis=0), EntropyObserver(4, decay=1.0)):
        observer.observe_batch(torch.randn(4, 50))
        ranges = observer.get_ranges()
        state = copy.deepcopy(observer.__dict__)
        for later in ("_is_range_due", "_bins", *(["symmetric"] if isinstance(observer, EntropyObserver) else [])):
            state.pop(later, None)
        state["widths"] = {"counts": 2048}
        shape = (*observer.histogram_min.shape, 2048)
        state["_buffers"]["counts"] = torch.ones(shape, dtype=torch.float64)
        former = type(observer).__new__(type(observer))
        former.__setstate__(state)
        assert all(torch.equal(a, b) for a, b in zip(former.get_ranges(), ranges, strict=True))
        former.observe_batch(torch.randn(4, 50))
        assert bool(former.get_ranges()[1].isfinite().all())


def test_several_calls_a_batch_are_one_batch_also_without_decay() -> None:
    first, second, whole = torch.randn(300), 5 * torch.randn(200), MSEObserver(4)
    observer = MSEObserver(4)
    observer.n_calls = 2
    for _ in range(2):
        for call in (first, second):
            observer.observe_batch(call)
    assert shown(observer) == pytest.approx(shown(whole, torch.cat([first, second])), rel=1e-3)


class _Observing(nn.Module):
    def __init__(self, quantizer: tq.Quantizer, quantizes: bool) -> None:
        super().__init__()
        self.quantizer, self.quantizes = quantizer, quantizes

    def forward(self, x: Tensor) -> Tensor:
        self.quantizer.pre_observe(x)
        return self.quantizer(x) if self.quantizes else x + 0.0


@pytest.mark.parametrize(
    "name",
    ["histogram", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mse", "entropy", "percentile", "aciq"))],
)
@pytest.mark.parametrize(
    "quantizes", [pytest.param(False, marks=pytest.mark.slow), True], ids=["calibration", "training"]
)
def test_compiled_and_exported_code_counts_and_searches_as_eager_code_does(name: str, quantizes: bool) -> None:
    batches = [normal(300), normal(300) * 2 + 0.5]
    made_here = [_Observing(tq.make_quantizer(f"affine:6,observer={name}", site="output"), quantizes) for _ in "123"]
    eager, compiled, exported = made_here
    torch.compiler.reset()
    run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for batch in batches:
        last = eager(batch)
        assert torch.equal(run(batch), last)
    expected = eager.quantizer.observer.get_ranges()
    for found, wanted in zip(compiled.quantizer.observer.get_ranges(), expected, strict=True):
        assert torch.equal(found, wanted)
    exported.quantizer.pre_observe(batches[0])
    exported.quantizer.observer.get_ranges()
    program = torch.export.export(exported, (batches[1],)).module()
    assert torch.equal(program(batches[1]), last)


def test_what_evaluates_holds_no_search() -> None:
    def operators(observer: str) -> list[str]:
        layer = tq.QWrapper(nn.Linear(4, 3), None, tq.make_quantizer(f"affine:8,observer={observer}", site="output"))
        tq.set_qmodule_state(layer, QModuleState.CALIBRATION)
        layer(torch.randn(5, 4))
        tq.set_qmodule_state(layer, QModuleState.QUANT_EVAL)
        graph = torch.export.export(layer, (torch.randn(5, 4),)).graph
        return [str(node.target) for node in graph.nodes if node.op == "call_function"]

    assert operators("mse") == operators("entropy") == operators("running")


# ------------------------------------------------------------------------------------------------ least error
@pytest.mark.parametrize("n_bits", [2, 4, 8, 12])
@pytest.mark.parametrize("symmetric", [False, "narrow", True, "asymmetric-narrow"])
def test_the_error_on_a_histogram_is_that_of_the_elements(n_bits: int, symmetric: bool | str) -> None:
    x = torch.rand(400_000, generator=generator(), dtype=torch.float64).square() * 3 - 1
    low, high = x.amin()[None], x.amax()[None]
    error = SquaredError(histogram(x[None], low, high, 1024), low, high)
    for ends in ((-1.0, 2.0), (-0.3, 1.7), (-4.0, 5.0), (0.0, 0.2)):
        params = tq.quantizers_functional.affine_params(
            *(torch.tensor([[end]]).double() for end in ends), n_bits, symmetric
        )
        expected = mean_square(x, *ends, n_bits, symmetric)
        assert float(error(params)) / len(x) == pytest.approx(expected, rel=0.02)


def best_by_force(x: Tensor, n_bits: int, symmetric: bool | str) -> float:
    """The least mean square error of ranges whose ends are any of 32 shares of the ends of x."""
    factors = torch.cat([torch.zeros(1), torch.logspace(-2, 0, 31)]).double()
    pairs = torch.stack([factors, factors], 1) if symmetric else torch.cartesian_prod(factors, factors)
    low, high = (pairs * torch.stack([x.min(), x.max()])).T
    params = tq.quantizers_functional.affine_params(low[:, None], high[:, None], n_bits, symmetric)
    errors = [
        (quantize_uniform(x.double(), AffineParams(delta, zero_point, *params[2:])) - x).square().mean()
        for delta, zero_point in zip(
            params.delta, torch.as_tensor(params.zero_point).expand(len(pairs), 1), strict=True
        )
    ]
    return float(torch.stack(errors).min())


@pytest.mark.parametrize(("n_bits", "symmetric"), [(8, False), (4, False), (4, "narrow")])
@pytest.mark.parametrize("name", ["gaussian", "relu", "gelu", "heavy tails", "few outliers", "two classes", "shifted"])
def test_least_error_is_that_of_a_search_of_both_ends(name: str, n_bits: int, symmetric: bool | str) -> None:
    x = DATA[name]()[-2000:]
    found = mean_square(x, *shown(MSEObserver(n_bits, symmetric, decay=1.0), *x.split(700)), n_bits, symmetric)
    assert found <= 1.06 * best_by_force(x, n_bits, symmetric)
    assert found <= 1.01 * mean_square(x, float(x.min()), float(x.max()), n_bits, symmetric)


# ------------------------------------------------------------------------------------------------ spikes
@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("observer", ["mse", "entropy", "aciq"])
def test_no_clip_costs_more_than_it_saves(name: str, observer: str) -> None:
    x = DATA[name]()
    low, high = shown(made(observer), x)
    whole = mean_square(x, float(x.min()), float(x.max()))
    assert mean_square(x, low, high) <= 1.15 * whole + 1e-12
    assert x.min() <= low <= high <= x.max() or name == "a constant"


def ort_range(x: Tensor, n_levels: int = 256, n_bins: int = 2048) -> tuple[float, float]:
    calibrate = pytest.importorskip("onnxruntime.quantization.calibrate")
    collector = calibrate.HistogramCollector("entropy", False, n_bins, n_levels, 99.99, "same")
    collector.collect_value({"x": x.numpy()})
    low, high = collector.get_entropy_threshold(collector.get_histogram_dict()["x"], n_levels)
    return float(low), float(high)


@pytest.mark.parametrize("name", ["gaussian", "relu", "relu6"])
def test_entropy_is_that_of_onnx_runtime_on_smooth_data_and_better_on_spikes(name: str) -> None:
    x = DATA[name]()[:20_000]
    ours, theirs = shown(EntropyObserver(8, n_bins=1024), x), ort_range(x)
    assert mean_square(x, *ours) <= 1.3 * mean_square(x, *theirs)
    if name == "gaussian":
        assert ours == pytest.approx(theirs, rel=0.15)


def test_entropy_keeps_what_is_rare_and_large() -> None:
    x = DATA["rare and large"]()
    assert shown(made("entropy"), x)[1] > 100.0


# ------------------------------------------------------------------------------------------------ percentiles
@pytest.mark.parametrize("name", ["gaussian", "heavy tails", "relu", "shifted", "below 0", "few outliers"])
@pytest.mark.parametrize("percent", [99.0, 99.99])
def test_percentiles_are_numpys(name: str, percent: float) -> None:
    x = DATA[name]()
    magnitude = float(np.quantile(x.abs().numpy(), percent / 100, method="inverted_cdf"))
    assert shown(PercentileObserver(percent), x) == (
        max(float(x.min()), -magnitude), min(float(x.max()), magnitude)
    )  # fmt: skip
    step = float(x.max() - x.min()) / 2048
    cut = (1 - percent / 100) / 2
    expected = [float(np.quantile(x.numpy(), share)) for share in (cut, 1 - cut)]
    assert shown(HistogramObserver(percent), x) == pytest.approx(expected, abs=2 * step)


@pytest.mark.parametrize("n", [100, 9_000, 100_001])
@pytest.mark.parametrize("percent", [0.02, 30.0, 99.0, 99.99])
def test_percentiles_found_by_blocks_are_those_of_a_sort(percent: float, n: int) -> None:
    place = max(int(np.ceil(percent / 100 * n)), 1) - 1
    for x in (normal(n), normal(n).clamp(-1.0, 1.0), (normal(n) * 4).round(), torch.zeros(n), torch.arange(float(n))):
        observer = PercentileObserver(100.0, low_percentile=percent)
        assert shown(observer, x) == (float(x.sort().values[place]), float(x.max()))


@pytest.mark.parametrize("name", ["gaussian", "relu", "below 0", "sigmoid", "two classes"])
@pytest.mark.parametrize("observer", SEARCHED)
def test_counting_in_the_quick_way_is_counting(name: str, observer: str) -> None:
    """Of batches inside what was seen, which take the quick way, and outside, on one axis and on none."""
    x = DATA[name]()[:998].view(2, -1, 1)
    for axis, dtype in ((None, torch.float32), (0, torch.float32), (None, torch.bfloat16)):
        whole = OBSERVERS[observer](**({} if observer == "histogram" else {"n_bits": 8}), decay=1.0, axis=axis)
        halves = copy.deepcopy(whole)
        y = x.to(dtype)
        whole.observe_batch(torch.cat([y, y, -y / 3], 1))
        for part in (y, y, -y / 3, y[:, :0]):
            halves.observe_batch(part)
        assert torch.allclose(halves.counts.sum(-1), whole.counts.sum(-1), rtol=1e-12)
        step = float(whole.histogram_max.max() - whole.histogram_min.min()) / 256
        for found, expected in zip(halves.get_ranges(), whole.get_ranges(), strict=True):
            assert torch.allclose(found, expected, atol=12 * step)
        with pytest.raises(NonFiniteError):
            halves.observe_batch(y.clone().index_fill_(1, torch.tensor([3]), torch.nan))
    repeated = OBSERVERS[observer](**({} if observer == "histogram" else {"n_bits": 8}), decay=1.0)
    for _ in range(3):
        repeated.observe_batch(x)
    once = OBSERVERS[observer](**({} if observer == "histogram" else {"n_bits": 8}), decay=1.0)
    once.observe_batch(x)
    assert torch.equal(repeated.counts, 3 * once.counts)


@pytest.mark.parametrize("name", ["gaussian", "relu", "shifted"])
def test_the_histogram_is_that_of_onnx_runtime(name: str) -> None:
    calibrate = pytest.importorskip("onnxruntime.quantization.calibrate")
    batches = DATA[name]().split(30_000)
    collector = calibrate.HistogramCollector("percentile", False, 2048, 128, 99.9, "same")
    for batch in batches:
        collector.collect_value({"x": batch.numpy()})
    low, high = collector.compute_percentile()["x"][:2]
    found = shown(HistogramObserver(99.9, decay=1.0), *batches)
    assert found == pytest.approx((float(low), float(high)), abs=0.02 * float(high - low))


# ------------------------------------------------------------------------------------------------ aciq
def test_aciq_takes_the_published_clip_where_it_helps_and_where_it_is_asked_for() -> None:
    x = DATA["sigmoid"]()
    assert shown(made("aciq"), x)[1] > 0.9
    published = shown(ACIQObserver(8, family="laplace"), x)[1]
    clip = 11.16268502 * float(x.double().mean())  # one bit more, for data above 0
    assert published == pytest.approx(min(clip, float(x.max())), rel=1e-5)
    for family, data in (("gauss", normal(400_000)), ("laplace", torch.distributions.Laplace(0.0, 1.0).icdf(
        (torch.arange(100_000) + 0.5) / 100_000))):  # fmt: skip
        assert shown(ACIQObserver(4), data) == shown(ACIQObserver(4, family=family), data)
