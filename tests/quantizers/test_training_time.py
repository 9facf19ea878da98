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
from torchquant.quantizers import (
    LAWS,
    AbsMeanQuantizer,
    AdaBinActQuantizer,
    AdaBinQuantizer,
    BinaryQuantizer,
    DoReFaQuantizer,
    IRNetQuantizer,
    N2UQActQuantizer,
    PACTQuantizer,
    QILQuantizer,
    Quantizer,
    RSignQuantizer,
    SEQQuantizer,
)
from torchquant.quantizers_functional import (
    UniformGrid,
    adabin_quantize,
    n2uq_quantize,
    pact_quantize,
    qil_quantize,
    residual_levels,
    rsign_quantize,
    seq_quantize,
)
from torchquant.quantizers_functional.dorefa import sat_gain
from torchquant.quantizers_functional.gradients import DampedFourier, ErrorDecay
from torchquant.quantizers_functional.irnet import irnet_params, standardized
from torchquant.training import RPReLU


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


class TestIRNet:
    golden = GOLDENS["irnet"]

    def test_golden(self) -> None:
        w = real(self.golden["w"])
        mean, deviation, scale = irnet_params(w[None])
        close(standardized(w, mean, deviation), self.golden["standardised"])
        close(scale.log2(), [self.golden["shift"]])
        close(observed(IRNetQuantizer(), w)(w), self.golden["w_hat"])

    def test_the_gradient_acts_on_the_standardized_weight(self) -> None:
        w = torch.randn(50, dtype=torch.float64) * 3 + 1
        quantizer = observed(IRNetQuantizer(), w)
        quantizer.set_gradient("ede", t=2.0)
        w.requires_grad_()
        unit = (w.detach() - w.detach().mean()) / w.detach().std(correction=0)
        expected = 2.0 * (1 - torch.tanh(2.0 * unit) ** 2) / w.detach().std(correction=0)
        torch.testing.assert_close(gradients(quantizer(w), w)[0], expected)

    def test_the_scale_is_a_power_of_two(self) -> None:
        w = torch.tensor([-100.0] + [0.1] * 60)  # few far ones: E|w~| below 2**-1.5
        quantizer = observed(IRNetQuantizer(), w)
        assert quantizer.levels().tolist() == [-0.25, 0.25]


class TestAdaBin:
    golden = GOLDENS["adabin"]

    def test_golden(self) -> None:
        w = real(self.golden["w"])
        quantizer, least = observed(AdaBinQuantizer(), w), observed(AdaBinQuantizer("mean"), w)
        close(quantizer(w), self.golden["w_hat"])
        close((quantizer(w) - w).square().mean(), self.golden["mse"])
        close((least(w) - w).square().mean(), self.golden["mse_least_squares"])
        close(least.levels().diff() / 2, [self.golden["least_squares_alpha"]], 1e-6)

    def test_activations_start_at_least_squares(self) -> None:
        x = real(self.golden["w"])
        quantizer = observed(AdaBinActQuantizer(), x)
        torch.testing.assert_close(quantizer(x), observed(AdaBinQuantizer("mean"), x)(x))
        assert [len(p) for p in quantizer.parameters()] == [1, 1]

    def test_the_gradients_are_those_of_the_straight_through_chain(self) -> None:
        x, alpha, beta = torch.linspace(-2, 2, 41, dtype=torch.float64).add(0.01), real(0.6), real(0.25)
        x.requires_grad_(), alpha.requires_grad_(), beta.requires_grad_()
        unit = (x - beta) / alpha
        soft = unit.clamp(-1, 1)
        chain = alpha * (soft + (unit.detach().sign() - soft).detach()) + beta
        expected = gradients(chain, x, alpha, beta)
        for found, wanted in zip(gradients(adabin_quantize(x, alpha, beta), x, alpha, beta), expected, strict=True):
            torch.testing.assert_close(found, wanted)


