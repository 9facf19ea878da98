"""Codes of few bits come back from bytes that hold several of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from torchquant.quantizers_functional._bits import pack_codes, unpack_codes


@pytest.fixture
def codes() -> Tensor:
    return torch.randint(0, 256, (1001,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 1001])
def test_packed_codes_come_back(codes: Tensor, bits: int, n: int) -> None:
    codes = codes[:n] & (2**bits - 1)
    small = pack_codes(codes, bits)
    assert small.numel() == -(-n * bits // 8)
    assert torch.equal(unpack_codes(small, bits, n), codes)
