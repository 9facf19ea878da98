"""Bias correction and absorption: published numbers, quadrature, what falls by how much."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy.integrate import quad
from scipy.stats import norm

from tests.ptq.oracles import GOLDENS, close, real
from torchquant.ptq.functional.biases import (
    absorbed_bias,
    absorbed_output,
    bias_correction,
    channel_means,
    clipped_normal_mean,
)
from torchquant.ptq.functional.gram import conv_rows

GOLDEN = GOLDENS["bias_correction"]
W, Q, X = (real(GOLDEN[key]) for key in ("W", "Wq", "X"))


@pytest.mark.parametrize("case", GOLDEN["clipped_means"])
def test_published_clipped_means_and_quadrature(case: dict[str, Any]) -> None:
    low, high = case["low"], math.inf if case["high"] is None else case["high"]
    found = clipped_normal_mean(real([case["beta"], case["beta"]]), real([case["gamma"], -case["gamma"]]), low, high)
    close(found, [case["mean"]] * 2)
    density = norm(case["beta"], case["gamma"]).pdf
    edges = [low, min(high, case["beta"] + 12 * case["gamma"])]
    inside = quad(lambda x: x * density(x), *edges, epsabs=1e-12)[0]
    beyond = high * norm(case["beta"], case["gamma"]).sf(high) if math.isfinite(high) else 0.0
    assert float(found[0]) == pytest.approx(
        inside + low * norm(case["beta"], case["gamma"]).cdf(low) + beyond, abs=1e-8
    )


def test_deviation_0_and_no_clamp() -> None:
    close(clipped_normal_mean(real([-1.0, 2.0, 9.0]), real([0.0, 0.0, 0.0]), 0.0, 6.0), [0.0, 2.0, 6.0])
    close(clipped_normal_mean(real([-1.0, 2.0]), real([3.0, 0.5]), -math.inf, math.inf), [-1.0, 2.0])


def test_published_corrections() -> None:
    means = clipped_normal_mean(real(GOLDEN["beta"]), real(GOLDEN["gamma"]))
    close(means, GOLDEN["mean_input"])
    close(bias_correction(W, Q, means), GOLDEN["analytic_delta_b"])
    close(bias_correction(W, Q, X.mean(0)), GOLDEN["empirical_delta_b"])


def test_mean_error_becomes_0_and_the_squared_error_falls_by_the_squared_change() -> None:
    change = bias_correction(W, Q, X.mean(0))
    before, after = (X @ (Q - W).T + shift for shift in (0.0, change))
    close(before.square().sum(), GOLDEN["sse_before"])
    close(after.square().sum(), GOLDEN["sse_after"])
    close(before.square().sum() - after.square().sum(), float(len(X) * change.square().sum()))
    assert float(after.mean(0).abs().max()) < 1e-15
    close(change - after.mean(0), change.tolist())  # correcting again changes nothing


def test_mismatched_streams_and_groups() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 50, 3, dtype=torch.float64) + 1
    y = x + 0.3 * torch.rand(2, 50, 3, dtype=torch.float64)
    weight = torch.randn(2, 4, 3, dtype=torch.float64)
    rounded = weight.mul(2).round() / 2
    change = bias_correction(weight, rounded, y.mean(1), x.mean(1))
    error = y @ rounded.mT + change[:, None] - x @ weight.mT
    assert float(error.mean(1).abs().max()) < 1e-14


def test_channel_means_are_those_of_patches_without_padding() -> None:
    x = real([1.0, 2.0, 3.0, 4.0])[None, :, None, None].expand(2, 4, 5, 5)
    (rows,) = conv_rows(x, (3, 2), groups=2)
    close(channel_means(x[0, :, 0, 0], 6, groups=2), rows.mean(1).tolist())


def test_published_absorption() -> None:
    golden = GOLDENS["high_bias_absorption"]
    absorbed = absorbed_bias(real(golden["beta"]), real(golden["gamma"]))
    close(absorbed, golden["c"])
    close(absorbed_bias(real(golden["beta"]), -real(golden["gamma"])), golden["c"])
    close(-absorbed, golden["b1_change"])
    close(absorbed_output(real(golden["W2"]), absorbed), golden["b2_change"])
    assert norm.cdf(3.0) == pytest.approx(golden["P_exact"], abs=1e-12)


@pytest.mark.parametrize("groups", [1, 2])
def test_absorption_keeps_what_exceeds_it(groups: int) -> None:
    torch.manual_seed(0)
    absorbed = torch.tensor([2.0, 0.0, 1.0, 0.5], dtype=torch.float64)
    hidden = absorbed[:, None, None] + torch.rand(2, 4, 6, 6, dtype=torch.float64)
    weight = torch.randn(6, 4 // groups, 3, 3, dtype=torch.float64)
    wanted = F.conv2d(hidden.relu(), weight, groups=groups)
    moved = F.conv2d((hidden - absorbed[:, None, None]).relu(), weight, groups=groups)
    torch.testing.assert_close(moved + absorbed_output(weight, absorbed, groups)[:, None, None], wanted)
