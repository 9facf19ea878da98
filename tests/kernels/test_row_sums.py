"""The C++ kernels of sums over rows equal PyTorch's, whose order of adding they follow, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.conftest import Kernels
from torchquant import kernels
from torchquant.quantizers_functional._row_statistics import (
    _kernels_add_as_torch,
    cut_off,
    distances,
    row_mean_magnitudes,
    row_mean_squares,
    row_moments,
    row_sums_by_kernel,
    wide_means,
)
from torchquant.quantizers_functional.midrise import point_sums
from torchquant.quantizers_functional.residual import residual_alphas
from torchquant.quantizers_functional.ternary import ternary_params

SHAPES = ((1, 1), (3, 3), (64, 27), (3, 255), (1, 256), (64, 257), (7, 576), (1, 4608), (1, 200_001), (2, 70_001))


def rows(seed: int, shape: tuple[int, ...]) -> Tensor:
    """Return numbers of any size, and rows of zeros, NaN and infinity."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * 2.0 ** (seed % 40 - 20)
    if seed % 5 == 0:
        x *= torch.exp2(torch.randint(-140, 3, shape, generator=generator).float())
    if seed % 7 == 0:
        x[0] = 0
    if seed % 4 == 3:
        x[-1, -1] = torch.inf if seed % 8 == 3 else torch.nan
    return x


def statistics(x: Tensor) -> list[Tensor]:
    found = row_mean_squares(x), row_mean_magnitudes(x), *ternary_params(x), *row_moments(x)
    cell = 0.3 * row_mean_squares(x).sqrt()
    ends = torch.stack([cell * k for k in (1, 3, 9)]).double()
    mean, share = wide_means(x)
    found += mean, share, *distances(x, mean), *cut_off(x, -ends, 0.7 * ends)
    found += *point_sums(x, cell, 4), *(residual_alphas(x, bits, "greedy") for bits in (1, 4, 8))
    return [number.nan_to_num(7.0) for number in found]


def test_statistics_are_those_without_kernels(cpu_kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_BY_DEVICE", {"cpu": cpu_kernels})
    _kernels_add_as_torch.cache_clear()
    if not _kernels_add_as_torch():
        pytest.skip("PyTorch adds in another order on this processor, so that the kernels are not used")
    for seed in range(60):
        x = rows(seed, SHAPES[seed % len(SHAPES)])
        monkeypatch.setattr(kernels, "_BY_DEVICE", {"cpu": cpu_kernels})
        found = statistics(x)
        monkeypatch.setattr(kernels, "_BY_DEVICE", {})
        assert all(map(torch.equal, found, statistics(x))), (seed, tuple(x.shape))


def test_sums_that_could_overflow_are_left_to_the_reference(
    cpu_kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_BY_DEVICE", {"cpu": cpu_kernels})
    monkeypatch.setattr("torchquant.quantizers_functional._row_statistics._kernels_add_as_torch", lambda: True)
    for size, is_summed in ((1e-30, False), (1e-3, True), (1.0, True), (1e15, True), (1e30, False), (0.0, True)):
        x = torch.stack([torch.ones(300), torch.full((300,), size)])
        assert (row_sums_by_kernel("square_sums", x) is not None) is is_summed


def test_sums_do_not_depend_on_threads(cpu_kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_BY_DEVICE", {"cpu": cpu_kernels})
    x, before = torch.randn(2, 200_001), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(statistics(x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for own in found[1:] for one, other in zip(own, found[0], strict=True))