class TestReActNet:
    golden = GOLDENS["reactnet"]

    def test_golden(self) -> None:
        x = real(self.golden["x"])
        quantizer = observed(RSignQuantizer(), x)
        quantizer.set_numbers(threshold=real(self.golden["rsign_alpha"]), present=1.0)
        close(quantizer(x), self.golden["rsign"])
        assert quantizer.encode(x).tolist() == [int(sign > 0) for sign in self.golden["rsign"]]
        close(quantizer.format().thresholds(), [self.golden["rsign_alpha"]])

    def test_rprelu_golden(self) -> None:
        golden, activation = self.golden["rprelu"], RPReLU().double()
        with torch.no_grad():
            for name in ("gamma", "zeta", "beta"):
                getattr(activation, name).fill_(golden[name])
        close(activation(real([self.golden["x"]]))[0].detach(), golden["y"])

    def test_behind_a_relu_the_threshold_starts_at_the_mean(self) -> None:
        x = torch.rand(4, 3, 50)
        quantizer = tq.make_quantizer("rsign/channel", site="output")
        quantizer.pre_observe(x)
        torch.testing.assert_close(quantizer.threshold.detach(), x.mean((0, 2)))
        other = tq.make_quantizer("rsign", site="output")
        other.pre_observe(x - 0.1)
        assert other.threshold.tolist() == [0.0]

    def test_the_slope_is_a_triangle_around_the_threshold(self) -> None:
        x, threshold = real([-1.0, 0.0, 0.5, 2.0]), real(0.25)
        x.requires_grad_(), threshold.requires_grad_()
        for_x, for_threshold = gradients(rsign_quantize(x, threshold), x, threshold)
        close(for_x, [0.0, 1.5, 1.5, 0.0])
        close(for_threshold, -3.0)

    def test_a_threshold_for_each_channel_behind_which_a_layer_is_fused(self) -> None:
        net = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1), RPReLU(3), torch.nn.Conv2d(3, 2, 1))
        rules = [{"weight": "xnor/channel", "input": "rsign/channel"}]
        x = torch.randn(4, 2, 5, 5)
        model = tq.quantize(net, rules, x)
        tq.calibrate(model, [x], show_progress=False)
        assert [len(q.threshold) for q in model.modules() if isinstance(q, RSignQuantizer)] == [2, 3]
        assert type(model[0].activation) is RPReLU
        tq.set_qmodule_state(model, tq.QModuleState.QUANT_AWARE_TRAIN)
        model.train()(x).square().sum().backward()
        assert all(p.grad is not None for p in model.parameters())


class TestQIL:
    golden = GOLDENS["qil"]

    def test_golden(self) -> None:
        w = real(self.golden["w"])
        quantizer = observed(QILQuantizer(self.golden["bits"]), w)
        quantizer.set_numbers(**{name: self.golden[name] for name in ("centre", "distance", "gamma")})
        close(quantizer(w), self.golden["w_hat"])
        fine = qil_quantize(w, real(self.golden["centre"]), real(self.golden["distance"]), 8)
        torch.testing.assert_close(fine, real(self.golden["transformed"]), rtol=0.0, atol=0.5 / 127)

    def test_gradients_are_those_of_the_transformation(self) -> None:
        x = torch.linspace(-1.5, 1.5, 40, dtype=torch.float64)
        numbers = [real(number).requires_grad_() for number in (0.6, 0.45, 1.3)]

        def transformed(centre: Tensor, distance: Tensor, gamma: Tensor) -> Tensor:
            return x.sign() * ((x.abs() - centre + distance) / (2 * distance)).clamp(0, 1) ** gamma

        found = gradients(qil_quantize(x, numbers[0], numbers[1], 4, numbers[2]), *numbers)
        for i, gradient in enumerate(found):
            moved = [
                [float(n.detach()) + (1e-6 if j == i else 0.0) * s for j, n in enumerate(numbers)] for s in (1, -1)
            ]
            high, low = (transformed(*map(real, at)).sum() for at in moved)
            close(gradient, float(high - low) / 2e-6, 1e-6)

    def test_its_form_for_activations_keeps_the_laws(self) -> None:
        laws = ("on_grid", "monotone", "keeps_form", "edge_cases", "nonfinite", "trained", "gradient_size", "survives")
        assert tq.check_quantizer(QILQuantizer(2, True), laws=laws).passed == laws

    def test_activations_have_no_power_and_a_distance_beyond_the_centre_is_the_centre(self) -> None:
        quantizer = tq.make_quantizer("qil:2", site="input")
        quantizer.pre_observe(torch.randn(100))
        assert sorted(dict(quantizer.named_parameters())) == ["centre", "distance"]
        quantizer.set_numbers(centre=0.5, distance=0.9, reach=3.0)
        assert quantizer(torch.tensor([-1.0, 0.0, 0.5, 2.0])).tolist() == pytest.approx([0.0, 0.0, 2.0, 3.0])

    def test_activations_start_in_their_units(self) -> None:
        x = torch.rand(1000)
        quantizer = tq.make_quantizer("qil:4", site="output")
        quantizer.pre_observe(x)
        assert float((quantizer(x).detach() - x).abs().max()) < 0.6 * float(quantizer.levels().diff()[0])


