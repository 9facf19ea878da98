"""The work of a calibration: each batch is passed over few times, and what is put off or left out changes no number."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import torchquant as tq
from torchquant import QModuleState
from torchquant.errors import NonFiniteError
from torchquant.range_observers import (
    EntropyObserver,
    HistogramObserver,
    MSEObserver,
    PercentileObserver,
    RangeObserver,
    _counting,
    _least_error,
)
from torchquant.range_observers._counting import CountingObserver, settle_together

COUNTING: dict[str, Callable[[], CountingObserver]] = {
    "histogram": lambda: HistogramObserver(99.0, decay=1.0),
    "histogram, channels": lambda: HistogramObserver(99.0, decay=1.0, axis=1),
    "mse": lambda: MSEObserver(8, decay=1.0),
    "mse, 4 bits": lambda: MSEObserver(4, "narrow", decay=1.0),
    "mse, power": lambda: MSEObserver(4, power=2.4, n_bins=256, decay=1.0),
    "entropy": lambda: EntropyObserver(8, decay=1.0),
}


def batches() -> list[Tensor]:
    """Small and large, of several types and layouts, with ends that grow, with none, with one value."""
    generator = torch.Generator().manual_seed(0)
    small = [torch.randn(4, 3, 8, generator=generator) for _ in range(6)]
    large = torch.randn(8, 3, 1000, generator=generator)
    return [
        *(2 * small[0], small[1], small[2].bfloat16().to(torch.float32), large, small[3].relu(), torch.empty(0, 3, 8)),
        *(small[4].bfloat16(), small[5].double(), small[0].transpose(0, 2), 3 * small[1], small[2][:1]),
        *(torch.full((2, 3, 5), 0.5), small[3].unsqueeze(-1).to(memory_format=torch.channels_last)),
    ]


def shown(observer: RangeObserver) -> RangeObserver:
    """The observer, shown batches that are overwritten afterwards, as a forward in place does."""
    for batch in batches():
        seen = batch.clone()
        observer.observe_batch(seen)
        seen.fill_(torch.nan)
    return observer


def state(observer: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in observer.state_dict().items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, Tensor]]:
    """The statistics of an observer that counts every batch when it comes."""

    def found(name: str) -> dict[str, Tensor]:
        with monkeypatch.context() as patched:
            patched.setattr(_counting, "FEW", 0)
            return state(shown(COUNTING[name]()))

    return found


@pytest.mark.parametrize("name", COUNTING)
def test_batches_that_are_put_off_count_as_if_counted_at_once(name: str, at_once: Any) -> None:
    expected = at_once(name)
    assert_equal(state(shown(COUNTING[name]())), expected)
    copied = copy.deepcopy(shown(COUNTING[name]()))
    pickled = pickle.loads(pickle.dumps(shown(COUNTING[name]())))
    for observer in (copied, pickled, shown(COUNTING[name]()).to("cpu")):
        assert_equal(state(observer), expected)
    assert torch.equal(shown(COUNTING[name]()).counts, expected["counts"])


@pytest.mark.parametrize("name", ["histogram", "mse"])
def test_what_was_put_off_is_forgotten_with_the_rest_and_kept_where_a_batch_is_refused(name: str, at_once: Any) -> None:
    observer = shown(COUNTING[name]())
    observer.reset()
    assert_equal(state(shown(observer)), at_once(name))
    with pytest.raises(NonFiniteError, match="NaN or Inf"):
        observer.observe_batch(torch.tensor([[1.0], [torch.inf]]))
    assert_equal(state(observer), at_once(name))
    observer.observe_batch(torch.ones(2, 3))
    observer.force_ranges(-1.0, 1.0)
    assert float(observer.counts.sum()) == 0.0
    observer.observe_batch(torch.ones(2, 3))
    observer.load_state_dict(at_once(name))
    assert_equal(state(observer), at_once(name))


def test_memory_of_what_was_put_off_is_bounded() -> None:
    observer = HistogramObserver(decay=1.0)
    for _ in range(70):
        observer.observe_batch(torch.linspace(-1, 1, _counting.FEW))
        assert sum(rows.numel() for rows in observer._uncounted) <= _counting.MOST_KEPT + _counting.FEW
    for _ in range(200):
        observer.observe_batch(torch.zeros(2))
        assert len(observer._uncounted) <= _counting.MOST_BATCHES


# ----------------------------------------------------------------------------------------------------- searches
def test_ranges_chosen_together_are_those_chosen_alone() -> None:
    def observers() -> list[RangeObserver]:
        made: list[RangeObserver] = [make() for make in COUNTING.values() for _ in range(3)]
        scales = [0.1, 1.0, 10.0]
        for i, observer in enumerate(made):
            for batch in batches():
                observer.observe_batch(batch * scales[i % 3] if i % 2 else batch.relu())
        return made

    alone, together = observers(), observers()
    for observer in alone:
        observer.settle()
    settle_together([*together, together[0]])
    for one, other in zip(alone, together, strict=True):
        assert_equal(dict(one.named_buffers()), dict(other.named_buffers()))


def test_sites_that_are_alike_are_searched_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []

    def choose(self: MSEObserver, counts: Tensor, *ends: Tensor, former: Any = MSEObserver.choose) -> Any:
        rows.append(len(counts))
        return former(self, counts, *ends)

    monkeypatch.setattr(MSEObserver, "choose", choose)

    class Own(MSEObserver):
        """Chooses by something that nobody else knows of."""

        def choose(self, counts: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
            rows.append(-1)
            return low, high

    layers = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
    model = tq.quantize(layers, [{"output": "affine:8,observer=mse"}], torch.randn(2, 4))
    for layer in (model[0], model[1]):
        layer.acts_quantizer.observer = Own(8, decay=1.0)
    with tq.qmodule_state(model, QModuleState.CALIBRATION):
        model(torch.randn(16, 4))
    assert sorted(rows) == [-1, -1, 3]


@pytest.mark.parametrize("name", ["mse", "mse, 4 bits", "entropy"])
@pytest.mark.parametrize("data", ["normal", "relu", "heavy", "constant", "integers"])
def test_searches_leave_out_only_what_cannot_be_the_best(name: str, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3000, generator=torch.Generator().manual_seed(1))
    given = {
        "normal": x,
        "relu": x.relu(),
        "heavy": x * x.abs().exp(),
        "constant": torch.full_like(x, 2.0),
        "integers": (x * 2).round(),
    }[data]
    observer = COUNTING[name]()
    observer.observe_batch(given)
    found = observer.get_ranges()
    counts, low, high = observer._seen()
    with monkeypatch.context() as patched:
        patched.setattr(torch.compiler, "is_compiling", lambda: True)  # where nothing is left out
        if bool(low >= 0):  # both ends are shrunk alike, since 0 is in every range
            patched.setattr("torchquant.range_observers.histogram.TWO_SIDED", ())
        everything = [end.to(torch.float32) for end in observer._chosen(counts, low, high)]
    assert [float(end) for end in found] == [float(end) for end in everything]


def test_a_search_computes_few_errors() -> None:
    observer = MSEObserver(8, decay=1.0)
    observer.observe_batch(torch.randn(3000, generator=torch.Generator().manual_seed(1)))
    counts, low, high = observer._seen()
    errors = _least_error.histogram_error(counts, low, high, 8, False, 2.0)
    computed: list[int] = []

    def of(low: Tensor, high: Tensor) -> Tensor:
        computed.append(low.shape[1])
        return errors.of(low, high)

    _least_error.least_error_range(_least_error.RangeErrors(of, errors.least), low, high, False)
    assert sum(computed) <= 60  # of 100 + 6 * 9


# ------------------------------------------------------------------------------------------------------- passes
class Work(TorchDispatchMode):
    """Counts operators, and those that read a tensor as large as the batch."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.calls, self.passes = numel, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        is_view = any(value.alias_info is not None and not value.alias_info.is_write for value in func._schema.returns)
        self.calls += 1
        self.passes += not is_view and any(tensor.numel() >= self.numel for tensor in given)
        return out


