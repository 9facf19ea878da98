"""Clipped ranges: published searches and gradients, full ranges among the candidates, groups alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ptq.oracles import GOLDENS, GRAM, INT3, W, close, on_levels, random_gram, real, row_scales
from torchquant.ptq.functional.clipping import (
    AWQ_RATIOS,
    LEARNED_START,
    SEQUENTIAL_RATIOS,
    best_ratios,
    clip_errors,
    clipped_quantize,
    importance_step,
)
from torchquant.ptq.functional.gram import output_error

ROWS = GOLDENS["clip_search"]["rows"]
RATIOS = [1 - i / 40 for i in range(20)]


def shrunk(weight: Tensor, ratio: float) -> Tensor:
    return on_levels(INT3, row_scales(weight, INT3) * ratio)(weight)


def errors_of(ratios: Tensor) -> Tensor:
    rounded = torch.cat([shrunk(row[None], float(ratio)) for row, ratio in zip(W, ratios, strict=True)])
    return output_error(W - rounded, GRAM)


def test_published_search_by_output_and_by_weight() -> None:
    by_output = best_ratios(W, GRAM, shrunk, RATIOS)
    by_weight = best_ratios(W, torch.eye(4, dtype=torch.float64), shrunk, RATIOS)
    close(by_output[:, 0], [row["best_ratio_output"] for row in ROWS])
    close(by_weight[:, 0], [row["best_ratio_weight"] for row in ROWS])
    close(errors_of(by_output), [row["output_error"] for row in ROWS])
    close(errors_of(by_weight), [row["output_error_of_weight_choice"] for row in ROWS])
    close(errors_of(torch.ones(3)), [row["minmax_output_error"] for row in ROWS])


def test_diagonal_is_the_error_without_products_and_ones_are_that_of_weights() -> None:
    diagonal = GRAM.diagonal()
    assert torch.equal(best_ratios(W, diagonal, shrunk, RATIOS), best_ratios(W, diagonal.diag(), shrunk, RATIOS))
    ones = torch.ones(4, dtype=torch.float64)
    assert torch.equal(best_ratios(W, ones, shrunk, RATIOS), best_ratios(W, ones.diag(), shrunk, RATIOS))


def test_groups_are_searched_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    gram = random_gram(30, 7, generator, groups=2)
    weight = torch.randn(2, 3, 7, generator=generator, dtype=torch.float64)

    def by_groups(weight: Tensor, ratio: float) -> Tensor:
        return torch.cat([shrunk(part, ratio) for part in weight.split(3, -1)], -1)

    together = best_ratios(weight, gram, by_groups, RATIOS, group=3)
    assert together.shape == (2, 3, 3)
    for i, start in enumerate((0, 3, 6)):
        now = slice(start, start + 3)
        assert torch.equal(together[..., i : i + 1], best_ratios(weight[..., now], gram[..., now, now], shrunk, RATIOS))
    close(clip_errors(weight, gram)[..., 0], output_error(weight, gram).tolist())


def test_full_range_comes_first() -> None:
    assert AWQ_RATIOS[0] == SEQUENTIAL_RATIOS[0] == 1.0
    assert len(AWQ_RATIOS), len(SEQUENTIAL_RATIOS) == (10, 20)
    assert best_ratios(W, GRAM, lambda w, ratio: w.round()).tolist() == [[1.0]] * 3


def test_importance_step_is_the_weighted_mean_and_keeps_dead_rows() -> None:
    codes, importance = real([[2.0, 0.0, -1.0], [0.0, 0.0, 0.0]]), real([1.0, 5.0, 3.0])
    weight = real([[1.0, 0.1, -0.7], [0.0, 0.0, 0.0]])
    close(importance_step(weight, codes, importance, real([9.0, 9.0])), [(0.5 + 3 * 0.7) / 4, 9.0])


def test_published_learned_clipping_with_gradients() -> None:
    golden = GOLDENS["lwc"]
    weight = real([golden["w"]])
    logits = [torch.full((1, 1), golden["init"], dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert golden["init"] == LEARNED_START
    rounded = clipped_quantize(weight, logits[0], logits[1], golden["bits"])
    close(rounded[0].detach(), golden["w_hat"])
    close(((rounded / golden["h"]).round() + golden["z"])[0].detach(), golden["codes"])
    error = (rounded - weight).square().sum()
    close(error.detach(), golden["sse"])
    high, low = torch.autograd.grad(error, logits)
    close(high, [[golden["dsse_da"]]])
    close(low, [[golden["dsse_db"]]])
    spread = golden["sigmoid_init"] * (1 - golden["sigmoid_init"]) / (2 ** golden["bits"] - 1)
    close(high / (spread * weight.max()), [[golden["dsse_dh"]]])


def test_gradient_of_learned_clipping_where_it_clips() -> None:
    weight = real([GOLDENS["lwc"]["w"]])
    logits = [torch.zeros(1, 1, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    rounded = clipped_quantize(weight, logits[0], logits[1], 3)
    step = float(weight.max() - weight.min()) / 2 / 7
    scaled, zero_point = weight / step, -round(float(weight.min()) / 2 / step)
    is_inside = (scaled.round() >= -zero_point) & (scaled.round() <= 7 - zero_point)
    codes = scaled.round().clamp(-zero_point, 7 - zero_point)
    assert is_inside.tolist() == [[False, False, True, False, False, True]]
    close(rounded.detach(), (codes * step).tolist())
    per_step = (2 * (codes * step - weight) * torch.where(is_inside, codes - scaled, codes)).sum()
    found = torch.autograd.grad((rounded - weight).square().sum(), logits)
    close(found[0], [[float(per_step * weight.max() / 4 / 7)]])
    close(found[1], [[float(-per_step * weight.min() / 4 / 7)]])


def test_learned_clipping_of_a_row_of_zeros_is_zeros() -> None:
    logit = torch.full((1, 1), LEARNED_START, requires_grad=True)
    rounded = clipped_quantize(torch.zeros(1, 3), logit, logit, 4)
    (gradient,) = torch.autograd.grad(rounded.sum(), logit)
    assert rounded.tolist() == [[0.0, 0.0, 0.0]]
    assert gradient.tolist() == [[0.0]]


@pytest.mark.parametrize("ratios", [RATIOS, [1.0]])
def test_never_worse_than_the_full_range(ratios: list[float]) -> None:
    found = errors_of(best_ratios(W, GRAM, shrunk, ratios)[:, 0])
    assert bool((found <= errors_of(torch.ones(3)) + 1e-15).all())