class TestN2UQ:
    golden = GOLDENS["n2uq"]

    def test_golden_and_the_slope_in_each_cell(self) -> None:
        x, widths, step = real(self.golden["x"]).requires_grad_(), real(self.golden["widths"]), real(1.0)
        quantizer = observed(N2UQActQuantizer(2), x.detach())
        quantizer.set_numbers(cells=widths, step=1.0)
        close(quantizer(x).detach(), self.golden["y"])
        close(quantizer.format().thresholds(), self.golden["thresholds"])
        y = n2uq_quantize(x, widths, step)
        close(y.detach(), self.golden["y"])
        close(gradients(y, x)[0], self.golden["dy_dx"])

    @pytest.mark.parametrize("axis", [None, 1])
    def test_the_gradients_are_those_of_the_polygon(self, axis: int | None) -> None:
        x = torch.randn(6, 2, 5, dtype=torch.float64) * 2
        shape = (3,) if axis is None else (2, 3)
        widths, step = torch.rand(shape, dtype=torch.float64) + 0.4, torch.rand(shape[:-1], dtype=torch.float64) + 0.5
        widths.requires_grad_(), step.requires_grad_()

        def polygon(widths: Tensor, step: Tensor) -> Tensor:
            view = (1, -1, 1) if axis is not None else ()
            low, y = torch.zeros((), dtype=torch.float64), torch.zeros_like(x)
            for width in widths.unbind(-1):
                y = y + ((x - low) / width.view(view)).clamp(0, 1)
                low = low + width.view(view)
            return y * step.view(view)

        quantized = n2uq_quantize(x, widths, step, axis)
        for_widths, for_step = gradients(quantized, widths, step)
        torch.testing.assert_close(for_widths, gradients(polygon(widths, step), widths)[0])
        codes = quantized.detach() / (step.detach() if axis is None else step.detach().view(1, -1, 1))
        torch.testing.assert_close(for_step, codes.sum() if axis is None else codes.sum((0, 2)))

    def test_equal_cells_are_a_uniform_grid(self) -> None:
        x = torch.linspace(-1, 9, 1000, dtype=torch.float64)
        uneven = n2uq_quantize(x, torch.full((7,), 0.5, dtype=torch.float64), real(0.5))
        assert torch.equal(uneven, UniformGrid(real(0.5), 0, 0, 7).quantize(x))

    def test_the_codes_of_its_weights_are_equally_frequent(self) -> None:
        w = torch.distributions.Laplace(0.0, 1.0).icdf((torch.arange(4000) + 0.5) / 4000)
        for n_bits, least in ((2, 0.18), (3, 0.05)):
            quantizer = tq.make_quantizer(f"n2uq:{n_bits}")
            quantizer.pre_observe(w)
            shares = torch.bincount(quantizer.encode(w) + 2 ** (n_bits - 1)) / len(w)
            assert float(shares.min()) > least
            close(quantizer.levels().diff()[0], 2.0 ** (2 - n_bits) * float(w.abs().mean()), 1e-5)


