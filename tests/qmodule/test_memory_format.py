"""Memory formats on a CPU: channels_last trains as the default format does, and our own data has the default."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from torchquant import QModuleState, make_quantizer, qmodule_state
from torchquant.qmodule import QWrapper
from torchquant.qmodule.patterns import _run_conv
from torchquant.runs.data import load_data, make_pictures

FORMATS = {2: torch.channels_last, 3: torch.channels_last_3d}


def channels_last(x: Tensor) -> Tensor:
    return (
        x.transpose(1, 2).contiguous().transpose(1, 2)
        if x.ndim == 3
        else x.contiguous(memory_format=FORMATS[x.ndim - 2])
    )


@pytest.mark.parametrize("n_channels", [1, 3, 7, 12])
@pytest.mark.parametrize(
    ("conv", "size"),
    [
        (lambda c: nn.Conv1d(c, 5, 1, stride=3), (200,)),
        (lambda c: nn.Conv2d(c, 5, 1, stride=2), (64, 64)),
        (lambda c: nn.Conv2d(c, 5, 1, stride=(1, 3), bias=False, padding="valid"), (50, 49)),
        (lambda c: nn.Conv3d(c, 5, 1, stride=2), (3, 48, 48)),
    ],
    ids=["1d", "2d", "2d-one-side", "3d"],
)
def test_a_pointwise_convolution_with_stride_learns_the_same_in_either_format(conv, size, n_channels) -> None:
    """Direct, the channels_last weight gradient writes past its memory: a crash is a failure."""
    layer = conv(n_channels)
    x = torch.randn(4, n_channels, *size)
    found = []
    for picture in (x, channels_last(x)):
        picture, own = picture.detach().requires_grad_(), copy.deepcopy(layer)
        for _ in range(3):
            y = _run_conv(own, picture, own.weight, own.bias)
            y.square().sum().backward()
        with torch.no_grad():
            assert torch.equal(y, own(picture))  # as in evaluation, bit for bit
        found.append([y, picture.grad, *(p.grad for p in own.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


def test_a_wrapped_layer_trains_in_channels_last() -> None:
    wrapper = QWrapper(nn.Conv2d(3, 8, 1, stride=2), make_quantizer("affine:8/channel"), make_quantizer("affine:8"))
    x = channels_last(torch.randn(16, 3, 64, 64))
    with qmodule_state(wrapper, QModuleState.QUANT_AWARE_TRAIN):
        for _ in range(3):
            wrapper(x).sum().backward()
    assert wrapper.layer.weight.grad is not None


def test_pictures_have_the_default_memory_format(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for split in ("train", "test"):
        for label in ("a", "b"):
            folder = tmp_path / split / label
            folder.mkdir(parents=True)
            for i in range(2):
                image.new("RGB", (70, 66), (i, 9, 99)).save(folder / f"{i}.png")
    laid_out = channels_last(torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8))
    by_hand = make_pictures((laid_out, torch.zeros(4, dtype=torch.int64)), (laid_out, torch.zeros(4)), 2)
    for data in (load_data(str(tmp_path)), by_hand):
        batch, _ = next(data.train_batches(torch.Generator().manual_seed(0), 3))
        assert batch.is_contiguous()
        assert data.test_images.is_contiguous()
