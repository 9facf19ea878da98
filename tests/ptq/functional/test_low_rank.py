"""Low-rank corrections: Eckart and Young, the data-aware optimum, LoftQ."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ptq.oracles import GOLDENS, GRAM, close, error_of, random_gram, real
from torchquant.ptq.functional.low_rank import loftq, low_rank_terms

GOLDEN = GOLDENS["low_rank"]
W = real(GOLDEN["W"])


def ternary(weight: Tensor) -> Tensor:
    """2 bit narrow per row."""
    scale = weight.abs().amax(-1, keepdim=True)
    return (weight / scale).round().clamp(-1, 1) * scale


RESIDUAL = W - ternary(W)


def left_over(residual: Tensor, rank: int, gram: Tensor | None = None) -> Tensor:
    left, right = low_rank_terms(residual, rank, gram, damp=0.0)
    assert left.shape[-1] == right.shape[-2] == min(rank, *residual.shape[-2:])
    return residual - left @ right


def test_published_errors() -> None:
    values = GOLDEN["residual_singular_values"]
    close(torch.linalg.svdvals(RESIDUAL), values)
    close(left_over(RESIDUAL, 1).square().sum(), GOLDEN["rank1_error_plain"])
    for rank in range(5):
        close(left_over(RESIDUAL, rank).square().sum(), sum(value**2 for value in values[rank:]))
    close(error_of(RESIDUAL, GRAM), GOLDEN["data_error"]["none"])
    close(error_of(left_over(RESIDUAL, 1), GRAM), GOLDEN["data_error"]["plain_svd"])
    close(error_of(left_over(RESIDUAL, 1, GRAM), GRAM), GOLDEN["data_error"]["whitened_svd"])


@pytest.mark.parametrize("rounds", [1, 2, 3, 4, 5])
def test_published_loftq(rounds: int) -> None:
    rounded, left, right = loftq(W, 1, ternary, rounds)
    close((W - rounded - left @ right).square().sum(), GOLDEN["loftq_errors"][rounds - 1])


def test_loftq_keeps_the_best_round_where_it_diverges() -> None:
    weight = torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    errors = []
    for rounds in (1, 2, 6):
        rounded, left, right = loftq(weight, 1, ternary, rounds)
        errors.append(float((weight - rounded - left @ right).square().sum()))
    assert errors == [errors[0]] * 3


def test_data_aware_terms_are_stationary_and_no_worse_in_any_group() -> None:
    generator = torch.Generator().manual_seed(0)
    gram = random_gram(30, 6, generator, groups=3)
    residual = torch.randn(3, 5, 6, generator=generator, dtype=torch.float64)
    left, right = low_rank_terms(residual, 2, gram, damp=0.0)
    rest = (residual - left @ right) @ gram
    close(rest @ right.mT, torch.zeros(3, 5, 2).tolist())
    close(left.mT @ rest, torch.zeros(3, 2, 6).tolist())
    assert error_of(residual - left @ right, gram) <= error_of(left_over(residual, 2), gram)


def test_singular_gram_is_damped() -> None:
    left, right = low_rank_terms(RESIDUAL, 2, torch.ones(4, 4))
    assert bool((left @ right).isfinite().all())
