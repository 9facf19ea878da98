"""A site that is called several times in a forward: its calls are one batch."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import torchquant as tq
from torchquant.errors import ConfigError
from torchquant.range_observers import OBSERVERS, ExpAvgMinMax, RangeObserver

# Those whose numbers of several calls are, exactly, those of the calls joined. The clip of "entropy" jumps with the
# bins that so few elements fall in.
EXACT = ("minmax", "ema", "running", "histogram", "mse")


def batches(n: int = 3) -> list[tuple[Tensor, Tensor]]:
    """A small call and one ten times as large."""
    return [(torch.randn(40, 5), 10.0 * torch.randn(30, 5)) for _ in range(n)]


def observer(name: str, n_calls: int = 1) -> RangeObserver:
    made = tq.make_quantizer(f"affine:8,observer={name}/channel", site="output").observer
    made.n_calls = n_calls
    return made


def show(tracker: RangeObserver, *calls: Tensor) -> RangeObserver:
    for call in calls:
        tracker.observe_batch(call)
    return tracker


@pytest.mark.parametrize("name", EXACT)
def test_the_calls_of_a_batch_count_as_the_batch_joined(name: str) -> None:
    apart, joined = observer(name, 2), observer(name)
    for calls in batches():
        show(apart, *calls)
        show(joined, torch.cat(calls))
        for ends in zip(apart.get_ranges(), joined.get_ranges(), strict=True):
            torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-5)
        assert float(apart.observed_weight) == pytest.approx(float(joined.observed_weight))


@pytest.mark.parametrize("name", [name for name in OBSERVERS if name != "entropy"])
def test_nothing_of_the_larger_call_is_cut_by_the_smaller(name: str) -> None:
    apart, larger = observer(name, 2), observer(name)
    for small, large in batches():
        show(apart, small, large)
        show(larger, large)
    assert (apart.get_ranges()[1] >= 0.9 * larger.get_ranges()[1]).all()


@pytest.mark.parametrize(
    "text", ["esb:4,k=1", "pot:3", "clipq:3", "zoomq:3", "xnor", "nf4", "fp4_e2m1", "pact:4", "apot:4"]
)
def test_fitted_numbers_are_those_of_the_joined_calls(text: str) -> None:
    apart, joined = (tq.make_quantizer(text, site="output") for _ in range(2))
    apart.n_calls = 2
    for calls in batches(2):
        apart.pre_observe(calls[0])
        apart.pre_observe(calls[1])
        joined.pre_observe(torch.cat(calls))
    torch.testing.assert_close(apart.state_dict(), joined.state_dict(), rtol=1e-5, atol=1e-6)


def test_until_the_last_call_a_range_is_not_narrower_than_it_was() -> None:
    tracker = observer("ema", 3)
    (small, large), (more, _) = batches(2)
    show(tracker, small)
    torch.testing.assert_close(tracker.get_ranges(), (small.amin(0), small.amax(0)))
    show(tracker, large, more)
    whole = tracker.get_ranges()[1].clone()
    show(tracker, small)
    assert torch.equal(tracker.get_ranges()[1], whole)
    show(tracker, 20.0 * small)
    assert (tracker.get_ranges()[1] >= whole).all()


@pytest.mark.parametrize("scheme", ["lsq:4", "lsqplus:4", "tqt:4"])
def test_what_is_learned_starts_with_all_calls_of_the_first_batch(scheme: str) -> None:
    quantizer = tq.make_quantizer(scheme, site="output")
    quantizer.n_calls = 2
    (small, large), later = batches(2)
    quantizer.pre_observe(small.abs())
    quantizer.pre_observe(large)
    started = copy.deepcopy(quantizer.state_dict())
    (name,) = quantizer.learned[:1]
    alone = tq.make_quantizer(scheme, site="output")
    alone.pre_observe(small.abs())
    assert (getattr(quantizer, name) > 1.2 * getattr(alone, name)).all()
    assert getattr(quantizer, "is_signed", True) is True
    for call in later:
        quantizer.pre_observe(100.0 * call)
    torch.testing.assert_close(quantizer.state_dict(), started, rtol=0, atol=0)


def test_empty_and_refused_calls_pass_and_copies_go_on_in_the_middle() -> None:
    small, large = batches(1)[0]
    tracker = show(observer("ema", 3), small)
    for twin in (tracker, copy.deepcopy(tracker), pickle.loads(pickle.dumps(tracker))):
        assert twin.n_calls == 3
        show(twin, torch.empty(0, 5), large)
        show(twin, large, large, large)
        joined = show(observer("ema"), torch.cat([small, large]), large)
        torch.testing.assert_close(twin.get_ranges(), joined.get_ranges())
        assert set(twin.state_dict()) == set(joined.state_dict())
        assert twin.half().get_ranges()[0].dtype == torch.float32
    tracker.reset()
    torch.testing.assert_close(show(tracker, small).get_ranges(), show(observer("ema"), small).get_ranges())
    with pytest.raises(ConfigError, match="n_calls must be a whole number from 1, got 0"):
        tracker.n_calls = 0


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.op = tq.QOp(nn.Identity(), tq.AffineQuantizer(8, ExpAvgMinMax()))
        self.op.acts_quantizer.observer.n_calls = 2
        self.op.state = tq.QModuleState.QUANT_AWARE_TRAIN

    def forward(self, small: Tensor, large: Tensor) -> tuple[Tensor, Tensor]:
        return self.op(small), self.op(large)


def test_compiled_and_exported_calls_are_joined_too() -> None:
    eager, data = Twice(), batches()
    for calls in data[:1]:
        eager(*calls)
    compiled = copy.deepcopy(eager)
    torch.compiler.reset()
    run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    exported = torch.export.export(copy.deepcopy(eager), data[0]).module()
    for calls in data[1:]:
        expected = eager(*calls)
        torch.testing.assert_close(run(*calls), expected)
        torch.testing.assert_close(exported(*calls), expected)
    torch.testing.assert_close(compiled.state_dict(), eager.state_dict())


def test_the_report_says_it() -> None:
    model = Twice()
    model(*batches(1)[0])
    (row,) = tq.state_report(model)
    assert row.ranges.endswith(", union of 2 calls")
