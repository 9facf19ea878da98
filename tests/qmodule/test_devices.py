"""Whole models in every state on a CUDA device that need not be there."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchquant as tq
from torchquant.qmodule.bn_folding import FOLD_MODES
from torchquant.quantizers._laws.devices import FakeDevice, check_step, leaf_gradients
from torchquant.search.learning.mixture import MixtureQuantizer

IMAGES, TOKENS = torch.rand(2, 3, 6, 6), torch.tensor([[1, 2, 0, 2], [0, 1, 1, 2]])
TRAIN = tq.QModuleState.QUANT_AWARE_TRAIN


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.bn(self.conv(x)))
        return self.fc((y + F.silu(y)).mean((2, 3)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(3, 8), nn.LayerNorm(8)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        q, k, v = self.qkv(self.norm(x)).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        mixed = torch.softmax(q @ k.transpose(-1, -2) / 2.0, -1) @ v
        return x + F.gelu(self.out(mixed.transpose(1, 2).reshape(x.shape)))


@cache
def convolutions() -> nn.Module:
    return calibrated(tq.quantize(Convolutions(), "w8a8", IMAGES), IMAGES)


def calibrated(model: nn.Module, x: Tensor) -> nn.Module:
    with tq.qmodule_state(model, tq.QModuleState.CALIBRATION):
        model(x)
    return model


def check(model: nn.Module, x: Tensor, state: tq.QModuleState) -> None:
    device = FakeDevice()
    with tq.qmodule_state(model, state):
        moved = device.copy(model)
        check_step(device, moved, x, moved)


@pytest.mark.parametrize("state", tq.QModuleState, ids=lambda state: state.name)
def test_a_convolutional_network_in_every_state(state: tq.QModuleState) -> None:
    check(convolutions(), IMAGES, state)


@pytest.mark.parametrize("mode", FOLD_MODES)
def test_every_way_to_fold_a_batch_norm(mode: str) -> None:
    quantizers = tq.make_quantizer("affine:8/channel"), tq.make_quantizer("affine:8@clipped", "output")
    wrapper = tq.QWrapper([nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()], *quantizers, fold_bn=mode)
    check(calibrated(wrapper, IMAGES), IMAGES, TRAIN)


@pytest.mark.parametrize("state", [TRAIN, tq.QModuleState.QUANT_EVAL], ids=lambda state: state.name)
def test_a_transformer(state: tq.QModuleState) -> None:
    check(calibrated(tq.quantize(Attention(), "w8a8", TOKENS), TOKENS), TOKENS, state)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("rows", [["clipq:2", "esb:2,k=0", "affine:4@ewgs"], [{n: f"affine:{n}" for n in (2, 3, 4)}]])
def test_a_mixture_of_a_search(rows: list[str], hard: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def grad(y: Tensor, inputs: list[Tensor], grad_output: Tensor, allow_unused: bool) -> list[Tensor | None]:
        found = {id(leaf): gradient for leaf, gradient in leaf_gradients(y, grad_output)}
        return [found.get(id(x)) for x in inputs]

    monkeypatch.setattr(torch.autograd, "grad", grad)  # its backward asks the engine of torch again
    mixture, x, device = MixtureQuantizer(rows, "output"), torch.randn(4, 9), FakeDevice()
    mixture.pre_observe(x)
    mixture.hard = hard
    moved = device.copy(mixture)
    check_step(device, moved, x, moved)
