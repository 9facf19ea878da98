"""The Triton kernels of formats with a scale equal the pure PyTorch code, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.on_gpu import DEVICE, on_device, use
from tests.kernels.tensors import hard, shifted
from tests.kernels.test_projections import check, formats
from torchquant.quantizers_functional.formats import ScaledFormat


def some_formats(scale: Tensor | float, other: Tensor | float, axis: int | None = None) -> list[ScaledFormat]:
    """Return a format of each kernel, with and without a shift, and few of the many mini-floats: ESB, FP4 and FP8."""
    everything = formats(scale, other, axis)
    return [*everything[:4], everything[4], everything[7], everything[11], *everything[-4:]]


@on_device
def test_formats_per_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch)
    for form in some_formats(torch.tensor(0.3, device=DEVICE), torch.tensor(0.21, device=DEVICE)):
        check(form, hard((333,)).to(DEVICE))
        for n, clamp in ((1, None), (7, (0.0, None)), (9, (-0.3, 0.7))):
            check(form, shifted(hard((n,)).to(DEVICE)), clamp)


@on_device
@pytest.mark.slow
def test_formats_of_hard_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch)
    for scale, other in ((2.0**-126, 1e-39), (torch.nan, 0.1), (0.0, 0.0), (1e38, 1e38)):
        for form in some_formats(scale, other):
            check(form, hard((333,)).to(DEVICE), (None, 0.5))


@on_device
@pytest.mark.parametrize(
    ("axis", "shape"),
    [(1, (3, 5, 4, 7)), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((0, (5, 3, 3, 3)), (-1, (6, 70))))],
)
def test_formats_per_channel(axis: int, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch)
    scale, other = (torch.linspace(*ends, shape[axis], device=DEVICE) for ends in ((0.05, 0.4), (0.02, 0.3)))
    for form in some_formats(scale, other, axis):
        x = hard(shape).to(DEVICE)
        check(form, x.contiguous(memory_format=torch.channels_last) if axis == 1 else x, (0.0, 6.0))
