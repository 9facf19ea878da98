"""Rounding for inputs that changed: published numbers, the identity behind them, streams in place of matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ptq.oracles import GOLDENS, GRAM, INT3, W, X, close, error_of, exhaustive, on_levels, random_gram, real
from torchquant.ptq.functional.columns import gptq
from torchquant.ptq.functional.mismatch import corrected_weight, gpfq, qronos

GOLDEN = GOLDENS["mismatched_inputs"]
Y = real(GOLDEN["Xt"])
H, G = Y.T @ Y, Y.T @ X
SCALES = real([[row["scale"]] for row in GOLDEN["rows"]])
NEAREST = on_levels(INT3, SCALES)
TARGET = corrected_weight(W, H, G, damp=0.0)


def loss(rounded: Tensor) -> float:
    return float((X @ W.T - Y @ rounded.T).square().sum())


def test_corrected_weight_and_its_identity() -> None:
    close(TARGET, [row["corrected"] for row in GOLDEN["rows"]])
    floor = (X @ W.T - Y @ TARGET.T).square().sum(0)
    close(floor, [row["floor_of_loss"] for row in GOLDEN["rows"]])
    rounded = NEAREST(W)
    close(loss(rounded), float(floor.sum()) + error_of(TARGET - rounded, H))


@pytest.mark.parametrize(
    ("name", "rounded"),
    [
        ("rtn", NEAREST(W)),
        ("gptq_on_w", gptq(W, H, NEAREST, damp=0.0)),
        ("gptq_on_corrected", gptq(TARGET, H, NEAREST, damp=0.0)),
        ("qronos", qronos(W, H, G, NEAREST, damp=0.0)),
        ("gpfq", gpfq(W, H, G, NEAREST)),
    ],
)
def test_published_codes_and_losses(name: str, rounded: Tensor) -> None:
    assert (rounded / SCALES).round().tolist() == [row["codes"][name] for row in GOLDEN["rows"]]
    close(loss(rounded), GOLDEN["loss"][name])


def test_optimum_of_the_corrected_weight_is_the_optimum() -> None:
    codes = [exhaustive(w, H, INT3, float(s))[1].tolist() for w, s in zip(TARGET, SCALES, strict=True)]
    assert codes == [row["codes"]["optimum"] for row in GOLDEN["rows"]]


def test_much_damping_gives_the_weight_back_and_dead_inputs_keep_theirs() -> None:
    close(corrected_weight(W, H, G, damp=1e12), W.tolist(), 1e-6)
    gram, cross = H.clone(), G.clone()
    gram[2] = gram[:, 2] = cross[2] = 0.0
    for damp in (0.0, 0.01):
        close(corrected_weight(W, gram, cross, damp)[:, 2], W[:, 2].tolist())
        rounded = qronos(W, gram, cross, NEAREST, damp)
        assert torch.equal(rounded[:, 2], NEAREST(W)[:, 2])
    assert torch.equal(gpfq(W, gram, cross, NEAREST)[:, 2], NEAREST(W)[:, 2])


@pytest.mark.parametrize("columns", [1, 4, 9])
def test_qronos_of_equal_inputs_is_gptq_with_the_same_damping(columns: int) -> None:
    generator = torch.Generator().manual_seed(columns)
    gram = random_gram(20, columns, generator)
    weight = torch.randn(5, columns, generator=generator, dtype=torch.float64)
    nearest, alpha = on_levels(range(-9, 10), 0.3), 1e-3
    damped = gram + alpha * torch.linalg.eigvalsh(gram).max() * torch.eye(columns)
    assert torch.equal(qronos(weight, gram, gram, nearest, alpha), gptq(weight, damped, nearest, damp=0.0))


def test_gpfq_from_matrices_is_gpfq_from_the_streams() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 6, generator=generator, dtype=torch.float64)
    y = x + 0.1 * torch.randn(20, 6, generator=generator, dtype=torch.float64)
    weight, nearest = torch.randn(3, 6, generator=generator, dtype=torch.float64), on_levels(range(-9, 10), 0.4)
    found = gpfq(weight, y.T @ y, y.T @ x, nearest)
    residual = torch.zeros(20, 3, dtype=torch.float64)
    for t in range(6):
        wanted = residual + x[:, t, None] * weight[:, t]
        q = nearest((y[:, t] @ wanted / (y[:, t] @ y[:, t]))[:, None])[:, 0]
        residual = wanted - y[:, t, None] * q
        assert torch.equal(found[:, t], q)


def test_groups_in_one_batch_are_a_loop() -> None:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(3, 25, 5, generator=generator, dtype=torch.float64)
    y = x + 0.2 * torch.randn(3, 25, 5, generator=generator, dtype=torch.float64)
    weight, nearest = torch.randn(3, 2, 5, generator=generator, dtype=torch.float64), on_levels(range(-9, 10), 0.4)
    gram, cross = y.mT @ y, y.mT @ x
    for rounded, one in (
        (gpfq(weight, gram, cross, nearest), gpfq),
        (qronos(weight, gram, cross, nearest), qronos),
    ):
        assert torch.equal(
            rounded, torch.stack([one(*each, nearest) for each in zip(weight, gram, cross, strict=True)])
        )


def test_equal_matrices_correct_nothing() -> None:
    close(corrected_weight(W, GRAM, GRAM), W.tolist())
