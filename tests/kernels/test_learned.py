"""The C++ kernels of learned steps, offsets and ends equal the pure PyTorch code; sums of gradients up to rounding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.kernels.conftest import Kernels
from tests.kernels.tensors import SIZES, hard, is_same, shifted
from torchquant import kernels
from torchquant.quantizers_functional.lsq import lsq_quantize
from torchquant.quantizers_functional.pact import pact_quantize
from torchquant.quantizers_functional.tqt import tqt_quantize

Function = Callable[..., Tensor]
FUNCTIONS: dict[str, tuple[Function, float, int]] = {
    "lsq": (lambda x, step: lsq_quantize(x, step, 4, gradient_scale=0.5), 0.1, 1),
    "lsq unsigned": (lambda x, step: lsq_quantize(x, step, 8, False), 0.05, 1),
    "ewgs": (lambda x, step: lsq_quantize(x, step, 2, delta=torch.tensor(0.3)), 0.1, 1),
    "lsq+": (lambda x, step, offset: lsq_quantize(x, step, 4, False, 1.0, offset), 0.1, 2),
    "lsq+ ewgs": (lambda x, step, offset: lsq_quantize(x, step, 4, False, 1.0, offset, torch.tensor(0.3)), 0.1, 2),
    "tqt": (lambda x, log2_t: tqt_quantize(x, log2_t, 4), -0.3, 1),
    "pact": (lambda x, alpha: pact_quantize(x, alpha, 4), 1.5, 1),
    "sat": (lambda x, alpha: pact_quantize(x, alpha, 4, calibrated=True), 1.5, 1),
}
"""name -> function of x and learned numbers, about where the first number is, how many there are"""
SHAPES: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = (
    ((33, 5), ()),
    ((64, 5, 3, 3), (64, 1, 1, 1)),
    ((2, 6, 9, 9), (1, 6, 1, 1)),
    ((5, 300), (300,)),
    ((3, 7, 3000), (1, 7, 1)),
    ((40_001,), (1,)),
    ((40_000, 1), (40_000, 1)),
)


def numbers_of(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    _, start, n_numbers = FUNCTIONS[name]
    generator = torch.Generator().manual_seed(0)
    return [
        first + spread * torch.rand(shape, generator=generator, dtype=dtype)
        for first, spread in ((start, 0.1), (0.02, 0.1))[:n_numbers]
    ]


def results(name: str, x: Tensor, numbers: list[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, *numbers)]
    y = FUNCTIONS[name][0](*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def check(name: str, x: Tensor, numbers: list[Tensor], monkeypatch: pytest.MonkeyPatch, active: Kernels) -> None:
    """Compare the results with and without kernels; gradients where x is a number, as PyTorch's own are not alike."""
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    grad = torch.empty_like(x).copy_(grad)
    known = x.nan_to_num(0.3, torch.inf, -torch.inf)
    found = []
    for table in (active, {}):
        monkeypatch.setattr(kernels, "_BY_DEVICE", {"cpu": table})
        found.append((FUNCTIONS[name][0](x, *numbers), results(name, known, numbers, grad)))
    (value, (y, for_x, *sums)), (expected, (expected_y, expected_for_x, *expected_sums)) = found
    for one, other in ((value, expected), (y, expected_y), (for_x, expected_for_x)):
        assert is_same(one, other)
        assert torch.equal(one.signbit()[~one.isnan()], other.signbit()[~one.isnan()])
    most = grad.abs().sum_to_size(numbers[0].shape) * 16.0 * torch.finfo(grad.dtype).eps
    for one, other in zip(sums, expected_sums, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert ((one - other).abs() <= 4.0 * most).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_and_gradients(
    name: str, dtype: torch.dtype, cpu_kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    for shape, numbers_shape in SHAPES:
        x, numbers = hard(shape, dtype=dtype), numbers_of(name, numbers_shape, dtype)
        check(name, x, numbers, monkeypatch, cpu_kernels)
        if x.ndim == 4:
            check(name, x.contiguous(memory_format=torch.channels_last), numbers, monkeypatch, cpu_kernels)
    for n in SIZES:
        check(name, shifted(hard((n,), dtype=dtype)), numbers_of(name, (), dtype), monkeypatch, cpu_kernels)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_sums_do_not_depend_on_threads(name: str, cpu_kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_BY_DEVICE", {"cpu": cpu_kernels})
    before = torch.get_num_threads()
    try:
        for shape, numbers_shape in (((100_001,), ()), ((3, 7, 101, 103), (1, 7, 1, 1)), ((70_000, 3), (70_000, 1))):
            x, grad = torch.randn(shape), torch.randn(shape)
            numbers = numbers_of(name, numbers_shape, x.dtype)
            found = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found.append(results(name, x, numbers, grad))
            for own in found[1:]:
                for one, other in zip(own, found[0], strict=True):
                    torch.testing.assert_close(one, other, rtol=0.0, atol=0.0)
    finally:
        torch.set_num_threads(before)


def check_each_gradient_alone(name: str, x: Tensor, numbers: list[Tensor]) -> None:
    """Check that a gradient that is asked for alone is the one among all, and the only one."""
    _, *everything = results(name, x, numbers, torch.ones_like(x))
    for i in range(len(everything)):
        given = [t.clone().requires_grad_(i == k) for k, t in enumerate((x, *numbers))]
        FUNCTIONS[name][0](*given).sum().backward()
        assert [t.grad is None for t in given] == [i != k for k in range(len(given))]
        assert torch.equal(given[i].grad, everything[i])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_only_what_is_asked_for(name: str, cpu_kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_BY_DEVICE", {"cpu": cpu_kernels})
    x, numbers = torch.randn(3, 50), numbers_of(name, (3, 1), torch.float32)
    check_each_gradient_alone(name, x, numbers)


def test_pact_keeps_two_bits_an_element(cpu_kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_BY_DEVICE", {"cpu": cpu_kernels})
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        pact_quantize(torch.randn(800, requires_grad=True), torch.tensor(1.0, requires_grad=True), 4)
    assert sorted(t.nbytes for t in kept) == [4, 100, 100]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_have_gradients(name: str, cpu_kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient with respect to the incoming one is that of a linear function."""
    monkeypatch.setattr(kernels, "_BY_DEVICE", {"cpu": cpu_kernels})
    x = torch.randn(40)
    numbers = [n.requires_grad_() for n in numbers_of(name, (), torch.float32)]
    grad = torch.rand(40, requires_grad=True)
    y = FUNCTIONS[name][0](x, *numbers)
    (for_number, *_) = torch.autograd.grad(y, numbers, grad, create_graph=True)
    (again,) = torch.autograd.grad(for_number, grad)
    torch.testing.assert_close((again * grad).sum(), for_number)
