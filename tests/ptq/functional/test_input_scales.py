"""SmoothQuant and AWQ: published scales and errors, the identity, candidates that include doing nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ptq.oracles import GOLDENS, close, real
from torchquant.ptq.functional.input_scales import (
    awq_candidates,
    awq_error,
    awq_scales,
    best_candidate,
    scaled_error,
    shared_by_heads,
    shifted_reader,
    smooth_candidates,
    smooth_scales,
)

SMOOTH, AWQ = GOLDENS["smoothquant"], GOLDENS["awq"]
X, W = real(SMOOTH["X"]), real(SMOOTH["W"])
INPUT_MAX, WEIGHT_MAX = X.abs().amax(0), W.abs().amax(0)
GRAM = X.T @ X / len(X)


def narrow(x: Tensor, largest: int, axis: int | None) -> Tensor:
    step = (x.abs().max() if axis is None else x.abs().amax(axis, keepdim=True)) / largest
    return (x / step).round() * step


def smooth_error(scales: Tensor) -> Tensor:
    return scaled_error(W, X, scales, lambda w: narrow(w, 7, 1), lambda x: narrow(x, 7, None))


@pytest.mark.parametrize("alpha", SMOOTH["alpha"])
def test_published_smoothing(alpha: str) -> None:
    golden = SMOOTH["alpha"][alpha]
    scales = smooth_scales(INPUT_MAX, WEIGHT_MAX, float(alpha))
    close(scales, golden["s"])
    close(smooth_error(scales), golden["mse"])
    torch.testing.assert_close((X / scales) @ (W * scales).T, X @ W.T, rtol=1e-12, atol=1e-12)


def test_search_of_alpha_has_no_smoothing_among_its_candidates() -> None:
    candidates = smooth_candidates(INPUT_MAX, WEIGHT_MAX, 4)
    assert [alpha for alpha, _ in candidates] == [None, 0.0, 0.25, 0.5, 0.75, 1.0]
    close(smooth_error(candidates[0][1]), SMOOTH["without"])
    best = best_candidate(candidates, smooth_error)
    close(best, SMOOTH["alpha"][SMOOTH["best_alpha"]]["s"])
    unharmed = best_candidate(candidates, lambda scales: (scales - 1).abs().sum())
    assert torch.equal(unharmed, torch.ones(3, dtype=torch.float64))
    assert len(smooth_candidates(INPUT_MAX, WEIGHT_MAX)) == 22


def test_inputs_of_zeros_are_not_scaled() -> None:
    assert smooth_scales(torch.tensor([0.0, 4.0]), torch.tensor([4.0, 4.0]), 0.5).tolist() == [1.0, 1.0]
    assert bool(awq_scales(torch.tensor([0.0, 4.0]), 0.5).isfinite().all())


def test_published_awq() -> None:
    mean = X.abs().mean(0)
    close(mean, AWQ["act_mean"])
    candidates = awq_candidates(mean)

    def error(scales: Tensor) -> Tensor:
        return awq_error(W, GRAM, scales, lambda w: narrow(w, 3, 1)) / len(W)

    for (rho, scales), golden in zip(candidates, AWQ["grid"], strict=True):
        assert rho == pytest.approx(golden["rho"])
        close(error(scales).sum(), golden["mse"])
        close(scaled_error(W, X, scales, lambda w: narrow(w, 3, 1), lambda x: x), golden["mse"])
    best = best_candidate(candidates, error)
    assert torch.equal(best, awq_scales(mean, 12 / 20))
    close(error(best).sum(), AWQ["best"]["mse"])
    close(candidates[0][1], [1.0, 1.0, 1.0])  # rounding to nearest


def test_two_sided_awq() -> None:
    scales = awq_scales(real([4.0, 1.0]), 0.5, real([0.25, 1.0]))
    close(scales, [2.0, 0.5])


def test_a_shifted_and_scaled_input_leaves_the_function() -> None:
    generator = torch.Generator().manual_seed(0)
    scales, shift, bias = (torch.rand(n, generator=generator, dtype=torch.float64) + 0.5 for n in (3, 3, 2))
    weight, moved_bias = shifted_reader(W, bias, scales, shift)
    found = ((X - shift) / scales) @ weight.T + moved_bias
    torch.testing.assert_close(found, X @ W.T + bias, rtol=1e-12, atol=1e-12)


def test_heads_that_share_a_value_head_share_a_scale() -> None:
    torch.manual_seed(0)
    size, heads, repeats = 3, 2, 2
    value = torch.randn(heads * size, 5, dtype=torch.float64)
    output = torch.randn(4, heads * repeats * size, dtype=torch.float64)
    scales = torch.rand(heads * repeats * size, dtype=torch.float64) + 0.5
    of_values = shared_by_heads(scales, size, repeats)
    assert of_values[4] == max(scales[2 * size + 1], scales[3 * size + 1])
    x = torch.randn(7, 5, dtype=torch.float64)

    def run(value: Tensor, output: Tensor) -> Tensor:
        return (x @ value.T).unflatten(1, (heads, size)).repeat_interleave(repeats, 1).flatten(1) @ output.T

    of_queries = of_values.unflatten(0, (heads, size)).repeat_interleave(repeats, 0).flatten()
    torch.testing.assert_close(run(value / of_values[:, None], output * of_queries), run(value, output))
