"""Learned rounding: published values, gradients and schedules, every rounding of tiny layers tried."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ptq.oracles import GOLDENS, GRAM, INT3, W, X, close, on_levels, real, row_scales
from torchquant.errors import ConfigError
from torchquant.ptq.functional.learned_rounding import (
    block_error,
    drop_quantization,
    expected_drop_error,
    hard_weight,
    rectified_sigmoid,
    rounding_beta,
    rounding_logits,
    rounding_regulariser,
    rounding_share,
    soft_weight,
    undecided,
)
from torchquant.ptq.functional.sign_rounding import offset_rounding, sign_rates, sign_rounding, sign_step
from torchquant.quantizers_functional.formats import Levels, UniformGrid

GOLDEN, SIGN, DROP = GOLDENS["adaround"], GOLDENS["autoround"], GOLDENS["qdrop"]


def test_published_sigmoid_and_regulariser_with_gradients() -> None:
    v = real(GOLDEN["V"]).requires_grad_()
    share = rectified_sigmoid(v)
    close(share.detach(), GOLDEN["h"])
    close(torch.autograd.grad(share.sum(), v)[0], GOLDEN["dh_dV"])
    for beta, golden in GOLDEN["regulariser"].items():
        value = rounding_regulariser(rectified_sigmoid(v), float(beta))
        close(value.detach(), golden["value"])
        close(torch.autograd.grad(value, v)[0], golden["gradient"])


@pytest.mark.parametrize(
    "grid",
    [
        UniformGrid(torch.tensor([0.2, 0.3, 0.1]), 0, -3, 3, axis=0),
        Levels(torch.tensor([-0.9, -0.4, -0.2, 0.0, 0.1, 0.3, 0.8])),
    ],
)
def test_soft_rounding_starts_at_the_weight_on_any_grid_and_ends_on_it(grid: UniformGrid | Levels) -> None:
    weight = W.float()
    below, above = grid.neighbours(weight)
    share = rectified_sigmoid(rounding_logits(weight, below, above))
    clipped = torch.minimum(torch.maximum(weight, below), above)
    torch.testing.assert_close(soft_weight(share, below, above), clipped)
    hard = hard_weight(share, below, above)
    assert torch.equal(hard, grid.project(hard)[0])
    free = above > below
    assert bool(((hard == below) | (hard == above)).all())
    assert int(undecided(share, below, above)) == int((free & ((share - 0.5).abs() <= 0.49)).sum())
    assert float(rounding_logits(weight, below, above).abs().max()) < 2.3980
    one = torch.ones(2)
    assert rounding_share(torch.tensor([-0.1, 1.1]), 0 * one, one).tolist() == [0.0, 1.0]


def test_schedule() -> None:
    betas = [rounding_beta(step, 100) for step in range(100)]
    assert betas[:20] == [None] * 20
    assert betas[20] == 20.0
    assert betas[99] == 2.0
    drops = [a - b for a, b in itertools.pairwise(betas[20:])]  # type: ignore[operator]
    assert drops == pytest.approx([18 / 79] * 79)
    cosine = [rounding_beta(step, 5, warm_up=0.0, schedule="cosine") for step in range(5)]
    assert cosine == pytest.approx([20.0, 2 + 9 * (1 + 0.5**0.5), 11.0, 2 + 9 * (1 - 0.5**0.5), 2.0])
    with pytest.raises(ConfigError, match="schedule must be 'linear' or 'cosine', got 'steps'"):
        rounding_beta(0, 5, schedule="steps")


def losses(rounded: Tensor, relu: bool) -> Tensor:
    wanted, found = X @ W.T, X @ rounded.mT
    return ((found.relu() - wanted.relu()) if relu else found - wanted).square().sum(-2)


def all_roundings(below: Tensor, above: Tensor) -> Tensor:
    """(2^K, rows, K)."""
    up = torch.tensor(list(itertools.product([False, True], repeat=below.shape[1])))
    return torch.where(up[:, None], above, below)


SCALES = row_scales(W, INT3)
BELOW, ABOVE = UniformGrid(SCALES, 0, -3, 3).neighbours(W)


def adam(v: Tensor, loss: Callable[[Tensor, int], Tensor], n_steps: int, rate: float) -> Tensor:
    """Adam by its definition (Kingma and Ba 2015), for the tests."""
    first, second = torch.zeros_like(v), torch.zeros_like(v)
    for step in range(n_steps):
        v = v.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(v, step), v)
        first, second = torch.lerp(gradient, first, 0.9), torch.lerp(gradient.square(), second, 0.999)
        unbiased = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
        v = v - rate * unbiased[0] / (unbiased[1].sqrt() + 1e-8)
    return v.detach()


def test_adam_finds_the_best_of_all_roundings_or_a_better_one_than_to_nearest() -> None:
    nearest, every = on_levels(INT3, SCALES)(W), all_roundings(BELOW, ABOVE)
    assert len(every) == GOLDEN["combinations"]
    for name, golden in GOLDEN["exhaustive"].items():
        close(losses(every, name == "relu").amin(0), [row["best_loss"] for row in golden])
        close(losses(nearest, name == "relu"), [row["rtn_loss"] for row in golden])
        assert (nearest / SCALES).round().tolist() == [row["rtn"] for row in golden]

    def loss(v: Tensor, step: int) -> Tensor:
        """The layer without an activation and the one with a ReLU at once."""
        share = rectified_sigmoid(v)
        plain, relu = soft_weight(share, BELOW, ABOVE)
        error = losses(plain, False).sum() + losses(relu, True).sum()
        beta = rounding_beta(step, 300)
        return error if beta is None else error + 0.01 * rounding_regulariser(share[:, ABOVE > BELOW], beta)

    share = rectified_sigmoid(adam(rounding_logits(W, BELOW, ABOVE).expand(2, 3, 4), loss, 300, 0.1))
    for found, name in zip(hard_weight(share, BELOW, ABOVE), ("linear", "relu"), strict=True):
        golden, errors = GOLDEN["exhaustive"][name], losses(found, name == "relu").tolist()
        assert all(error <= row["rtn_loss"] + 1e-12 for error, row in zip(errors, golden, strict=True))
        reached = [error == pytest.approx(row["best_loss"]) for error, row in zip(errors, golden, strict=True)]
        assert reached == [True, True, name == "linear"]


def test_block_optimum_is_below_that_of_its_layers() -> None:
    golden = GOLDENS["block"]
    x, weights = X[:, :2], [real(golden[key]) for key in ("W1", "W2")]
    scales = [weight.abs().max() if weight.ndim < 2 else weight.abs().amax(1, keepdim=True) for weight in weights]
    wanted = (x @ weights[0].T).relu() @ weights[1].T

    def sums(first: Any, second: Any, gradient: Tensor | None = None) -> float:
        pair = [real(codes).view(2, 2) * scale for codes, scale in zip((first, second), scales, strict=True)]
        found = (x @ pair[0].T).relu() @ pair[1].T
        return float(block_error(found, wanted, gradient)) * len(x)

    close(sums(golden["layerwise"]["W1"], golden["layerwise"]["W2"]), golden["layerwise"]["block_sse"])
    close(sums(golden["blockwise"]["W1"], golden["blockwise"]["W2"]), golden["blockwise"]["block_sse"])
    roots = real(golden["fisher"]).sqrt().expand_as(wanted)
    optimum = golden["fisher_optimum"]
    close(sums(optimum["W1"], optimum["W2"], roots), optimum["weighted_sse"])
    neighbours = [UniformGrid(s, 0, -1, 1).neighbours(w) for s, w in zip(scales, weights, strict=True)]
    choices = [
        {tuple(choice) for choice in itertools.product(*zip(*((n / s).flatten().tolist() for n in pair), strict=True))}
        for pair, s in zip(neighbours, scales, strict=True)
    ]
    every = [sums(first, second) for first in choices[0] for second in choices[1]]
    assert min(every) == pytest.approx(golden["blockwise"]["block_sse"], abs=1e-9)
    weighted = [sums(first, second, roots) for first in choices[0] for second in choices[1]]
    assert min(weighted) == pytest.approx(optimum["weighted_sse"], abs=1e-9)


def test_published_expected_loss_of_dropping_and_the_sum_over_all_masks() -> None:
    weight, rounded, x, quantized = (real([DROP[key]]) for key in ("w", "w_hat", "x", "x_hat"))
    for probability, key in ((DROP["p_float"], "expected_loss"), (0.0, "loss_p0"), (1.0, "loss_p1")):
        close(expected_drop_error(rounded, weight, x, quantized, probability), [[DROP[key]]])
        total = 0.0
        for mask in itertools.product([False, True], repeat=4):
            mixed = torch.where(torch.tensor(mask), x, quantized)
            share = probability ** sum(mask) * (1 - probability) ** (4 - sum(mask))
            total += share * float((mixed @ rounded.T - x @ weight.T).square())
        close(total, DROP[key])


def test_dropping_is_seeded_and_takes_each_element_alone() -> None:
    x, quantized = torch.zeros(200, 50), torch.ones(200, 50)
    first, again = (drop_quantization(x, quantized, 0.3, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)
    assert float(first.mean()) == pytest.approx(0.7, abs=0.02)
    assert float(first.mean(0).std()) < 0.1
    assert torch.equal(drop_quantization(x, quantized, 0.0), quantized)
    assert torch.equal(drop_quantization(x, quantized, 1.0), x)
    with pytest.raises(ConfigError, match=r"probability must be a number from 0 to 1, got 2"):
        drop_quantization(x, quantized, 2.0)


WEIGHT, GAP = real(SIGN["w"]), SIGN["scale"]
NEIGHBOURS = UniformGrid(torch.tensor(GAP, dtype=torch.float64), 0, -3, 3).neighbours(WEIGHT)


def sign_loss(rounded: Tensor) -> Tensor:
    return (WEIGHT - rounded.double()) @ GRAM @ (WEIGHT - rounded.double())


def test_published_sign_descent_step_by_step() -> None:
    """All but the offset of the third weight, which is on a level and has no choice."""
    free = NEIGHBOURS[1] > NEIGHBOURS[0]
    assert free.tolist() == [True, True, False, True]
    offset, share = torch.zeros(4, dtype=torch.float64), rounding_share(WEIGHT, *NEIGHBOURS)
    for rate, golden in zip(sign_rates(SIGN["iters"]), SIGN["steps"], strict=True):
        close(offset[free], real(golden["v"])[free].tolist())
        offset.requires_grad_()
        rounded = offset_rounding(share, offset, *NEIGHBOURS)
        loss = sign_loss(rounded)
        assert (rounded / GAP).round().tolist() == golden["codes"]
        close(loss.detach(), golden["loss"])
        (gradient,) = torch.autograd.grad(loss, offset)
        assert gradient.sign().tolist() == (real(golden["grad_sign"]) * free).tolist()
        offset = sign_step(offset.detach(), gradient, rate)
    close(sum(sign_rates(SIGN["iters"])), SIGN["reach"])


def test_sign_descent_keeps_the_best_and_is_never_worse_than_to_nearest() -> None:
    rounded, loss = sign_rounding(WEIGHT, *NEIGHBOURS, sign_loss, SIGN["iters"])
    close(loss, SIGN["best_loss"])
    assert (rounded / GAP).round().tolist() == SIGN["best_codes"]
    to_nearest, loss = sign_rounding(WEIGHT, *NEIGHBOURS, sign_loss, 1)
    close(to_nearest, on_levels(INT3, GAP)(WEIGHT).tolist())
    close(loss, SIGN["steps"][0]["loss"])


def test_offsets_are_kept_in_float32_where_weights_are_bfloat16() -> None:
    """Steps of 1 / 1000 are lost beside an offset of 1/4 in bfloat16; a share of .15 goes up at .35."""
    weight, one = torch.tensor([0.15, 0.85], dtype=torch.bfloat16), torch.ones(2, dtype=torch.bfloat16)
    rounded, loss = sign_rounding(weight, 0 * one, one, lambda q: (1 - q).sum(), 1000)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.tolist(), loss) == ([1.0, 1.0], 0.0)


def test_offset_chooses_between_the_neighbours_on_uneven_levels() -> None:
    grid = Levels(torch.tensor([-1.0, 0.0, 0.25, 1.0, 4.0], dtype=torch.float64))
    weight = torch.rand(200, dtype=torch.float64) * 4 - 0.9
    below, above = grid.neighbours(weight)
    share, offset = rounding_share(weight, below, above), (torch.rand(200, dtype=torch.float64) - 0.5).requires_grad_()
    found = offset_rounding(share, offset, below, above)
    assert torch.equal(found.detach(), torch.where(share + offset.detach() >= 0.5, above, below))
    assert torch.equal(torch.autograd.grad(found.sum(), offset)[0], above - below)


def test_rates_move_a_code_by_one_at_most() -> None:
    assert sum(sign_rates(200)) == pytest.approx(0.5025)
    assert sign_rates(1000, n_bits=3)[0] == 2 / 1000
    assert sign_rates(1000, n_bits=4)[0] == sign_rates(1000)[0] == 1 / 1000
    assert sign_rates(200, n_bits=2)[0] == 1 / 200
    with pytest.raises(ConfigError, match="n_steps must be a whole number >= 1, got 0"):
        sign_rates(0)
