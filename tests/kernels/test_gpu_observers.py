"""The Triton kernels of observers measure, average and count as the PyTorch code of accelerators does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.on_gpu import DEVICE, FLOATS, on_device, use
from tests.kernels.tensors import hard, is_same, shifted
from torchquant.range_observers import BatchMinMax, ExpAvgMinMax, RangeObserver, RunningMinMax
from torchquant.range_observers._histogram import Bins

SHAPES = (
    ((9,), None),
    ((5000,), None),
    ((40, 33), -1),
    ((3, 5, 4, 7), 1),
    ((6, 4, 3, 3), 0),
    ((3, 9, 2), 1),
    ((2, 70), 1),
)


def layouts(x: Tensor) -> list[Tensor]:
    return [x, shifted(x, 3), *([x.contiguous(memory_format=torch.channels_last)] if x.ndim == 4 else [])]


@on_device
@pytest.mark.parametrize("dtype", FLOATS)
def test_min_max(dtype: torch.dtype) -> None:
    from torchquant.kernels import gpu

    kernel = gpu.kernels()["min_max", dtype]
    for shape, axis in SHAPES:
        for x in (hard(shape, dtype=dtype).to(DEVICE), hard(shape, dtype=dtype).nan_to_num(0.3).to(DEVICE)):
            others = [d for d in range(x.ndim) if axis is None or d != axis % x.ndim]
            for data in layouts(x):
                low, high = kernel(data, axis)
                assert is_same(low, x.amin(others))
                assert is_same(high, x.amax(others))


def observers(axis: int | None) -> list[RangeObserver]:
    return [BatchMinMax(axis), RunningMinMax(axis), ExpAvgMinMax(0.9, axis), ExpAvgMinMax(0.99, axis, init="first")]


def tracked(observer: RangeObserver, batches: list[Tensor], clamp: tuple[float | None, float | None]) -> list[Tensor]:
    seen = []
    for x in batches:
        observer.observe_batch(x) if clamp == (None, None) else observer.observe_clamped(x, clamp)
        seen += [buffer.clone() for buffer in observer.buffers()]
    return seen


def use_what_accelerators_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let PyTorch's operators run, by the code for accelerators on a CPU too, which compiled code shares."""
    use(monkeypatch, wanted=False)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


@on_device
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("shape", "axis"), [((777,), None), ((3, 5, 4, 2), 1), ((2, 40), 1)])
@pytest.mark.parametrize(
    "clamp", [(0.0, 6.0), *(pytest.param(clamp, marks=pytest.mark.slow) for clamp in ((None, None), (None, 0.7)))]
)
def test_ranges_are_tracked_as_step_by_step(
    clamp: tuple[float | None, float | None],
    shape: tuple[int, ...],
    axis: int | None,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A batch with NaN or Inf changes nothing, and the next one is the first; the device is not asked about it."""
    from torchquant.kernels import gpu_observers

    monkeypatch.setattr(gpu_observers, "CHANNELS_AT_ONCE", 16)
    numbers = hard(shape, dtype=dtype).nan_to_num(0.3, 9.0, -9.0).to(DEVICE)
    batches = [numbers.index_fill(0, torch.tensor([0], device=DEVICE), torch.nan), numbers, *layouts(numbers * -0.1)]
    batches[2:2] = [torch.full_like(numbers, torch.inf)]
    for observer, plain in zip(observers(axis), observers(axis), strict=True):
        with monkeypatch.context() as patched:
            use(patched)
            found = tracked(observer.to(DEVICE, dtype), batches, clamp)
        with monkeypatch.context() as patched:
            use_what_accelerators_do(patched)
            assert all(map(is_same, found, tracked(plain.to(DEVICE, dtype), batches, clamp)))
        assert observer.observed_weight > 0
        assert observer.range_max._version >= len(batches)


def test_a_range_starts_after_refused_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first batch that is not refused decides alone, on a device that is not asked whether one was."""
    use_what_accelerators_do(monkeypatch)
    for observer in observers(None):
        for x in ([torch.nan, 1.0], [2.0, 3.0]):
            observer.observe_batch(torch.tensor(x))
        assert [float(observer.range_min), float(observer.range_max)] == [2.0, 3.0]


@on_device
@pytest.mark.parametrize("dtype", FLOATS)
def test_histogram(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for n_rows, n, n_bins in ((1, 1, 16), (1, 10_003, 2048), (5, 9, 100), (3, 5000, 64)):
        x = hard((n_rows, n), dtype=dtype).to(DEVICE)
        x[:, n // 2 :] = x[:, n // 2 :].relu()
        low = -torch.linspace(0.1, 3.0, n_rows, device=DEVICE).double()
        bins = Bins(low, torch.linspace(2.0, 6.0, n_rows, device=DEVICE).double(), n_bins, dtype)
        for with_zeros, of_magnitude in ((True, False), (False, True)):
            with monkeypatch.context() as patched:
                use(patched)
                found = bins.count(x, with_zeros, of_magnitude)
            with monkeypatch.context() as patched:
                use_what_accelerators_do(patched)
                assert is_same(found, bins.count(x, with_zeros, of_magnitude))
            assert found.sum() == (x.numel() if with_zeros else x.count_nonzero())


@on_device
def test_many_bins_are_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchquant.kernels import gpu

    x, low, scale = torch.rand(2, 30, device=DEVICE), torch.zeros(2, 1, device=DEVICE), torch.ones(2, 1, device=DEVICE)
    assert gpu.kernels()["histogram", x.dtype](x, low, scale, 5000) is None
    use(monkeypatch)
    assert Bins(low[:, 0].double(), low[:, 0].double() + 1.0, 5000, x.dtype).count(x).sum() == 60.0
