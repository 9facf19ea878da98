"""The Triton kernels of a mixture equal the pure PyTorch code, its values and the gradient of x bit for bit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.on_gpu import DEVICE, on_device, use
from tests.kernels.tensors import hard, shifted
from tests.kernels.test_mixtures import check_reference, fitted, mixed
from torchquant.quantizers import Quantizer
from torchquant.search.learning import mixing


def check(x: Tensor, quantizers: list[Quantizer], monkeypatch: pytest.MonkeyPatch, clamp: Any = None) -> None:
    use(monkeypatch)
    name, (value, of_x, of_shares) = mixed(x, quantizers, clamp)
    assert name == "_FusedBackward"
    use(monkeypatch, wanted=False)
    check_reference(x, quantizers, clamp, value, of_x, of_shares)


@pytest.fixture(autouse=True)
def without_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixing, "TABLE_PAYS", math.inf)


@on_device
def test_mixtures_per_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    quantizers = fitted("tensor", torch.randn(500, device=DEVICE) * 0.5)
    for clamp in (None, (0.0, None), (-0.3, 0.7)):
        check(hard((333,)).to(DEVICE), quantizers, monkeypatch, clamp)
    for n in (1, 9):
        check(shifted(hard((n,)).to(DEVICE)), quantizers, monkeypatch)


@on_device
@pytest.mark.parametrize("shape", [(5, 3, 3, 3), pytest.param((6, 70), marks=pytest.mark.slow)])
def test_mixtures_per_channel(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]) -> None:
    sizes = torch.linspace(0.1, 2.0, shape[0]).view(-1, *[1] * (len(shape) - 1))
    seen = (torch.randn(shape) * sizes).to(DEVICE)
    quantizers = fitted("channel", seen)
    check(hard(shape).to(DEVICE), quantizers, monkeypatch, (0.0, 1.5))
    if len(shape) == 4:
        images = hard(shape).to(DEVICE).contiguous(memory_format=torch.channels_last)
        check(images, [*quantizers[::2], *fitted("tensor", seen)[1::2]], monkeypatch)


@on_device
def test_only_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch)
    x, shares = torch.randn(3, 50, device=DEVICE), torch.tensor([0.25, 0.75], device=DEVICE)
    quantizers = fitted("tensor", x, ("affine:4@clipped", "esb:4,k=1"))
    both = torch.autograd.grad(
        mixing.mix(x.requires_grad_(), quantizers, shares.requires_grad_()).square().sum(), (x, shares)
    )
    (of_x,) = torch.autograd.grad(mixing.mix(x, quantizers, shares.detach()).square().sum(), x)
    (of_shares,) = torch.autograd.grad(mixing.mix(x.detach(), quantizers, shares).square().sum(), shares)
    assert torch.equal(of_x, both[0])
    assert torch.equal(of_shares, both[1])
