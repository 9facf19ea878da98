"""The collection of schemes against golden numbers, known optima and the defects of published code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import torchquant as tq
from tests import oracles
from tests.oracles import GOLDEN
from torchquant.errors import ConfigError
from torchquant.quantizers import QUANTIZERS
from torchquant.quantizers_functional.midrise import MIDRISE_STEP
from torchquant.quantizers_functional.pot import POT_ALPHA

SMALL = GOLDEN["golden"]["schemes_on_small_vector"]
TOLERANCE = {7: 0.002, 8: 0.005}


@pytest.fixture(scope="module")
def gaussian() -> Tensor:
    return torch.from_numpy(oracles.gaussian_quantile_grid(2**18)).to(torch.float64)


def fitted(text: str, x: Tensor) -> tuple[tq.Quantizer, Tensor]:
    quantizer = tq.make_quantizer(text).to(x.dtype)
    quantizer.pre_observe(x)
    return quantizer, quantizer(x)


def error(x: Tensor, y: Tensor) -> float:
    return float((x - y).square().mean())


@pytest.mark.parametrize("n_bits", [2, 3, 4])
@pytest.mark.parametrize("scheme", ["ul2q", "vecq", "clipq", "zoomq"])
def test_midrise_family_on_the_small_vector(scheme: str, n_bits: int) -> None:
    golden = SMALL[f"{scheme}{n_bits}"]
    quantizer, y = fitted(f"{scheme}:{n_bits}", torch.tensor(SMALL["x"], dtype=torch.float64))
    assert y.tolist() == pytest.approx(golden["y"], rel=1e-9)
    if scheme == "vecq":
        found = {name: float(getattr(quantizer, name)) for name in ("threshold_step", "step")}
        assert found == pytest.approx({"threshold_step": golden["threshold_step"], "step": golden["scale"]}, rel=1e-9)
    else:
        assert float(quantizer.grid()[0]) == pytest.approx(golden["step"], rel=1e-9)


def test_binary_on_the_small_vector() -> None:
    x = torch.tensor(SMALL["x"], dtype=torch.float64)
    assert fitted("xnor", x)[1].tolist() == pytest.approx(SMALL["binary_xnor"], rel=1e-12)
    assert fitted("bnn", x)[1].tolist() == [-1.0, -1.0, -1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("n_bits", range(1, 9))
def test_midrise_error_on_a_gaussian(gaussian: Tensor, n_bits: int) -> None:
    row = GOLDEN["uniform_midrise"]["N(0,1)"][str(n_bits)]
    assert MIDRISE_STEP[n_bits] == pytest.approx(row["step"], rel=1e-9)
    for scheme in ("ul2q", "vecq", "clipq"):
        found = error(gaussian, fitted(f"{scheme}:{n_bits}", gaussian)[1])
        assert found == pytest.approx(row["mse"], rel=4 * TOLERANCE.get(n_bits, 0.001)), scheme


@pytest.mark.parametrize("n_bits", range(1, 6))
def test_powers_of_two_on_a_gaussian(gaussian: Tensor, n_bits: int) -> None:
    row = GOLDEN["potq_N01"][str(n_bits)]
    assert POT_ALPHA[n_bits] == pytest.approx(row["nozero_alpha"], rel=1e-9)
    assert error(gaussian, fitted(f"pot:{n_bits}", gaussian)[1]) == pytest.approx(row["nozero_mse"], rel=1e-3)
    if n_bits > 1:
        assert error(gaussian, fitted(f"pot0:{n_bits}", gaussian)[1]) == pytest.approx(row["zero_mse"], rel=1e-3)


def test_one_bit_is_the_same_in_every_scheme_that_has_it(gaussian: Tensor) -> None:
    assert error(gaussian, fitted("xnor", gaussian)[1]) == pytest.approx(
        GOLDEN["binary_xnor"]["N(0,1)"]["mse"], rel=1e-4
    )
    for scheme in ("ul2q:1", "vecq:1", "clipq:1", "pot:1"):
        y = fitted(scheme, gaussian)[1]
        assert y.unique().numel() == 2, scheme
        assert error(gaussian, y) == pytest.approx(1 - 2 / np.pi, rel=1e-3), scheme


@pytest.mark.parametrize("n_bits", [1, 2, 3, 4, 5])
def test_powers_of_two_are_the_nearest_levels(n_bits: int) -> None:
    quantizer = tq.make_quantizer(f"pot:{n_bits}")
    quantizer.force(1.0)
    levels = quantizer.levels().numpy()
    assert len(levels) == 2**n_bits
    x = np.linspace(-1.2 * levels[-1], 1.2 * levels[-1], 4001, dtype=np.float32)
    found = quantizer(torch.from_numpy(x)).numpy()
    best = np.abs(x[:, None] - levels).min(1)
    assert np.allclose(np.abs(x - found), best)


def test_defect_11_ul2q_has_its_half_step(gaussian: Tensor) -> None:
    y = fitted("ul2q:4", gaussian)[1]
    assert abs(float(y.mean())) < 1e-3
    assert error(gaussian, y) < 0.0117  # the published port gives 0.0397


def test_defect_12_vecq_refits_by_least_squares() -> None:
    x = torch.distributions.Laplace(0.0, 1.0).icdf((torch.arange(2**16, dtype=torch.float64) + 0.5) / 2**16)
    quantizer, y = fitted("vecq:2", x)
    points = y / quantizer.step
    assert float(quantizer.step) == pytest.approx(float((x * points).sum() / points.square().sum()), rel=1e-6)
    assert error(x, y) < error(x, points * x.norm() / points.norm())


def test_defect_13_clipq_at_one_bit_has_the_optimal_step(gaussian: Tensor) -> None:
    assert error(gaussian, fitted("clipq:1", gaussian)[1]) == pytest.approx(0.36338, rel=1e-3)  # published: 0.452


def test_defect_14_wide_codes_gain_with_every_bit(gaussian: Tensor) -> None:
    errors = [error(gaussian, fitted(f"ul2q:{n}", gaussian)[1]) for n in (8, 9, 10)]
    assert errors[0] / errors[1] > 3.3
    assert errors[1] / errors[2] > 3.3


def test_defect_15_pot_has_level_one() -> None:
    quantizer = tq.make_quantizer("pot:3")
    quantizer.force(1.0)
    assert quantizer.levels().tolist() == [-8.0, -4.0, -2.0, -1.0, 1.0, 2.0, 4.0, 8.0]


def test_defect_19_clipq_clips_by_the_tensor_it_quantizes() -> None:
    quantizer = tq.make_quantizer("clipq:2")
    for scale in (1.0, 100.0):
        x = (torch.linspace(-3, 3, 61) * scale).requires_grad_()
        quantizer.pre_observe(x.detach())
        quantizer(x).sum().backward()
        assert torch.equal(x.grad, (x.detach().abs() <= 2 * quantizer.step).float())


@pytest.mark.parametrize(
    ("text", "constant", "expected"),
    [
        ("ul2q:3", 0.7, 0.7),
        ("vecq:3", 0.7, 0.7),
        ("zoomq:3", 0.7, 0.7),
        ("binary", -0.7, -0.7),
    ],
)
def test_constants_are_reproduced_where_the_scheme_can(text: str, constant: float, expected: float) -> None:
    assert fitted(text, torch.full((40,), constant))[1].tolist() == pytest.approx([expected] * 40, rel=1e-6)


@pytest.mark.parametrize("text", ["ul2q:13", "clipq:0", "pot:6", "pot0:6", "binary:2", "binary,scale=big"])
def test_widths_without_a_known_scale_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        tq.make_quantizer(text)


def test_signs_take_the_estimators_of_one_bit() -> None:
    x = torch.linspace(-2, 2, 41).requires_grad_()
    quantizer = tq.make_quantizer("bnn@hardtanh")
    quantizer.pre_observe(x.detach())
    quantizer(x).sum().backward()
    assert torch.equal(x.grad, (x.detach().abs() <= 1).float())
    assert {"hardtanh", "approxsign"} <= set(QUANTIZERS["binary"].gradients())


@pytest.mark.parametrize("scheme", ["ul2q:4", "vecq:2", "clipq:4", "zoomq:4", "pot:3", "xnor"])
def test_activation_form_averages_and_quantizes_alike_in_train_and_eval(scheme: str) -> None:
    quantizer = tq.make_quantizer(scheme, site="output")
    for _ in range(3):
        quantizer.pre_observe(torch.randn(8, 4, 5))
    x = torch.randn(8, 4, 5)
    assert torch.equal(quantizer.train()(x), quantizer.eval()(x))
    before = [float(getattr(quantizer, name)) for name in quantizer.statistics]
    quantizer.pre_observe(x * 3)
    after = [float(getattr(quantizer, name)) for name in quantizer.statistics]
    assert all(abs(b) < 3 * abs(a) + 1e-3 for a, b in zip(before, after, strict=True))
