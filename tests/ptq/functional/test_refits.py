"""Refits of scales and codes: published numbers, stationarity, errors that never rise."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ptq.oracles import (
    GOLDENS,
    GRAM,
    INT3,
    W,
    close,
    error_of,
    exhaustive,
    on_levels,
    random_gram,
    real,
    row_scales,
)
from torchquant.ptq.functional.gram import output_error
from torchquant.ptq.functional.refits import best_rows, coordinate_descent, linear_refit, step_refit, tune_step

ROWS = GOLDENS["step_refit"]["rows"]
STEPS = real([row["s0"] for row in ROWS])
CODES = (W / STEPS[:, None]).round().clamp(-3, 3)


def test_published_step_refit_and_its_law() -> None:
    close(output_error(W - STEPS[:, None] * CODES, GRAM), [row["error0"] for row in ROWS])
    fitted = step_refit(W, CODES, GRAM, STEPS)
    close(fitted, [row["refit_of_rtn_codes"] for row in ROWS])
    errors = output_error(W - fitted[:, None] * CODES, GRAM)
    close(errors, [row["error_refit"] for row in ROWS])
    along, square = ((CODES @ GRAM) * W).sum(1), ((CODES @ GRAM) * CODES).sum(1)
    close(errors, (output_error(W, GRAM) - along.square() / square).tolist())


def test_published_turns_of_refit_and_descent() -> None:
    steps, codes = tune_step(W, GRAM, STEPS, -3, 3)
    close(steps, [row["s_final"] for row in ROWS])
    assert codes.tolist() == [row["codes_final"] for row in ROWS]
    close(output_error(W - steps[:, None] * codes, GRAM), [row["error_final"] for row in ROWS])


def test_a_step_without_a_positive_fit_stays() -> None:
    codes = torch.stack([torch.zeros(4, dtype=torch.float64), -CODES[1]])
    assert torch.equal(step_refit(W[:2], codes, GRAM, STEPS[:2]), STEPS[:2])


def test_published_linear_refit() -> None:
    rows = GOLDENS["linear_refit"]["rows"]
    terms = real([row["B"] for row in rows]).mT
    greedy = real([row["greedy"] for row in rows])
    close(output_error(W - (terms @ greedy[..., None])[..., 0], GRAM), [row["error_greedy"] for row in rows])
    fitted = linear_refit(W, terms, GRAM)
    close(fitted, [row["refit"] for row in rows])
    rest = W - (terms @ fitted[..., None])[..., 0]
    close(output_error(rest, GRAM), [row["error_refit"] for row in rows])
    close((rest @ GRAM)[:, None] @ terms, torch.zeros(3, 1, 2).tolist())  # stationary


def test_one_term_is_the_step_refit_and_equal_terms_share() -> None:
    close(linear_refit(W, CODES[..., None], GRAM)[:, 0], step_refit(W, CODES, GRAM, STEPS).tolist())
    both = linear_refit(W, torch.stack([CODES, CODES], -1), GRAM)
    close(both.sum(1), step_refit(W, CODES, GRAM, STEPS).tolist())
    close(both[:, 0], both[:, 1].tolist())


def test_groups_in_one_batch_are_a_loop_and_the_last_move_is_a_refit() -> None:
    generator = torch.Generator().manual_seed(0)
    gram = random_gram(20, 5, generator, groups=2)
    weight = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    steps = weight.abs().amax(-1) / 3
    together = tune_step(weight, gram, steps, -3, 3)
    found, codes = tune_step(weight, gram, steps, -3, 3, torch.zeros_like(weight), rounds=1)
    assert not torch.equal(found, steps)
    close(found, step_refit(weight, codes, gram, steps).tolist())
    for i in range(2):
        alone = tune_step(weight[i], gram[i], steps[i], -3, 3)
        assert torch.equal(together[1][i], alone[1])
        close(together[0][i], alone[0].tolist())


@settings(max_examples=12, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), columns=st.integers(1, 4))
def test_descent_is_between_its_start_and_the_optimum_on_uneven_levels(seed: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    gram, levels = random_gram(columns + 2, columns, generator), [-3.0, -1.0, 0.0, 0.5, 2.0]
    weight = torch.randn(2, columns, generator=generator, dtype=torch.float64)
    scales = row_scales(weight, levels)
    nearest = on_levels(levels, scales)
    start = nearest(weight)
    for sweeps in (1, 20):
        found = coordinate_descent(weight, start, gram, nearest, sweeps)
        assert torch.equal(nearest(found), found)
        for w, q, s, scale in zip(weight, found, start, scales, strict=True):
            error = error_of((w - q)[None], gram)
            assert exhaustive(w, gram, levels, float(scale))[0] - 1e-9 <= error <= error_of((w - s)[None], gram) + 1e-12
    assert torch.equal(coordinate_descent(weight, found, gram, nearest), found)
    for w, q, scale in zip(weight, found, scales, strict=True):  # no level of any one weight is better
        moves = [q.index_fill(0, torch.tensor(j), level * float(scale)) for j in range(columns) for level in levels]
        assert min(error_of((w - move)[None], gram) for move in moves) >= error_of((w - q)[None], gram) - 1e-9


def test_descent_reaches_levels_beyond_the_neighbours_and_leaves_dead_columns() -> None:
    scales = row_scales(W, INT3)
    nearest, gram = on_levels(INT3, scales), GRAM.clone()
    gram[1] = gram[:, 1] = 0.0
    found = coordinate_descent(W, nearest(W), gram, nearest)
    assert torch.equal(found[:, 1], nearest(W)[:, 1])
    far = coordinate_descent(W, torch.zeros_like(W), GRAM, nearest, 50)
    assert bool(((far - W).abs() > scales).any())


def test_best_rows_are_chosen_one_by_one_and_ties_go_to_the_first() -> None:
    generator = torch.Generator().manual_seed(0)
    gram = random_gram(9, 4, generator, groups=2)
    weight, *candidates = torch.randn(4, 2, 3, 4, generator=generator, dtype=torch.float64)
    found = best_rows(candidates, weight, gram)
    for g in range(2):
        for row in range(3):
            errors = [error_of((weight - one)[g, row][None], gram[g]) for one in candidates]
            assert torch.equal(found[g, row], candidates[errors.index(min(errors))][g, row])
    tied = [torch.ones(2, 3, 4), -torch.ones(2, 3, 4)]
    assert torch.equal(best_rows(tied, torch.zeros(2, 3, 4), gram), tied[0])
