"""Defects of published code (docs/algorithms.md I) that are not reproduced here; those not named in other files."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import torchquant as tq
from tests import oracles
from tests.oracles import GOLDEN
from torchquant.quantizers import QUANTIZERS, LSQQuantizer, MXQuantizer
from torchquant.quantizers_functional import minifloat_quantize
from torchquant.quantizers_functional.esb import ESB_ALPHA, esb_max_exponent
from torchquant.quantizers_functional.minifloat import FORMATS


def observed(text: str, x: torch.Tensor, site: str = "weight") -> tq.Quantizer:
    quantizer = tq.make_quantizer(text, site)
    quantizer.pre_observe(x)
    return quantizer


def test_defect_1_an_eight_bit_q_format_has_its_256_codes() -> None:
    x = torch.linspace(-1, 1, 4001)
    y = observed("qfmt:8,signed", x)(x)
    assert y.unique().numel() > 120  # published: 4
    assert float((y - x).abs().max()) <= 1 / 128 + 1e-6


def test_defect_2_the_negative_end_at_a_power_of_two_costs_no_bit() -> None:
    step = observed("qfmt:8,signed", torch.tensor([-1.0, 0.5])).affine_params().delta
    assert float(step) == 2.0**-7
    assert float(observed("qfmt:8,signed", torch.zeros(3))(torch.zeros(3)).abs().sum()) == 0.0


def test_defect_3_elements_in_range_keep_their_gradient() -> None:
    x = torch.tensor([3.9, 7.2, -10.0], requires_grad=True)
    quantizer = observed("affine:4@clipped", x.detach())
    y = quantizer(x)
    assert float(y[2].detach()) < -10.0  # rounds beyond the range, which made the published code mask it
    y.sum().backward()
    assert x.grad.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("symmetric", ["true", "narrow", "full", "torch", "false"])
def test_defect_4_one_sided_and_empty_ranges_work_in_every_grid(symmetric: str) -> None:
    for x in (torch.rand(50), -torch.rand(50), torch.zeros(50)):
        y = observed(f"affine:4,symmetric={symmetric}", x)(x)
        assert y.isfinite().all()
        assert float((y - x).abs().max()) <= float(x.abs().max()) / 7 + 1e-6


def test_defect_5_the_published_symmetric_grid_misses_the_top_and_narrow_does_not() -> None:
    x = torch.tensor([-1.0, 1.0])
    assert float(observed("affine:4,symmetric=true", x)(x)[1]) == pytest.approx(1 - 1 / 15)
    assert float(observed("affine:4,symmetric=narrow", x)(x)[1]) == pytest.approx(1.0)


def test_defect_6_a_forced_average_is_what_was_forced_and_loads() -> None:
    observer = tq.ExpAvgMinMax(0.9)
    observer.force_ranges(-1.0, 2.0)
    assert [float(end) for end in observer.get_ranges()] == [-1.0, 2.0]
    fresh = tq.ExpAvgMinMax(0.9)
    fresh.load_state_dict(observer.state_dict(), strict=True)
    assert [float(end) for end in fresh.get_ranges()] == [-1.0, 2.0]


def test_defect_7_dilation_and_padding_mode_reach_the_convolution() -> None:
    layer = nn.Conv2d(2, 3, 3, padding=2, dilation=2, padding_mode="reflect")
    wrapper = tq.QWrapper(layer, tq.make_quantizer("affine:16,symmetric=narrow/channel"), None)
    wrapper.observe_weight()
    x = torch.randn(1, 2, 8, 8)
    with tq.qmodule_state(wrapper, tq.QModuleState.QUANT_EVAL):
        assert torch.allclose(wrapper(x), layer(x), atol=1e-3)


@pytest.mark.parametrize(("pair", "published"), [((9, 7), 1.9757), ((4, 0), 0.0381), ((5, 1), 0.0391)])
def test_defect_9_esb_scales_are_optimal(pair: tuple[int, int], published: float) -> None:
    x = torch.from_numpy(oracles.gaussian_quantile_grid(2**20)).to(torch.float64)

    def error(alpha: float) -> float:
        return float((tq.quantizers_functional.esb_quantize(x, alpha, *pair) - x).square().mean())

    assert error(ESB_ALPHA[pair]) < error(published)
    assert ESB_ALPHA[pair] == pytest.approx(GOLDEN["esb"]["N(0,1)"][f"{pair[0]},{pair[1]}"]["alpha"], rel=1e-6)
    assert any(esb_max_exponent(b, k) == 14 for b, k in ESB_ALPHA)  # e = 4 is there, published: None


def test_defect_10_one_exponent_bit_is_the_uniform_grid_and_powers_of_two_stay_themselves() -> None:
    quantizer = tq.ESBQuantizer(4, 2)
    quantizer.force(1.0)
    assert quantizer.levels().diff().unique().tolist() == [0.25]
    powers = tq.ESBQuantizer(4, 0)
    powers.force(1.0)
    x = 2.0 ** torch.arange(0, 7)
    assert torch.equal(powers(x), x)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_defect_20_the_forward_is_on_the_grid_in_training(name: str) -> None:
    quantizer = QUANTIZERS[name].examples(None)[0]
    x = torch.randn(64, 33).abs() if quantizer.signed is False else torch.randn(64, 33)
    quantizer.pre_observe(x)
    y = quantizer.train()(x.clone().requires_grad_())
    assert all(part.unique().numel() <= 2**quantizer.n_bits for part in quantizer.parts(y.detach()))
    assert torch.equal(y, quantizer.eval()(x))


@pytest.mark.parametrize("scheme", ["ul2q:4", "vecq:4", "clipq:4", "esb:4,k=1", "twn", "xnor", "residual:3"])
def test_defect_21_averages_start_at_the_data(scheme: str) -> None:
    x = 1e-4 * torch.randn(400)
    averaged, plain = observed(scheme, x, "output"), observed(scheme, x)
    assert torch.allclose(averaged(x), plain(x), rtol=1e-5, atol=1e-12)


def test_defect_24_a_weight_has_its_current_range() -> None:
    quantizer = tq.make_quantizer("affine:8,symmetric=narrow/channel")
    for scale in (100.0, 1.0):
        w = torch.randn(3, 50) * scale
        quantizer.pre_observe(w)
    assert torch.allclose(quantizer.affine_params().delta, w.abs().amax(1) / 127)


def test_defect_25_torch_symmetric_codes_have_their_zero_point_stored() -> None:
    x = torch.tensor([-18.0, 3.0])
    params = observed("affine:8,symmetric=torch", x).affine_params()
    assert (int(params.zero_point), params.qmin, params.qmax) == (128, 0, 255)
    assert float(params.delta) == pytest.approx(18 / 127.5)
    expected = torch.fake_quantize_per_tensor_affine(x, float(params.delta), 128, 0, 255)
    assert torch.allclose(observed("affine:8,symmetric=torch", x)(x), expected)


def test_defect_26_rounding_comes_before_the_zero_point() -> None:
    quantizer = tq.AffineQuantizer(4, tq.BatchMinMax())
    quantizer.observer.force_ranges(-5.0, 10.0)  # step 1, zero point 5, which is odd
    ties = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5])
    assert quantizer(ties).tolist() == [0.0, 2.0, 2.0, 0.0, -2.0]


def test_defect_34_floats_saturate_before_a_cast() -> None:
    for name, largest in (("fp8_e4m3", 448.0), ("fp8_e5m2", 57344.0)):
        x = torch.tensor([1e6, -1e6, float("inf")])
        assert minifloat_quantize(x, 1.0, FORMATS[name]).tolist() == [largest, -largest, largest]


def test_defect_35_the_ocp_scale_saturates_and_rceil_does_not() -> None:
    x = torch.full((1, 32), 500.0)
    assert float(MXQuantizer(8, "fp8_e4m3", "floor")(x)[0, 0]) == 448.0
    assert float(MXQuantizer(8, "fp8_e4m3", "rceil")(x)[0, 0]) == pytest.approx(500.0, rel=1 / 16)


def test_defect_36_the_default_start_of_lsq_is_no_worse_than_the_papers() -> None:
    x = torch.from_numpy(oracles.gaussian_quantile_grid(2**15)).to(torch.float64)
    for n_bits, at_least in ((2, 1.4), (4, 2.4), (8, 15.0)):
        errors = []
        for init in ("paper", "mse"):
            quantizer = LSQQuantizer(n_bits, init=init).double()
            quantizer.pre_observe(x)
            errors.append(float((quantizer(x).detach() - x).square().mean()))
        assert errors[0] / errors[1] > at_least
