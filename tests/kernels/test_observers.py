"""The kernels of observers count as the PyTorch code does."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor

from tests.kernels.conftest import Kernels
from tests.kernels.tensors import SIZES, hard, is_same, shifted
from torchquant import kernels
from torchquant.errors import NonFiniteError
from torchquant.range_observers import OBSERVERS, BatchMinMax, ExpAvgMinMax, RangeObserver, RunningMinMax
from torchquant.range_observers._histogram import Bins


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_histogram(dtype: torch.dtype, cpu_kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    for n_rows, n, n_bins in (
        (1, 1, 16),
        (7, 1, 16),
        (1, 1023, 64),
        (1, 100_003, 2048),
        (5, 9, 128),
        (3, 5000, 64),
        (70, 300, 16),
    ):
        x = hard((n_rows, n), dtype=dtype).nan_to_num(0.0, 9.0, -9.0).clamp(-5.0, 5.0)
        x[:, n // 2 :] = x[:, n // 2 :].relu()
        low, high = -torch.linspace(0.1, 3.0, n_rows), torch.linspace(2.0, 6.0, n_rows)
        bins = Bins(low.double(), high.double(), n_bins, dtype)
        for with_zeros in (True, False):
            monkeypatch.setattr(kernels, "_BY_DEVICE", {"cpu": cpu_kernels})
            found = bins.count(x, with_zeros)
            monkeypatch.setattr(kernels, "_BY_DEVICE", {"cpu": {}})
            assert torch.equal(found, bins.count(x, with_zeros))
            assert found.sum() == (x.numel() if with_zeros else x.count_nonzero())


def observed(observer: RangeObserver, batches: list[Tensor]) -> list[Tensor]:
    """The statistics after each batch; a batch that is refused changes none."""
    found = []
    for batch in batches:
        with contextlib.suppress(NonFiniteError):
            observer.observe_batch(batch)
        found += [getattr(observer, name).clone() for name in observer.statistics if name != "counts"]
    return [*found, observer.counts.clone(), *observer.get_ranges()]


@pytest.mark.parametrize("axis", [None, 0, -1])
@pytest.mark.parametrize(("name", "n_bins"), [("histogram", 2048), ("mse", 100), ("entropy", 300)])
def test_batches_are_counted_and_spread_as_by_tensors(
    name: str, n_bins: int, axis: int | None, cpu_kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        shape = (4, 5001) if axis != -1 else (9000, 3)
        sizes = (0.5, 0.4, 2.0, 1.9, torch.nan, 2.5, 1e-3, 7.0)
        batches = [
            (hard(shape, 0.1 + 0.01 * i).nan_to_num(0.1, 3.0, -1.0).clamp(-5.0, 5.0 + i) * size).to(dtype)
            for i, size in enumerate(sizes)
        ]
        batches[0], batches[3] = batches[0].relu(), torch.full(shape, 0.25, dtype=dtype)
        few = batches[1][:2] if axis == -1 else batches[1][:, :2]
        batches[4:4] = [few, torch.full(shape, torch.inf, dtype=dtype)]
        found = []
        for active in (cpu_kernels, {}):
            monkeypatch.setattr(kernels, "_BY_DEVICE", {"cpu": active})
            options = {} if name == "histogram" else {"n_bits": 6}
            observer = OBSERVERS[name](n_bins=n_bins, decay=1.0, axis=axis, **options)
            found.append(observed(observer.to(torch.float64) if dtype == torch.float64 else observer, batches))
        assert all(map(torch.equal, *found))


def test_histogram_does_not_depend_on_threads(cpu_kernels: Kernels) -> None:
    before, x = torch.get_num_threads(), torch.randn(2, 50_000)
    count, add = cpu_kernels["histogram", x.dtype], cpu_kernels["batch", x.dtype]
    found = []
    try:
        for n_threads in (1, 2):
            torch.set_num_threads(n_threads)
            counts = count(x, torch.full((2, 1), -3.0), torch.full((2, 1), 300.0), 2048)
            ends, moved = add(x, counts, [-3.0, -9.0, 4.0, 9.0], True, False)
            assert add(x, counts, [-9.0, -9.0, 9.0, 9.0], True, False) is True
            found.append((counts, moved, torch.tensor(ends)))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_min_max(dtype: torch.dtype, cpu_kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(x: Tensor, axis: int | None) -> list[tuple[Tensor, Tensor]]:
        found = []
        for active in (cpu_kernels, {}):
            monkeypatch.setattr(kernels, "_BY_DEVICE", {"cpu": active})
            found.append(BatchMinMax(axis).measure(x))
        kernel = cpu_kernels["min_max", x.dtype]
        assert all(is_same(*pair) for pair in zip(kernel(x, axis), found[1], strict=True))
        return found

    for shape, axis in (
        *(((n,), None) for n in SIZES),
        ((9,), 0),
        ((3, 5, 4, 7), 1),
        ((3, 5, 4, 7), -1),
        ((40, 33), 0),
    ):
        for x in (hard(shape, dtype=dtype), hard(shape, dtype=dtype).nan_to_num(0.3)):
            images = [x.contiguous(memory_format=torch.channels_last)] if x.ndim == 4 else []
            for data in (x, shifted(x, 3), *images):
                (low, high), (expected_low, expected_high) = measured(data, axis)
                assert is_same(low, expected_low)
                assert is_same(high, expected_high)
    many = torch.randn(3, 200, 301, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for axis in (None, 0, 1, 2):
            assert all(is_same(*pair) for pair in zip(*measured(many, axis), strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ranges_are_tracked_as_step_by_step(
    dtype: torch.dtype, cpu_kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tracked(
        observer: RangeObserver, batches: list[Tensor], clamp: tuple[float | None, float | None] | None
    ) -> list[Tensor]:
        seen = []
        for x in batches:
            observer.observe_batch(x) if clamp is None else observer.observe_clamped(x, clamp)
            seen += [buffer.clone() for buffer in observer.buffers()]
        return seen

    def observers(axis: int | None) -> list[RangeObserver]:
        averages = [ExpAvgMinMax(0.9, axis), ExpAvgMinMax(0.99, axis, init="first")]
        return [made.to(dtype) for made in (BatchMinMax(axis), RunningMinMax(axis), *averages)]

    for shape, axis in (((777,), None), ((3, 5, 4, 7), 0), ((3, 5, 4, 7), -3), ((1, 9), 0)):
        batches = [hard(shape, dtype=dtype).nan_to_num(0.3, 9.0, -9.0).mul(scale) for scale in (1.0, -0.1, 2.0)]
        batches += [torch.full(shape, -0.0, dtype=dtype), *(shifted(x) for x in batches)]
        batches += [x.contiguous(memory_format=torch.channels_last) for x in batches[:1] if x.ndim == 4]
        for clamp in (None, (0.0, None), (0.0, 6.0), (None, 0.5), (-0.3, 0.7)):
            for i, plain in enumerate(observers(axis)):
                monkeypatch.setattr(kernels, "_BY_DEVICE", {"cpu": {}})
                expected = tracked(plain, batches, clamp)
                monkeypatch.setattr(kernels, "_BY_DEVICE", {"cpu": cpu_kernels})
                assert all(map(is_same, tracked(observers(axis)[i], batches, clamp), expected))


def test_a_tracked_range_refuses_what_is_not_finite_and_counts_its_writes(
    cpu_kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_BY_DEVICE", {"cpu": cpu_kernels})
    observer = ExpAvgMinMax()
    before = observer.range_max._version
    observer.observe_batch(torch.tensor([-1.0, 2.0]))
    assert observer.range_max._version > before
    for x in (torch.tensor([torch.nan, 1.0]), torch.tensor([torch.inf, 1.0])):
        with pytest.raises(NonFiniteError, match="NaN or Inf"):
            observer.observe_batch(x)
    assert [float(end) for end in observer.get_ranges()] == [-1.0, 2.0]
    observer.observe_clamped(torch.tensor([torch.inf, 1.0]), (0.0, 6.0))
    assert observer.range_max > 2.0


@pytest.mark.parametrize("axis", [None, 0, -1])
@pytest.mark.parametrize("name", ["aciq", "meanstd"])
def test_moments_are_those_by_tensors(
    name: str, axis: int | None, cpu_kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        drawn = torch.randn(6, 4001, generator=torch.Generator().manual_seed(0)).mul(3)
        batches = [drawn, drawn.relu(), torch.cat([drawn[:3], drawn[3:].relu()]), torch.zeros(6, 9), drawn.mul(1e-30)]
        found = []
        for active in (cpu_kernels, {}):
            monkeypatch.setattr(kernels, "_BY_DEVICE", {"cpu": active})
            ends = []
            for batch in batches:
                observer = OBSERVERS[name](axis=axis, **({"n_bits": 4} if name == "aciq" else {}))
                observer.to(torch.float64).observe_batch(batch.to(dtype))
                ends += observer.get_ranges()
            found.append(ends)
        assert all(map(torch.equal, *found))
