"""Each C++ kernel equals the pure PyTorch code that it stands for, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.conftest import Kernels
from tests.kernels.tensors import SIZES, hard, is_same, shifted
from torchquant import kernels
from torchquant.quantizers_functional import UniformGrid
from torchquant.quantizers_functional._bits import is_channels_last, masked, pack_mask, unpack_mask
from torchquant.quantizers_functional._gradient import where_strictly_inside

FLOATS = (torch.float32, torch.float64)
CLAMPS = (None, (0.0, None), (0.0, 6.0), (None, 0.5), (-0.3, 0.7), (9.0, 10.0))
IMAGES = (3, 5, 4, 7)


def reference(
    grid: UniformGrid, x: Tensor, want_inside: bool, clamp: Any, is_strict: bool
) -> tuple[Tensor, Tensor | None]:
    value, mask = grid.project(x, want_inside, clamp)
    if clamp is not None and is_strict:
        mask = where_strictly_inside(x, clamp, mask)
        if None not in clamp and not want_inside:
            mask[x.isnan()] = 1.0  # hardtanh_backward is 0 there in whole vectors and 1 in the rest
    return value, None if mask is None else pack_mask(mask)


def check(grid: UniformGrid, x: Tensor, clamp: Any = None) -> None:
    for want_inside, is_strict in ((False, False), (True, False), (False, True), (True, True)):
        found = grid.fused(x, want_inside, clamp, is_strict)
        assert found is not None
        value, bits = reference(grid, x, want_inside, clamp, is_strict)
        bits = None if bits is not None and torch.equal(bits, pack_mask(torch.ones_like(x))) else bits
        assert is_same(found[0], value)
        assert (found[1] is None) == (bits is None)
        assert bits is None or (found[1] is not None and torch.equal(found[1], bits))


@pytest.fixture
def active(cpu_kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_BY_DEVICE", {"cpu": cpu_kernels})


@pytest.mark.usefixtures("active")
@pytest.mark.parametrize("dtype", FLOATS)
def test_uniform_grid_per_tensor(dtype: torch.dtype) -> None:
    numbers: tuple[tuple[Any, ...], ...] = (
        (torch.tensor(0.1), torch.tensor(3.0), 0, 15),
        (0.1, 0, -8, 7),
        (torch.tensor([0.1]), 0, 0, 2**24 - 1),
        (torch.tensor(2.0**-126), torch.tensor(128.0), 0, 255),
    )
    for n in SIZES:
        x = hard((n,), dtype=dtype)
        check(UniformGrid(*numbers[0]), shifted(x))
        check(UniformGrid(*numbers[1]), x)
    for grid in numbers:
        for clamp in CLAMPS:
            check(UniformGrid(*grid), hard((777,), dtype=dtype), clamp)


@pytest.mark.usefixtures("active")
@pytest.mark.parametrize("dtype", FLOATS)
def test_uniform_grid_per_channel(dtype: torch.dtype) -> None:
    for axis, shape in ((0, (5, 3, 3, 3)), (1, IMAGES), (-1, (6, 70)), (0, (9,)), (2, (2, 3, 4, 11)), (0, (1, 9))):
        n = shape[axis]
        scale, zero_point = torch.linspace(0.05, 0.3, n), torch.arange(n).float()
        for clamp in CLAMPS[:5]:
            for x in (hard(shape, dtype=dtype), shifted(hard(shape, dtype=dtype), 3)):
                check(UniformGrid(scale, zero_point, 0, 15, axis=axis), x, clamp)
                check(UniformGrid(scale.repeat(2)[::2], 0, -8, 7, axis=axis), x, clamp)
                if len(shape) == 4:
                    images = x.contiguous(memory_format=torch.channels_last)
                    check(UniformGrid(scale, zero_point, 0, 15, axis=axis), images, clamp)


@pytest.mark.usefixtures("active")
def test_numbers_of_nan_make_nan() -> None:
    nan, one = torch.tensor([1.0, torch.nan, 1.0]), torch.ones(3)
    x = hard((3, 40))
    check(UniformGrid(nan, 0, -8, 7, axis=0), x)
    check(UniformGrid(one, nan, 0, 15, axis=0), x)
    check(UniformGrid(one, nan, 0, 15, axis=0), x.t().contiguous().t().contiguous(), (0.0, 2.0))


def codes_and_values(grid: UniformGrid, x: Tensor) -> tuple[Tensor, Tensor]:
    levels = grid.project(x)[0]
    codes, zero_or_nan = grid.to_bytes(levels)
    assert zero_or_nan == 0.0
    assert is_same(grid.from_bytes(codes, x.dtype), levels)
    return codes, levels


@pytest.mark.parametrize("dtype", FLOATS)
def test_codes_of_levels(dtype: torch.dtype, cpu_kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    scale, zero_point = torch.linspace(0.05, 0.3, 5), torch.arange(5).float()
    grids = [UniformGrid(torch.tensor(0.1), torch.tensor(3.0), 0, 255), UniformGrid(0.1, 0, -128, 127)]
    cases = [(grid, hard((n,), dtype=dtype).nan_to_num(0.3)) for grid in grids for n in SIZES]
    for shape, axis in (((5, 3, 3, 3), 0), (IMAGES, 1), ((6, 5), -1)):
        x = hard(shape, dtype=dtype).nan_to_num(0.3)
        images = x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x.t()
        cases += [(UniformGrid(scale, zero_point, 0, 15, axis=axis), y) for y in (x, shifted(x))]
        cases += [(UniformGrid(scale, 0, -8, 7, axis=axis if x.ndim == 4 else 0), images)]
    for grid, x in cases:
        monkeypatch.setattr(kernels, "_BY_DEVICE", {"cpu": cpu_kernels})
        codes, levels = codes_and_values(grid, x)
        monkeypatch.setattr(kernels, "_BY_DEVICE", {"cpu": {}})
        plain_codes, plain_levels = codes_and_values(grid, x)
        assert is_same(codes, plain_codes)
        assert is_same(levels, plain_levels)
        assert torch.equal(codes, grid.encode(levels).sub(grid.code_range[0]))


@pytest.mark.usefixtures("active")
def test_a_mask_of_ones_is_none() -> None:
    grid = UniformGrid(0.1, 0, -128, 127)
    for n in (*SIZES, 63, 64, 65):
        x = torch.zeros(n)
        check(grid, x)
        found = grid.fused(x, True, None, False)
        assert found is not None
        assert found[1] is None
        for at in {0, n // 2, n - 1}:
            beyond = x.clone()
            beyond[at] = 99.0
            check(grid, beyond)


@pytest.mark.usefixtures("active")
def test_a_level_that_is_nan_is_told_beside_the_codes() -> None:
    for at in (0, 40, 3000):
        x = torch.randn(3001, generator=torch.Generator().manual_seed(0))
        x[at] = torch.nan
        for scale in (0.1, 2.0**-126, 3e38):
            levels, is_number = UniformGrid(scale, 0, -128, 127).project(x)[0], ~x.isnan()
            codes, zero_or_nan = UniformGrid(scale, 0, -128, 127).to_bytes(levels)
            assert zero_or_nan.isnan()
            assert torch.equal(
                codes[is_number], UniformGrid(scale, 0, -128, 127).encode(levels[is_number]).add(128).byte()
            )


@pytest.mark.usefixtures("active")
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float16, torch.bfloat16])
def test_mask_times_gradient(dtype: torch.dtype) -> None:
    for n in SIZES:
        grad = hard((n,), dtype=dtype)
        mask = torch.rand(n, generator=torch.Generator().manual_seed(n)).gt(0.5).float()
        found = masked(grad, pack_mask(mask))
        assert is_same(found, unpack_mask(pack_mask(mask), grad.shape, dtype).mul_(grad))
        assert torch.equal(found.signbit()[~found.isnan()], (mask.to(dtype) * grad).signbit()[~found.isnan()])


@pytest.mark.usefixtures("active")
def test_results_do_not_depend_on_threads() -> None:
    before = torch.get_num_threads()
    x = hard((2, 7, 71, 79))
    grid = UniformGrid(torch.linspace(0.05, 0.3, 7), 0, -8, 7, axis=1)
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            check(grid, x, (-0.3, 0.7))
            check(grid, x.contiguous(memory_format=torch.channels_last))
            mask = x.gt(0.1).float()
            assert is_same(masked(x, pack_mask(mask)), mask * x)
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("active")
def test_reference_runs_where_a_kernel_cannot() -> None:
    x = torch.randn(4, 6)
    for other in (x.t(), x[:, ::2], x.half(), x.to_sparse(), torch.empty(0), torch.empty(3, device="meta")):
        assert kernels.find("uniform", other) is None
    assert kernels.find("uniform", x) is not None
    assert kernels.find("uniform", x.clone().requires_grad_()) is None
    assert torch.func.vmap(lambda row: torch.tensor(kernels.find("uniform", row) is None))(x).all()
    two_axes = UniformGrid(torch.rand(4, 6) + 0.1, 0, -8, 7)
    assert two_axes.fused(x, True, None, False) is None
    assert UniformGrid(torch.rand(3, 1, 1) + 0.1, 0, -8, 7).fused(x, True, None, False) is None
    assert UniformGrid(torch.rand(6) + 0.1, 0, -8, 7).fused(x[:, :1].contiguous(), True, None, False) is None
    assert UniformGrid(0.1, 0, -8, 7, offset=0.05).fused(x, True, None, False) is None


GRADIENTS = ("ste", "clipped", "ewgs", "dsq", "pwlc", "noise")


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("clamp", [None, (0.0, 6.0), (0.0, None)])
def test_quantize_is_the_same_with_and_without_kernels(
    gradient: str, clamp: Any, cpu_kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    def results(active: Kernels) -> list[Tensor]:
        monkeypatch.setattr(kernels, "_BY_DEVICE", {"cpu": active})
        found = []
        for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            for layout in (torch.contiguous_format, torch.channels_last):
                x = hard(IMAGES, dtype=dtype).nan_to_num(0.3, 9.0, -9.0).contiguous(memory_format=layout)
                x.requires_grad_()
                torch.manual_seed(0)
                y = UniformGrid(torch.tensor(0.1), torch.tensor(9.0), 0, 31).quantize(x, gradient, clamp)
                (grad,) = torch.autograd.grad(y, x, x.detach().flip(0).contiguous(memory_format=layout))
                found += [y.detach(), grad]
        return found

    for found, expected in zip(results(cpu_kernels), results({}), strict=True):
        assert is_same(found, expected)


@pytest.mark.usefixtures("active")
def test_gradient_has_a_gradient() -> None:
    x = torch.randn(3, 8, requires_grad=True)
    y = UniformGrid(0.1, 0, -8, 7).quantize(x, "clipped")
    (grad,) = torch.autograd.grad((y * x).sum(), x, create_graph=True)
    assert grad.requires_grad
    inside = y.detach().sub(x.detach()).abs().lt(0.06)
    assert torch.equal(torch.autograd.grad(grad.sum(), x)[0], 2.0 * inside)


def test_layout_of_bits_is_that_of_memory(cpu_kernels: Kernels) -> None:
    x = hard(IMAGES).contiguous(memory_format=torch.channels_last)
    assert is_channels_last(x)
    _, bits = cpu_kernels["uniform", x.dtype](x, torch.tensor(0.1), -8, 7, wants_inside=True)
    _, rows = cpu_kernels["uniform", x.dtype](x.permute(0, 2, 3, 1), torch.tensor(0.1), -8, 7, wants_inside=True)
    assert torch.equal(bits, rows)
