"""The C++ kernels of formats with a scale equal the pure PyTorch code, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.conftest import Kernels
from tests.kernels.tensors import SIZES, hard, is_same, shifted
from torchquant import kernels
from torchquant.quantizers_functional._bits import pack_mask
from torchquant.quantizers_functional._gradient import where_strictly_inside
from torchquant.quantizers_functional.binary import DrawnSigns, Signs
from torchquant.quantizers_functional.esb import ESB_FORMS
from torchquant.quantizers_functional.formats import ScaledFormat
from torchquant.quantizers_functional.midrise import MidriseGrid
from torchquant.quantizers_functional.minifloat import FORMATS, FloatFormat, ScaledFloat
from torchquant.quantizers_functional.pot import PowersOfTwo
from torchquant.quantizers_functional.ternary import Ternary

CLAMPS = (None, (0.0, None), (0.0, 6.0), (None, 0.5), (-0.3, 0.7))


def formats(scale: Tensor | float, other: Tensor | float, axis: int | None = None) -> list[ScaledFormat]:
    floats = (ESB_FORMS[4, 1], ESB_FORMS[3, 0], ESB_FORMS[8, 4], *FORMATS.values(), FloatFormat(5, 10, bias=40))
    return [
        Signs(scale, axis=axis),
        Ternary(scale, other, axis=axis),
        PowersOfTwo(scale, 4, axis=axis),
        PowersOfTwo(scale, 1, axis=axis),
        *(ScaledFloat(scale, form, axis=axis) for form in floats),
        ScaledFloat(scale, floats[0], shift=other, axis=axis),
        MidriseGrid(scale, 4, axis=axis),
        MidriseGrid(scale, 1, other, axis=axis),
        MidriseGrid(scale, 3, shift=other, axis=axis),
    ]


def check(form: ScaledFormat, x: Tensor, clamp: Any = None) -> None:
    for want_inside, is_strict in ((False, False), (True, False), (False, True), (True, True)):
        found = form.fused(x, want_inside, clamp, is_strict)
        assert found is not None
        value, mask = form.project(x, want_inside, clamp)
        if clamp is not None and is_strict:
            mask = where_strictly_inside(x, clamp, mask)
            if None not in clamp and not want_inside:
                mask[x.isnan()] = 1.0  # hardtanh_backward is 0 there in whole vectors and 1 in the rest
        assert is_same(found[0], value)
        numbers = ~value.isnan()
        assert torch.equal(found[0].signbit()[numbers], value.signbit()[numbers])
        assert (found[1] is None) == (mask is None)
        assert mask is None or (found[1] is not None and torch.equal(found[1], pack_mask(mask)))


@pytest.fixture
def active(cpu_kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_BY_DEVICE", {"cpu": cpu_kernels})


@pytest.mark.usefixtures("active")
def test_formats_per_tensor() -> None:
    for form in formats(torch.tensor(0.3), torch.tensor(0.21)):
        for clamp in CLAMPS:
            check(form, hard((777,)), clamp)
        for n in SIZES:
            check(form, shifted(hard((n,))))
    for scale, other in ((0.1, 0.0), (2.0**-126, 1e-39), (torch.tensor(torch.nan), 0.1), (0.0, 0.0), (1e38, 1e38)):
        for form in formats(scale, other):
            check(form, hard((777,)))


@pytest.mark.usefixtures("active")
@pytest.mark.parametrize(("axis", "shape"), [(0, (5, 3, 3, 3)), (1, (3, 5, 4, 7)), (-1, (6, 70)), (2, (2, 3, 4, 11))])
def test_formats_per_channel(axis: int, shape: tuple[int, ...]) -> None:
    n = shape[axis]
    for form in formats(torch.linspace(0.05, 0.4, n), torch.linspace(0.02, 0.3, n), axis):
        for clamp in CLAMPS[:3]:
            check(form, hard(shape), clamp)
            if len(shape) == 4:
                check(form, hard(shape).contiguous(memory_format=torch.channels_last), clamp)


@pytest.mark.usefixtures("active")
def test_kernel_is_for_the_very_class() -> None:
    class Own(Ternary):
        def nearest(self, x: Tensor, want_inside: bool) -> tuple[Tensor, Tensor | None]:
            return x.round(), None

    class Same(Ternary):
        pass

    x = torch.randn(20)
    assert Own(0.3, 0.2).fused(x, False, None, False) is None
    assert DrawnSigns(0.3).fused(x, False, None, False) is None
    assert Same(0.3, 0.2).fused(x, False, None, False) is not None
    assert ScaledFloat(0.3, FloatFormat(5, 10, bias=130)).fused(x, False, None, False) is None
    assert Ternary(torch.rand(4, 5), 0.2).fused(x.view(4, 5), False, None, False) is None