@pytest.mark.parametrize(
    ("name", "calls", "passes"),
    [
        *(("ema", 12, 1), ("minmax", 12, 1), ("running", 14, 1)),
        *(("histogram", 9, 2), ("mse", 9, 2), ("entropy", 9, 2), ("percentile", 17, 1)),
    ],
)
def test_a_small_batch_is_passed_over_once_and_kept_at_most(name: str, calls: int, passes: int) -> None:
    observer = tq.make_quantizer(f"affine:8,observer={name}", site="output").observer
    x = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    observer.observe_batch(2 * x)
    with Work(x.numel()) as work:
        observer.observe_batch(x)
    assert work.passes <= passes
    assert work.calls <= calls


@pytest.mark.parametrize(("n", "percentile"), [(9999, 99.99), (20_000, 99.99), (20_000, 100.0), (7, 50.0), (1, 99.0)])
@pytest.mark.parametrize("is_relu", [False, True])
def test_a_percentile_is_that_of_the_sorted_magnitudes(n: int, percentile: float, is_relu: bool) -> None:
    x = torch.randn(n, generator=torch.Generator().manual_seed(n))
    x = x.relu() if is_relu else x
    observer = PercentileObserver(percentile)
    observer.observe_batch(x)
    place = min(max(-int(-percentile / 100 * n // 1), 1), n)
    clip = float(x.abs().sort().values[place - 1])
    assert [float(end) for end in observer.get_ranges()] == [max(float(x.min()), -clip), min(float(x.max()), clip)]
    with pytest.raises(NonFiniteError, match="NaN or Inf"):
        observer.observe_batch(torch.cat([x, torch.tensor([torch.nan])]))