class TestOptions:
    def test_sat_golden(self) -> None:
        golden = GOLDENS["sat"]
        w_hat = real(golden["w_hat"])
        close(w_hat * sat_gain(w_hat), golden["scaled"])

    @pytest.mark.parametrize("n_bits", [2, 3])
    def test_the_rescaled_weight_has_the_variance_of_sat(self, n_bits: int) -> None:
        w = torch.randn(6, 4, 3, 3)
        plain, quantizer = (DoReFaQuantizer(n_bits, rescale=rescale) for rescale in (False, True))
        for each in (plain, quantizer):
            each.pre_observe(w)
        y = quantizer(w)
        assert float(y.var(correction=0)) == pytest.approx(1 / (6 * 9), rel=1e-5)
        torch.testing.assert_close(y, plain(w) * sat_gain(plain(w)))
        w.requires_grad_()
        gain = float(quantizer.gain)
        torch.testing.assert_close(gradients(quantizer(w), w)[0], gradients(plain(w), w)[0] * gain)
        for spec, site in (
            ("dorefa:3,rescale/channel", "weight"),
            ("dorefa:3,rescale", "input"),
            ("dorefa:1,rescale", "weight"),
        ):
            with pytest.raises(
                ConfigError, match="rescale=True takes the variance of a whole weight, .* got activation="
            ):
                tq.make_quantizer(spec, site)

    def test_the_rescaled_weight_keeps_the_laws_and_has_integers(self) -> None:
        quantizer = tq.make_quantizer("dorefa:2,rescale")
        tq.check_quantizer(quantizer, laws=tuple(law for law in LAWS if law not in ("compiles", "keeps_device")))
        quantizer.pre_observe(torch.randn(4, 9))
        ((scale, table),) = quantizer.integer_terms()
        assert table.tolist() == [-3, -1, 1, 3]
        assert float(scale) == pytest.approx(float(quantizer.gain) / 3)

    def test_the_calibrated_gradient_of_pact_counts_the_rounding(self) -> None:
        x, alpha = real([-1.0, 0.4, 1.3, 5.0]), real(3.0).requires_grad_()
        close(gradients(pact_quantize(x, alpha, 2, True), alpha)[0], (0 - 0.4) / 3 + (1 - 1.3) / 3 + 1)
        close(gradients(pact_quantize(x, alpha, 2), alpha)[0], 1.0)
        assert isinstance(quantizer := tq.make_quantizer("pact:2,calibrated", "output"), PACTQuantizer)
        quantizer.force(3.0)
        close(gradients(quantizer(x.float()), quantizer.alpha)[0], [(0 - 0.4 - 0.3) / 3 + 1], 1e-6)

    def test_binaryconnect_draws_signs_in_training_only(self) -> None:
        quantizer = tq.make_quantizer("bnn,stochastic")
        quantizer.force(1.0)
        x = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0]).repeat(4000, 1).requires_grad_()
        y = quantizer(x)
        torch.testing.assert_close(y.detach().mean(0), x.detach()[0].clamp(-1, 1), rtol=0.0, atol=0.06)
        assert set(y.unique().tolist()) == {-1.0, 1.0}
        assert torch.equal(gradients(y, x)[0], torch.ones_like(x))
        torch.manual_seed(5)
        drawn = quantizer(x)
        torch.manual_seed(5)
        assert torch.equal(quantizer(x), drawn)
        assert torch.equal(quantizer.eval()(x), torch.where(x >= 0, 1.0, -1.0))
        with pytest.raises(ConfigError, match="stochastic draws -1 or 1; give scale='one' with it"):
            BinaryQuantizer("mean", stochastic=True)

    def test_lqnets_averages_the_scales(self) -> None:
        quantizer = tq.make_quantizer("lqnets:2")
        alone = tq.make_quantizer("residual:2,iterations=1")
        batches = [torch.randn(500), 3 * torch.randn(500)]
        expected = []
        for x in batches:
            quantizer.pre_observe(x)
            alone.pre_observe(x)
            expected.append(alone.alphas.double())
        mean = (0.9 * 0.1 * expected[0] ** 1 + 0.1 * expected[1]) / 0.19
        torch.testing.assert_close(quantizer.alphas.double(), mean, rtol=1e-5, atol=0.0)
        torch.testing.assert_close(quantizer.levels(), residual_levels(quantizer.alphas))
