"""Steps and zero points by the kernel equal those by torch, bit for bit."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch

from tests.kernels.conftest import Kernels
from tests.kernels.tensors import is_same
from torchquant import kernels
from torchquant.quantizers_functional.affine import SYMMETRIES, affine_params

ENDS = [0.0, -0.0, 1e-310, 1e-45, 1e-40, 2.0**-126, 1e-3, 0.1, 1.0, 127.5, 255.0, 3e38, 1e300, math.inf, math.nan]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("symmetric", SYMMETRIES)
def test_the_grid_of_a_range(
    symmetric: bool | str, dtype: torch.dtype, cpu_kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = list(product([*ENDS, *(-end for end in ENDS)], repeat=2))
    drawn = torch.randn(2, 2000, dtype=dtype, generator=torch.Generator().manual_seed(0)) * 3
    low, high = torch.cat([torch.tensor(pairs, dtype=torch.float64).to(dtype).T, drawn], 1).contiguous()
    for n_bits in (1, 2, 4, 8, 24):
        if n_bits == 1 and symmetric in ("narrow", "asymmetric-narrow"):
            continue
        for ends in ((low, high), (low[7], high[7]), (low[-1], high[-1]), (low[:0], high[:0]), (low.double(), high)):
            found = []
            for table in ({}, cpu_kernels):
                monkeypatch.setattr(kernels, "_BY_DEVICE", {"cpu": table})
                found.append(affine_params(*ends, n_bits, symmetric))
            (step, zero_point, *codes), (expected, expected_zero_point, *expected_codes) = found[::-1]
            assert codes == expected_codes
            assert is_same(step, expected)
            assert is_same(torch.as_tensor(zero_point), torch.as_tensor(expected_zero_point))
