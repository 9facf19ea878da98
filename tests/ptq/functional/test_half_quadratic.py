"""Half-quadratic quantization: the published rounds, and a zero point that must stay real."""

from __future__ import annotations

import pytest
import torch

from tests.ptq.oracles import GOLDENS, close, real
from torchquant.ptq.functional.half_quadratic import at_zero, half_quadratic_zero, shrink

GOLDEN = GOLDENS["hqq"]
WEIGHT = real([GOLDEN["w"]])
SCALE = (WEIGHT.amax(1, keepdim=True) - WEIGHT.amin(1, keepdim=True)) / 3
ZERO = -WEIGHT.amin(1, keepdim=True) / SCALE


def test_published_shrinking() -> None:
    golden = GOLDEN["shrink"]
    close(shrink(real(golden["x"]), golden["beta"], golden["p"]), golden["y"])


@pytest.mark.parametrize("rounds", [1, 2, 3, 4, 5, 20])
def test_published_rounds(rounds: int) -> None:
    golden = GOLDEN["iterations"][min(rounds, 5) - 1]
    found = half_quadratic_zero(WEIGHT, SCALE, ZERO, 0, 3, rounds)
    close(found.zero, [[golden["zero"]]])
    error = WEIGHT - found.rounded
    close(error.abs().mean(), golden["l1"])
    close(error.square().mean(), golden["l2"])
    assert torch.equal(found.rounded, SCALE * (found.codes - found.zero))


def test_rounding_the_zero_loses_what_was_gained() -> None:
    found = half_quadratic_zero(WEIGHT, SCALE, ZERO, 0, 3)

    def error_at(zero: torch.Tensor) -> float:
        return float((WEIGHT - at_zero(WEIGHT, SCALE, zero, 0, 3).rounded).abs().mean())

    assert error_at(found.zero) < error_at(ZERO) - 0.02
    assert error_at(found.zero.round()) > error_at(found.zero)


def test_rows_are_done_one_by_one() -> None:
    torch.manual_seed(0)
    weight = torch.cat([WEIGHT, torch.randn(3, 32, dtype=torch.float64) * 0.1])
    scale = (weight.amax(1, keepdim=True) - weight.amin(1, keepdim=True)) / 3
    zero = -weight.amin(1, keepdim=True) / scale
    together = half_quadratic_zero(weight, scale, zero, 0, 3)
    for i in range(4):
        row = slice(i, i + 1)
        close(half_quadratic_zero(weight[row], scale[row], zero[row], 0, 3).zero, together.zero[row].tolist())
    before = (weight - at_zero(weight, scale, zero, 0, 3).rounded).abs().mean(1)
    assert bool(((weight - together.rounded).abs().mean(1) <= before).all())
