"""Steps and zero points by the Triton kernel equal those by PyTorch, bit for bit."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from tests.kernels.on_gpu import DEVICE, FLOATS, on_device, use
from tests.kernels.tensors import is_same
from tests.kernels.test_affine import ENDS
from torchquant.quantizers_functional.affine import SYMMETRIES, affine_params


@on_device
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("symmetric", SYMMETRIES)
def test_the_grid_of_a_range(symmetric: bool | str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = list(product([*ENDS, *(-end for end in ENDS)], repeat=2))
    drawn = torch.randn(2, 500, dtype=dtype, generator=torch.Generator().manual_seed(0)) * 3
    low, high = torch.cat([torch.tensor(pairs, dtype=torch.float64).to(dtype).T, drawn], 1).contiguous().to(DEVICE)
    for n_bits in (2, 8, 24):
        for ends in ((low, high), (low[7], high[7]), (low.double(), high)):
            found = []
            for wanted in (True, False):
                use(monkeypatch, wanted)
                found.append(affine_params(*ends, n_bits, symmetric))
            (step, zero_point, *codes), (expected, expected_zero_point, *expected_codes) = found
            assert codes == expected_codes
            assert is_same(step, expected)
            assert is_same(torch.as_tensor(zero_point), torch.as_tensor(expected_zero_point))
