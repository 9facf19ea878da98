"""Range observers: golden numbers, state, shapes, refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from tests.oracles import GOLDEN
from torchquant.errors import ConfigError, NonFiniteError, UnobservedRangeError
from torchquant.range_observers import BatchMinMax, ExpAvgMinMax, RangeObserver

MAKERS = {"batch": BatchMinMax, "average": ExpAvgMinMax}


def test_exponential_average_golden() -> None:
    golden = GOLDEN["golden"]["ema_debiased"]
    observer = ExpAvgMinMax(momentum=golden["momentum"])
    for batch, expected in zip(golden["batches"], golden["ranges"], strict=True):
        observer.observe_batch(torch.tensor(batch))
        assert [float(r) for r in observer.get_ranges()] == pytest.approx(expected, rel=1e-6)


def test_batch_min_max_keeps_the_last_batch_only() -> None:
    observer = BatchMinMax()
    observer.observe_batch(torch.tensor([-9.0, 9.0]))
    observer.observe_batch(torch.tensor([-1.0, 2.0]))
    assert observer.get_ranges() == (-1.0, 2.0)


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("kind", MAKERS)
def test_per_channel_equals_one_observer_a_slice(kind: str, axis: int) -> None:
    batches = [torch.randn(3, 4, 5) for _ in range(3)]
    observer = MAKERS[kind](axis=axis)
    for batch in batches:
        observer.observe_batch(batch)
    low, high = observer.get_ranges()
    for i in range(batches[0].shape[axis]):
        single = MAKERS[kind]()
        for batch in batches:
            single.observe_batch(batch.select(axis, i))
        assert torch.equal(torch.stack([low[i], high[i]]), torch.stack(single.get_ranges()))


@pytest.mark.parametrize("kind", MAKERS)
def test_forced_ranges_come_back_and_later_batches_are_averaged_in(kind: str) -> None:
    observer = MAKERS[kind]()
    observer.force_ranges(-2.0, 4.0)
    assert observer.get_ranges() == (-2.0, 4.0)
    observer.observe_batch(torch.tensor([-1.0, 1.0]))
    expected = (-1.0, 1.0) if kind == "batch" else (-1.9, 3.7)
    assert [float(r) for r in observer.get_ranges()] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("batches", [0, 1, 3])
def test_state_dict_round_trip_before_and_during_observation(kind: str, axis: int | None, batches: int) -> None:
    first, second = MAKERS[kind](axis=axis), MAKERS[kind](axis=axis)
    for _ in range(batches):
        first.observe_batch(torch.randn(2, 3, 4))
    second.load_state_dict(first.state_dict(), strict=True)
    assert second.is_observed == first.is_observed == (batches > 0)
    more = torch.randn(2, 3, 4)
    for observer in (first, second):
        observer.observe_batch(more)
    assert all(torch.equal(a, b) for a, b in zip(first.get_ranges(), second.get_ranges(), strict=True))


@pytest.mark.parametrize("kind", MAKERS)
def test_asking_before_any_data_names_the_way_out(kind: str) -> None:
    observer = MAKERS[kind]()
    with pytest.raises(UnobservedRangeError, match=r"has seen no data; .*CALIBRATION.*force_ranges"):
        observer.get_ranges()
    observer.observe_batch(torch.ones(3))
    observer.reset()
    with pytest.raises(UnobservedRangeError):
        observer.get_ranges()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", MAKERS)
def test_non_finite_data_is_refused_and_changes_nothing(kind: str, bad: float) -> None:
    observer = MAKERS[kind]()
    observer.observe_batch(torch.tensor([-1.0, 2.0]))
    before = copy.deepcopy(observer.state_dict())
    with pytest.raises(NonFiniteError, match="NaN or Inf, shape"):
        observer.observe_batch(torch.tensor([0.0, bad]))
    assert all(torch.equal(before[k], v) for k, v in observer.state_dict().items())
    ignoring = MAKERS[kind](nonfinite="ignore")
    ignoring.observe_batch(torch.tensor([-1.0, bad, 2.0]))
    assert [float(r) for r in ignoring.get_ranges()] == pytest.approx([-1.0, 2.0])


def test_in_compiled_code_a_non_finite_batch_is_skipped() -> None:
    observer = ExpAvgMinMax()
    observer.observe_batch(torch.tensor([-1.0, 2.0]))
    compiled = torch.compile(observer.observe_batch, fullgraph=True, backend="aot_eager")
    compiled(torch.tensor([0.0, float("nan")]))
    assert [float(r) for r in observer.get_ranges()] == [-1.0, 2.0]
    compiled(torch.tensor([-1.0, 4.0]))
    assert 2.0 < float(observer.get_ranges()[1]) < 4.0


def test_an_empty_tensor_changes_nothing() -> None:
    observer = ExpAvgMinMax()
    observer.observe_batch(torch.empty(0, 3))
    assert not observer.is_observed


def test_observing_a_clamped_tensor_equals_clamping_first() -> None:
    x = torch.randn(200) * 5
    for clamp in [(0.0, None), (0.0, 6.0), (-0.5, 0.5)]:
        a, b = BatchMinMax(), BatchMinMax()
        a.observe_clamped(x, clamp)
        b.observe_batch(x.clamp(*clamp))
        assert a.get_ranges() == b.get_ranges()


class Sigma(RangeObserver):
    """A user's observer: one method."""

    def measure(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.mean() - 3 * x.std(), x.mean() + 3 * x.std()


def test_a_new_observer_is_one_method() -> None:
    observer = Sigma(momentum=0.5)
    observer.observe_batch(torch.tensor([1.0, 2.0, 3.0]))
    observer.observe_clamped(torch.tensor([1.0, 2.0, 9.0]), (None, 3.0))
    assert [float(r) for r in observer.get_ranges()] == pytest.approx([-1.0, 5.0])


@pytest.mark.parametrize("move", [lambda m: m.half(), lambda m: m.to(torch.bfloat16)])
def test_ranges_stay_float32_when_the_model_turns_half(move: object) -> None:
    observer = BatchMinMax()
    observer.observe_batch(torch.tensor([-1.0001, 2.0003]))
    before = observer.get_ranges()
    assert move(observer).get_ranges() == before
    assert observer.double().range_min.dtype == torch.float64


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: ExpAvgMinMax(1.0), r"momentum must be in \(0, 1\), got 1.0"),
        (lambda: ExpAvgMinMax(0.0), "BatchMinMax has none"),
        (lambda: BatchMinMax(axis=0.5), "axis must be a whole number or None, got 0.5"),
        (lambda: BatchMinMax(nonfinite="drop"), "nonfinite must be one of raise, ignore"),
        (lambda: BatchMinMax().force_ranges(2.0, 1.0), "range_min must not exceed range_max"),
        (lambda: BatchMinMax().force_ranges(torch.zeros(3), torch.ones(3)), "axis=None takes one number"),
        (lambda: BatchMinMax(axis=0).force_ranges(0.0, 1.0), r"axis=0 takes a \(C,\) tensor"),
    ],
)
def test_bad_arguments_say_what_is_allowed(call: object, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        call()
    with pytest.raises(NonFiniteError, match="must be finite"):
        BatchMinMax().force_ranges(0.0, float("inf"))


def test_another_number_of_channels_is_refused_until_reset() -> None:
    observer = ExpAvgMinMax(axis=0)
    observer.observe_batch(torch.full((8, 2), 10.0))
    with pytest.raises(ConfigError, match=r"statistics of shape \(8,\), the new tensor gives \(4,\); call reset"):
        observer.observe_batch(torch.full((4, 2), 10.0))
    with pytest.raises(ConfigError, match="call reset"):
        observer.allocate(5)
    observer.reset()
    observer.observe_batch(torch.full((4, 2), 10.0))
    assert observer.get_ranges()[1].tolist() == [10.0] * 4


@pytest.mark.parametrize("kind", MAKERS)
def test_the_largest_floats_of_both_signs_leave_finite_ranges(kind: str) -> None:
    observer = MAKERS[kind]()
    for x in (-3e38, 3e38):
        observer.observe_batch(torch.tensor([x]))
    assert all(bool(r.isfinite()) for r in observer.get_ranges())
