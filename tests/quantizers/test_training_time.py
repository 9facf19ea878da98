"""Schemes and gradients of quantization-aware training against golden numbers and their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import torchquant as tq
from tests.oracles import TRAINING_GOLDEN as GOLDENS
from tests.ptq.oracles import close, real
from torchquant.errors import ConfigError, NoAffineViewError
from torchquant.quantizers import AbsMeanQuantizer, Quantizer, SEQQuantizer
from torchquant.quantizers_functional import UniformGrid, seq_quantize
from torchquant.quantizers_functional.gradients import DampedFourier, ErrorDecay


def observed(quantizer: Quantizer, x: Tensor) -> Quantizer:
    quantizer = quantizer.double()
    quantizer.pre_observe(x)
    return quantizer


def gradients(y: Tensor, *wanted: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(y.sum(), wanted))


class TestAbsMean:
    golden = GOLDENS["bitnet_b158"]

    def test_golden(self) -> None:
        w = real(self.golden["w"])
        quantizer = observed(AbsMeanQuantizer(), w)
        close(quantizer(w), self.golden["w_hat"])
        assert quantizer.encode(w).tolist() == self.golden["codes"]
        close(quantizer.thresholds()[1], self.golden["threshold"])
        twn = observed(tq.TernaryQuantizer(), w)
        close(twn.thresholds()[1], self.golden["twn_threshold"])

    def test_it_is_a_uniform_grid_and_takes_any_observer(self) -> None:
        x = torch.randn(500)
        quantizer = tq.make_quantizer("absmean,observer=mse")
        other = tq.make_quantizer("affine:2,symmetric=narrow,observer=mse")
        for each in (quantizer, other):
            each.pre_observe(x)
        torch.testing.assert_close(quantizer(x), other(x))
        assert tuple(quantizer.affine_params())[1:] == (0, -1, 1)


class TestSEQ:
    golden = GOLDENS["seq"]

    @pytest.mark.parametrize(("key", "n_bits"), [("ternary", 2), ("2", 2), ("3", 3)])
    def test_golden(self, key: str, n_bits: int) -> None:
        w, golden = real(self.golden["w"]), self.golden["by_bits"][key]
        quantizer = observed(SEQQuantizer(n_bits, key == "ternary"), w)
        close(quantizer.alpha, [self.golden["alpha"]])
        close(quantizer(w), golden["w_hat"])
        close(quantizer.levels() / self.golden["alpha"], golden["levels"], 1e-6)

    def test_one_bit_is_the_sign_at_the_mean_magnitude(self) -> None:
        w = real([0.3, -0.1, 0.2, 0.0])
        quantizer = observed(tq.make_quantizer("seq:1"), w)
        close(quantizer(w), [0.15, -0.15, 0.15, 0.15])

    @pytest.mark.parametrize(("n_bits", "ternary"), [(1, False), (2, True), (2, False), (4, False)])
    def test_the_gradients_are_those_of_the_straight_through_chain(self, n_bits: int, ternary: bool) -> None:
        x, alpha = torch.linspace(-2, 2, 81, dtype=torch.float64).add(0.003), real(0.9)
        x.requires_grad_(), alpha.requires_grad_()
        for_x, for_alpha = gradients(seq_quantize(x, alpha, n_bits, ternary, 0.5), x, alpha)
        inside = (x.detach() / 0.9).abs() <= 0.99
        assert torch.equal(for_x, inside.double())
        level = seq_quantize(x, alpha, n_bits, ternary).detach() / 0.9
        expected = level if n_bits == 1 else level - torch.where(inside, x.detach() / 0.9, 0.0)
        close(for_alpha, 0.5 * float(expected.sum()))

    def test_a_weight_of_zeros_stays_zero_and_can_be_trained(self) -> None:
        quantizer = SEQQuantizer(2)
        quantizer.pre_observe(torch.zeros(4))
        w = torch.zeros(4, requires_grad=True)
        y = quantizer(w)
        y.sum().backward()
        assert not y.any()
        assert w.grad.tolist() == [1.0] * 4
        quantizer.pre_observe(torch.tensor([0.1, 0.0, -0.2, 0.0]))
        assert quantizer(w).tolist() == [0.25] * 4  # alpha started at 1
        quantizer.pre_observe(torch.zeros(4))  # it has had other numbers
        assert quantizer(w).tolist() == [0.25] * 4

    def test_which_widths(self) -> None:
        with pytest.raises(ConfigError, match="n_bits must be a whole number from 1 to 7, got 8"):
            SEQQuantizer(8)
        with pytest.raises(ConfigError, match="three levels are stored in 2 bits; give n_bits 2 with ternary, got 3"):
            SEQQuantizer(3, ternary=True)

    def test_the_ternary_form_has_an_affine_view(self) -> None:
        x = torch.randn(100)
        ternary, quantizer = SEQQuantizer(2, True), SEQQuantizer(2)
        for each in (ternary, quantizer):
            each.pre_observe(x)
        assert float(ternary.affine_params().delta) == pytest.approx(float(x.abs().max()) / 1.5)
        with pytest.raises(NoAffineViewError):
            quantizer.affine_params()


class TestDampedFourier:
    golden = GOLDENS["stableqat"]

    def slopes(self, v: Tensor, amplitude: float) -> Tensor:
        v = v.clone().requires_grad_()
        grid = UniformGrid(real(1.0), 0, -4, 3)
        return gradients(grid.quantize(v, DampedFourier(amplitude)), v)[0]

    def test_golden(self) -> None:
        found = self.slopes(real(self.golden["v"]), self.golden["amplitude"])
        close(found, self.golden["gradient"], 1e-8)
        cell = torch.linspace(-0.5, 0.5, 20001, dtype=torch.float64)
        mean = torch.trapezoid(self.slopes(cell, self.golden["amplitude"]), cell)
        close(mean, self.golden["mean_over_a_cell"], 2e-5)  # which is a sum over coarser steps

    def test_nothing_is_passed_where_it_clips_and_everything_without_amplitude(self) -> None:
        x = real([-5.0, -1.2, 0.3, 3.6])
        assert self.slopes(x, 0.0).tolist() == [0.0, 1.0, 1.0, 0.0]
        assert self.slopes(x, 0.21)[[0, 3]].tolist() == [0.0, 0.0]

    def test_the_amplitude_keeps_the_factor_positive(self) -> None:
        assert float(self.slopes(real([0.0]), 0.225)) > 0
        for amplitude in (-0.1, 0.2251, math.nan):
            with pytest.raises(ConfigError, match=r"at least 0 and below 0\.2251, where the factor is positive"):
                DampedFourier(amplitude)

    def test_in_a_spec(self) -> None:
        assert tq.make_quantizer("affine:4,amplitude=0.1@rdfs").gradient == DampedFourier(0.1)


class TestErrorDecay:
    golden = GOLDENS["irnet"]

    def test_golden_and_schedule(self) -> None:
        ramp = tq.training.Ramp(0.1, 10.0, self.golden["epochs"], "geometric")
        for epoch, row in self.golden["ede"].items():
            gradient = ErrorDecay(ramp(int(epoch)))
            assert gradient.t == pytest.approx(row["t"], rel=1e-12)
            quantizer = tq.make_quantizer("bnn").double()
            quantizer.force(1.0)
            quantizer.set_gradient(gradient)
            x = real([0.0, 0.5]).requires_grad_()
            close(gradients(quantizer(x), x)[0], [row["grad_at_0"], row["grad_at_half"]])

    def test_a_geometric_ramp_is_between_positive_numbers(self) -> None:
        with pytest.raises(ConfigError, match=r"a geometric ramp goes between numbers above 0, got 0\.0 and 1\.0"):
            tq.training.Ramp(0.0, 1.0, 10, "geometric")
        with pytest.raises(ConfigError, match=r"t must be above 0 and finite, got 0\.0"):
            ErrorDecay(0.0)
