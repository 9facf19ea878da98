"""MagR: projection and proximal map against a search, the published descent."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from tests.ptq.oracles import GOLDENS, GRAM, W, close, real
from torchquant.ptq.functional.factors import largest_eigenvalue
from torchquant.ptq.functional.magnitude import l1_ball, max_norm_prox, reduce_magnitude

GOLDEN = GOLDENS["magr"]


def test_published_projection_and_proximal_map() -> None:
    ball, prox = GOLDEN["l1_ball"], GOLDEN["prox_inf"]
    close(l1_ball(real(ball["v"]), ball["radius"]), ball["projection"])
    close(max_norm_prox(real(prox["v"]), prox["weight"]), prox["result"])


@pytest.mark.parametrize("radius", [0.0, 0.3, 2.0, 50.0])
def test_projection_is_the_soft_threshold_that_reaches_the_ball(radius: float) -> None:
    v = torch.randn(5, 7, dtype=torch.float64)
    v[0] = 0.0
    for row, found in zip(v.numpy(), l1_ball(v, radius).numpy(), strict=True):
        size = np.abs(row)
        if size.sum() > radius:
            cut = minimize_scalar(
                lambda t, s=size: abs(np.maximum(s - t, 0).sum() - radius), bounds=(0, size.max()), method="bounded"
            ).x
            size = np.maximum(size - cut, 0)
        np.testing.assert_allclose(found, np.sign(row) * size, atol=2e-4)
        assert np.abs(found).sum() <= radius + 1e-12


def objective(moved: torch.Tensor) -> float:
    difference = moved - real(GOLDEN["w0"])
    return float(difference @ real(GOLDEN["H"]) @ difference / 2 + GOLDEN["alpha"] * moved.abs().max())


def test_published_descent() -> None:
    gram, weight = real(GOLDEN["H"]), real([GOLDEN["w0"]])
    close(1 / largest_eigenvalue(gram), GOLDEN["eta"])
    found = {steps: reduce_magnitude(weight, gram, GOLDEN["alpha"], steps)[0] for steps in (0, 1, 10, 200)}
    for steps in (0, 1, 10, 200):
        close(objective(found[steps]), GOLDEN["objective"][str(steps)])
    close(found[200], GOLDEN["w_after_200"])
    assert list(map(objective, found.values())) == sorted(map(objective, found.values()), reverse=True)


def test_published_limit_stays_where_it_is() -> None:
    gram, weight, limit = real(GOLDEN["H"]), real(GOLDEN["w0"]), real(GOLDEN["w_converged"])
    rate = GOLDEN["eta"]
    close(max_norm_prox(limit - rate * ((limit - weight) @ gram), rate * GOLDEN["alpha"]), GOLDEN["w_converged"])
    close(objective(limit), GOLDEN["objective"]["20000"])


def test_rows_and_groups_do_not_mix() -> None:
    together = reduce_magnitude(W, GRAM, 0.05, 50)
    for row, alone in zip(W, together, strict=True):
        close(reduce_magnitude(row[None], GRAM, 0.05, 50)[0], alone.tolist())
    batch = reduce_magnitude(torch.stack([W, W]), torch.stack([GRAM, GRAM * 0]), 0.05, 50)
    close(batch[0], together.tolist())
    close(batch[1], W.tolist())
