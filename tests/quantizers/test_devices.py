"""Quantizers, observers and gradients on a CUDA device that need not be there; and proof that the law can fail."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import torchquant as tq
from tests.quantizers.test_laws import CASES, PER_CHANNEL
from torchquant.errors import LawViolation
from torchquant.quantizers import QUANTIZERS, Quantizer
from torchquant.quantizers._laws.devices import FakeDevice, backward, check_step
from torchquant.range_observers import OBSERVERS

LAW = ("keeps_device",)


def train(quantizer: Quantizer, x: Tensor) -> None:
    device = FakeDevice()
    moved = device.copy(quantizer)

    def step(x: Tensor) -> Tensor:
        moved.pre_observe(x)
        y = moved(x)
        moved.post_observe(y)
        return y

    check_step(device, moved, x, step)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_every_scheme_trains_on_its_device(name: str) -> None:
    quantizer = QUANTIZERS[name].examples(0 if name in PER_CHANNEL else None)[0]
    train(quantizer, torch.rand(4, 6, 5, 5))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "axis", "i"), CASES)
def test_every_example_keeps_its_device(name: str, axis: int | None, i: int) -> None:
    assert tq.check_quantizer(QUANTIZERS[name].examples(axis)[i], laws=LAW).passed == LAW


@pytest.mark.parametrize("text", ["affine:4", "binary/channel", "esb:4,k=1/group=5", "affine:4/block=2x8", "lsq:4"])
def test_every_gradient_every_granularity_and_pinned_numbers_keep_their_device(text: str) -> None:
    assert tq.check_quantizer(tq.make_quantizer(text), torch.randn(4, 40), laws=LAW).passed == LAW


def test_the_grid_of_a_token_keeps_its_device() -> None:
    train(tq.make_quantizer("affine:8,symmetric=narrow/token", "input"), torch.randn(4, 40))


@pytest.mark.parametrize("granularity", ["", pytest.param("/channel", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", OBSERVERS)
def test_every_observer_keeps_its_device(name: str, granularity: str) -> None:
    train(tq.make_quantizer(f"affine:4,observer={name}{granularity}", "output"), torch.randn(4, 3, 6))


class Careless(Quantizer):
    """A quantizer that is correct on a CPU and breaks on a GPU, in one of several ways."""

    n_bits = 3

    def __init__(self, mistake: str) -> None:
        super().__init__()
        self.mistake = mistake
        self.step = torch.full((5,), 0.5)  # no buffer: `.to(device)` leaves it where it is

    def quantize(self, x: Tensor) -> Tensor:
        step = 0.5
        if self.mistake == "mixes":
            step = self.step
        if self.mistake == "copies":
            step = torch.tensor(0.5, device=x.device)
        if self.mistake == "reads":
            step = 0.5 if float(x.detach().amax()) < 1e9 else 1.0
        if self.mistake == "indexes":
            x.detach().clone()[x.detach() > 0.0]
        if self.mistake == "leaves":
            x = x.cpu()
        return x + ((x / step).round().clamp(-4, 3) * step - x).detach()


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ("mixes", "DeviceMismatchError"),
        ("copies", r"_to_copy.default at .*test_devices.py:\d+ copies between cpu and cuda:0, and waits"),
        ("reads", "DataDependentOutput"),
        ("indexes", "DynamicOutputShape"),
        ("leaves", "copies between cpu and cuda:0"),
    ],
)
def test_a_quantizer_that_breaks_or_waits_on_a_gpu_is_caught(mistake: str, said: str) -> None:
    assert tq.check_quantizer(Careless("none"), laws=LAW).passed == LAW
    with pytest.raises(LawViolation, match=said):
        tq.check_quantizer(Careless(mistake), laws=LAW)


def test_the_gradients_of_a_fake_step_have_the_form_of_those_that_torch_computes() -> None:
    layers, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()), torch.randn(2, 3, 5, 5)
    device = FakeDevice()
    moved, fake = device.copy(layers), device.tensor(x.requires_grad_())
    layers(x).sum().backward()
    with device.watch():
        y = moved(fake)
        backward(y + y * fake.mean())  # a value that is read twice
    for there, here in zip((*moved.parameters(), fake), (*layers.parameters(), x), strict=True):
        assert (there.grad.shape, there.grad.dtype) == (here.grad.shape, here.grad.dtype)
        assert there.grad.device.type == "cuda"
