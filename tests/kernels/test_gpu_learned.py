"""The Triton kernels of learned steps, offsets and ends equal the PyTorch code; their sums have the stated order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.on_gpu import DEVICE, FLOATS, have_equal_signs, on_device, triton, use
from tests.kernels.tensors import hard, is_same, shifted
from tests.kernels.test_learned import FUNCTIONS, check_each_gradient_alone, numbers_of, results
from torchquant.quantizers_functional import lsq, tqt

SHAPES: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = (
    ((33, 5), ()),
    ((6, 4, 3, 3), (6, 1, 1, 1)),
    ((5, 8, 2, 4), (5, 1, 1, 1)),
    ((2, 6, 3, 4), (1, 6, 1, 1)),
    ((5, 30), (30,)),
    ((777,), (1,)),
)
"""Shapes of x and of its learned numbers: rows of 8 are in one channel, or not."""


def check(name: str, x: Tensor, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    x, numbers = x.to(DEVICE), [n.to(DEVICE) for n in numbers_of(name, shape, x.dtype)]
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype).to(DEVICE)
    grad = torch.empty_like(x).copy_(grad)
    known = x.nan_to_num(0.3, torch.inf, -torch.inf)
    found = []
    for wanted in (True, False):
        use(monkeypatch, wanted)
        found.append((FUNCTIONS[name][0](x, *numbers), *results(name, known, numbers, grad)))
    (value, y, for_x, *sums), (expected, expected_y, expected_for_x, *expected_sums) = found
    for one, other in ((value, expected), (y, expected_y), (for_x, expected_for_x)):
        assert is_same(one, other)
        assert have_equal_signs(one, other)
    most = grad.abs().sum_to_size(shape) * 64.0 * torch.finfo(grad.dtype).eps
    for one, other in zip(sums, expected_sums, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert ((one - other).abs() <= most).all()


@on_device
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_and_gradients(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for shape, numbers_shape in SHAPES:
        x = hard(shape, 0.125 if name == "tqt" else 0.1, dtype)  # with elements in the middle of two levels
        check(name, x, numbers_shape, monkeypatch)
        if x.ndim == 4:
            check(name, x.contiguous(memory_format=torch.channels_last), numbers_shape, monkeypatch)
    for n in (1, 7, 9):
        check(name, shifted(hard((n,), dtype=dtype)), (), monkeypatch)


def sums_of_pairs(parts: Tensor, axis: int | None) -> Tensor:
    """Add up the parts of each slice of an axis, or all, in the order that gpu_learned.py states."""
    rows = (parts.reshape(1, -1) if axis is None else parts.transpose(0, axis).flatten(1)).contiguous()
    if axis is None or rows.shape[1] % 8 == 0:
        rows = torch.nn.functional.pad(rows, (0, -rows.shape[1] % 8)).unflatten(1, (-1, 2, 2, 2))
        for _ in range(3):
            rows = rows[..., 0] + rows[..., 1]
    return rows.unsqueeze(0).sum((0, 2), dtype=torch.float64).to(parts.dtype)


@on_device
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("shape", "axis"), [((1003,), None), ((6, 4, 3, 3), 0), ((5, 8, 2, 4), 0)])
def test_sums_have_one_order(
    shape: tuple[int, ...], axis: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order in which the gradient of a step is added depends neither on the block nor on the address of x."""
    from torchquant.kernels import gpu, gpu_learned

    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(shape, generator=generator, dtype=dtype).to(DEVICE) for _ in range(2))
    step = x.new_full([1] * len(shape) if axis is None else [shape[0], 1, 1, 1], 0.1)
    each, codes = step.expand_as(x).contiguous(), (-8, 7)
    for name, others, parts in (
        ("learned_step_backward", (None, None, (False, True, False)), lsq._gradients),
        ("rounded_step_backward", ((False, True),), tqt._gradients),
    ):
        given = (*others[:-1], codes, others[-1]) if parts is lsq._gradients else (*codes, *others)
        expected = sums_of_pairs(parts(x, grad, each, *given)[1], axis)  # type: ignore[operator]
        for rows, data, other in ((16, x, grad), (64, x, grad), (64, shifted(x), shifted(grad, 3))):
            block = triton.Config({"ROWS": rows}, num_warps=2)
            monkeypatch.setattr(gpu_learned._differentiate, "configs", [block])
            found = gpu.kernels()[name, dtype](data, other, step, *codes, *others)[1]
            assert torch.equal(found.view(-1), expected)


@on_device
@pytest.mark.parametrize("name", FUNCTIONS)
def test_only_what_is_asked_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch)
    x, numbers = torch.randn(3, 50, device=DEVICE), [n.to(DEVICE) for n in numbers_of(name, (3, 1), torch.float32)]
    check_each_gradient_alone(name, x, numbers)
