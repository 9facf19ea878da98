"""Schemes with trained numbers: golden numbers, gradients against finite differences, first values, checkpoints."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor, nn

import torchquant as tq
from tests import oracles
from tests.oracles import GOLDEN
from torchquant.errors import ConfigError, NoAffineViewError, UnobservedRangeError
from torchquant.quantizers import (
    APoTQuantizer,
    DoReFaQuantizer,
    EWGSQuantizer,
    LSQPlusQuantizer,
    LSQQuantizer,
    PACTQuantizer,
    TQTQuantizer,
    TTQQuantizer,
    pact_penalty,
)
from torchquant.quantizers_functional import (
    apot_quantize,
    dorefa_act_quantize,
    dorefa_gradient,
    dorefa_weight_quantize,
    lsq_quantize,
    pact_quantize,
    tqt_quantize,
    ttq_quantize,
)
from torchquant.quantizers_functional.apot import APOT_ALPHA, apot_magnitudes
from torchquant.quantizers_functional.dorefa import quantized_gradient


@pytest.fixture(scope="module")
def gaussian() -> Tensor:
    return torch.from_numpy(oracles.gaussian_quantile_grid(2**16)).to(torch.float64)


def number(x: Tensor) -> float:
    return float(x.detach())


@torch.no_grad()
def slope(function, at: Tensor, eps: float = 1e-7) -> float:  # noqa: ANN001
    return number((function(at + eps) - function(at - eps)) / (2 * eps))


def gradients(y: Tensor, upstream: Tensor, *wanted: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad((y * upstream).sum(), wanted))


def test_tqt_golden() -> None:
    golden = GOLDEN["golden"]["tqt"]
    for x, y, d in zip(golden["x"], golden["y"], golden["dlog2t"], strict=True):
        log2_t = torch.tensor(golden["log2_t"], dtype=torch.float64, requires_grad=True)
        found = tqt_quantize(torch.tensor(x, dtype=torch.float64), log2_t, golden["bits"])
        assert number(found.detach()) == y
        assert number(torch.autograd.grad(found, log2_t)[0]) == pytest.approx(d, rel=1e-9)


def test_tqt_is_the_slope_with_the_ceil_and_the_rounding_held() -> None:
    """The surrogate: `s * (v + const)` inside, `s * end` outside, with `s = 2**log2_t` made continuous."""
    x = torch.randn(200, dtype=torch.float64) * 2
    log2_t = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)  # a whole number, where ceil is itself
    upstream = torch.randn(200, dtype=torch.float64)
    found = gradients(tqt_quantize(x, log2_t, 3), upstream, log2_t)[0]
    v = x / 0.25
    q = v.round()
    offset = torch.where((q >= -4) & (q <= 3), q - v, torch.nan)

    def surrogate(t: Tensor) -> Tensor:
        s = 2.0**t / 4
        return (torch.where(offset.isnan(), s * q.clamp(-4, 3), x + s * offset) * upstream).sum()

    assert number(found) == pytest.approx(slope(surrogate, log2_t.detach()), rel=1e-6)


@pytest.mark.parametrize(("n_bits", "init"), [(4, "mse"), (8, "mse"), (4, "3sigma"), (8, "absmax")])
def test_tqt_has_a_step_that_is_a_power_of_two(gaussian: Tensor, n_bits: int, init: str) -> None:
    quantizer = TQTQuantizer(n_bits, init=init).double()
    quantizer.pre_observe(gaussian)
    step = quantizer.affine_params().delta
    assert number(step.log2()) == round(number(step.log2()))
    threshold = {"3sigma": 3.0, "absmax": number(gaussian.abs().max())}.get(init)
    if threshold is not None:
        assert number(quantizer.log2_t.detach()) == pytest.approx(torch.tensor(threshold).log2().item(), rel=1e-4)
    else:
        errors = {}
        for k in range(-10, 3):
            codes = (gaussian / 2.0**k).round().clamp(-(2 ** (n_bits - 1)), 2 ** (n_bits - 1) - 1)
            errors[2.0**k] = number((codes * 2.0**k - gaussian).square().mean())
        best = min(errors, key=errors.__getitem__)
        assert number(step) in (best / 2, best, best * 2)
        assert errors[number(step)] < 1.6 * errors[best]


def test_pact_at_its_kinks() -> None:
    alpha = torch.tensor(2.0, requires_grad=True)
    x = torch.tensor([-0.1, 0.0, 1.0, 1.999, 2.0, 5.0], requires_grad=True)
    y = pact_quantize(x, alpha, 2)
    for_x, for_alpha = gradients(y, torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0]), x, alpha)
    assert for_x.tolist() == [0.0, 2.0, 4.0, 8.0, 0.0, 0.0]
    assert number(for_alpha) == 48.0
    assert y.tolist() == pytest.approx([0.0, 0.0, 4 / 3, 2.0, 2.0, 2.0])


def test_pact_penalty_counts_every_alpha_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), tq.QOp(torch.relu, PACTQuantizer(4, init=6.0)), nn.Linear(4, 4))
    model.append(tq.QOp(torch.relu, PACTQuantizer(4, init=3.0)))
    for module in model.modules():
        if isinstance(module, PACTQuantizer):
            module.pre_observe(torch.ones(3))
    penalty = pact_penalty(model, weight=0.1)
    assert number(penalty.detach()) == pytest.approx(0.1 * (36 + 9))
    penalty.backward()
    assert [number(p.grad) for p in tq.quantizer_parameters(model)["params"]] == pytest.approx([1.2, 0.6])
    assert number(pact_penalty(nn.Linear(1, 1))) == 0.0


def test_ttq_is_the_derivative_of_its_three_pieces() -> None:
    x = torch.tensor([-2.0, -0.6, -0.1, 0.0, 0.2, 0.7, 3.0], dtype=torch.float64, requires_grad=True)
    numbers = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (1.5, 0.8)]
    upstream = torch.randn(7, dtype=torch.float64)
    y = ttq_quantize(x, 0.5, *numbers)
    assert y.tolist() == [-0.8, -0.8, 0.0, 0.0, 0.0, 1.5, 1.5]
    for_x, for_positive, for_negative = gradients(y, upstream, x, *numbers)
    assert number(for_positive) == pytest.approx(
        slope(lambda p: (ttq_quantize(x, 0.5, p, numbers[1]) * upstream).sum(), numbers[0]), rel=1e-6
    )
    assert number(for_negative) == pytest.approx(
        slope(lambda p: (ttq_quantize(x, 0.5, numbers[0], p) * upstream).sum(), numbers[1]), rel=1e-6
    )
    assert torch.equal(for_x, upstream * torch.tensor([0.8, 0.8, 1.0, 1.0, 1.0, 1.5, 1.5], dtype=torch.float64))


def test_ttq_starts_as_a_ternary_weight_network_and_follows_the_weights() -> None:
    w = torch.randn(5, 200)
    quantizer, twn = TTQQuantizer(axis=0), tq.TernaryQuantizer(axis=0)
    for q in (quantizer, twn):
        q.pre_observe(w)
    assert torch.allclose(quantizer.positive, twn.alpha)
    assert torch.allclose(quantizer.negative, twn.alpha)
    assert torch.allclose(quantizer.threshold, 0.05 * w.abs().amax(1))
    quantizer.pre_observe(w * 3)
    assert torch.allclose(quantizer.threshold, 0.15 * w.abs().amax(1))
    assert torch.allclose(quantizer.positive, twn.alpha)


@pytest.mark.parametrize("n_bits", range(2, 8))
def test_apot_levels_and_error(gaussian: Tensor, n_bits: int) -> None:
    golden = GOLDEN["apot_signed_N01"][str(n_bits)]
    assert APOT_ALPHA[n_bits] == pytest.approx(golden["alpha"], rel=1e-9)
    assert apot_magnitudes(n_bits - 1) == pytest.approx(golden["levels_pos"], abs=1e-11)
    assert len(set(apot_magnitudes(n_bits - 1))) == 2 ** (n_bits - 1)
    quantizer = APoTQuantizer(n_bits).double()
    quantizer.pre_observe(gaussian)
    assert number((quantizer(gaussian) - gaussian).square().mean()) == pytest.approx(golden["mse"], rel=2e-3)
    if n_bits < 7:
        assert apot_magnitudes(n_bits) == pytest.approx(GOLDEN["apot_unsigned_levels"][str(n_bits)], abs=1e-11)
        unsigned = APoTQuantizer(n_bits, signed=None).double()
        unsigned.pre_observe(gaussian.relu())
        assert unsigned.code_range == (0, 2**n_bits - 1)
        wider = GOLDEN["apot_signed_N01"][str(n_bits + 1)]["mse"]
        error = number((unsigned(gaussian.relu()) - gaussian.relu()).square().mean())
        assert error == pytest.approx(wider / 2, rel=3e-3)


@pytest.mark.parametrize("signed", [True, False])
def test_apot_clip_has_the_published_gradient(signed: bool) -> None:
    x = torch.randn(300, dtype=torch.float64, requires_grad=True) * 2
    clip = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(300, dtype=torch.float64)
    y = apot_quantize(x, clip, 4, signed)
    for_x, for_clip = gradients(y, upstream, x, clip)
    u = (x / clip).detach()
    low = -1.0 if signed else 0.0
    inside = (u >= low) & (u <= 1.0)
    expected = torch.where(inside, (y / clip).detach() - u, u.clamp(low, 1.0))
    assert number(for_clip) == pytest.approx(number((expected * upstream).sum()), rel=1e-9)
    assert torch.equal(for_x, upstream * inside)


def test_apot_clip_settles_at_the_optimum(gaussian: Tensor) -> None:
    for factor, sign in ((0.8, -1), (1.25, 1)):
        clip = torch.tensor(APOT_ALPHA[4] * factor, dtype=torch.float64, requires_grad=True)
        (0.5 * (apot_quantize(gaussian, clip, 4) - gaussian).square()).mean().backward()
        assert number(clip.grad) * sign > 0


def test_lsqplus_gradients_are_those_of_lsq_and_of_the_offset() -> None:
    x = torch.linspace(-2, 3, 41, dtype=torch.float64, requires_grad=True)
    step, offset = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.31, -0.4))
    upstream = torch.randn(41, dtype=torch.float64)
    y = lsq_quantize(x, step, 3, False, 1.0, offset)
    for_x, for_step, for_offset = gradients(y, upstream, x, step, offset)
    v = ((x - offset) / step).detach()
    inside = (v > 0) & (v < 7)
    assert torch.allclose(y, (v.clamp(0, 7).round() * step + offset).detach())
    assert torch.equal(for_x, upstream * inside)
    assert number(for_offset) == pytest.approx(number((upstream * ~inside).sum()), rel=1e-9)
    expected = torch.where(inside, v.round() - v, v.clamp(0, 7))
    assert number(for_step) == pytest.approx(number((expected * upstream).sum()), rel=1e-9)


@pytest.mark.parametrize("n_bits", range(2, 9))
def test_lsqplus_first_step(gaussian: Tensor, n_bits: int) -> None:
    row = GOLDEN["lsq_init_N01"][str(n_bits)]
    for init, step, error in (
        ("paper", row["lsqplus_init"], row["lsqplus_init_mse"]),
        ("mse", row["optimal_step"], row["optimal_mse"]),
    ):
        quantizer = LSQPlusQuantizer(n_bits, init=init).double()
        quantizer.pre_observe(gaussian)
        assert number(quantizer.step) == pytest.approx(step, rel=1e-3)
        assert number((quantizer(gaussian) - gaussian).square().mean()) == pytest.approx(
            error, rel=0.02 if n_bits < 8 else 0.05
        )


def test_lsqplus_offset_starts_where_the_error_is_least() -> None:
    x = torch.randn(20000).double() * 0.3 + 5.0
    with_offset, without = LSQPlusQuantizer(4, offset=True).double(), LSQQuantizer(4, signed=None).double()
    for quantizer in (with_offset, without):
        quantizer.pre_observe(x)
    errors = [number((q(x) - x).square().mean()) for q in (with_offset, without)]
    assert errors[0] < errors[1] / 20
    best = min(
        number(((((x - low) / s).round().clamp(0, 15) * s + low) - x).square().mean())
        for low in (x.min(), x.min() + 0.1, x.min() + 0.2, x.min() + 0.3)
        for s in torch.linspace(0.1, 0.2, 41).tolist()
    )
    assert errors[0] < 1.3 * best


def test_lsqplus_is_uniform_once_snapped() -> None:
    quantizer = tq.make_quantizer("lsqplus:4", site="output")
    x = torch.randn(500).relu() - 0.31
    quantizer.pre_observe(x)
    with pytest.raises(NoAffineViewError, match="call snap"):
        quantizer.affine_params()
    quantizer.snap()
    params = quantizer.affine_params()
    codes = (quantizer.encode(x) - params.zero_point) * params.delta
    assert torch.allclose(codes.float(), quantizer(x), atol=1e-6)


def test_dorefa_golden() -> None:
    golden = GOLDEN["golden"]["dorefa"]
    w = torch.tensor(golden["w"], dtype=torch.float64)
    assert dorefa_weight_quantize(w, 1.0, 2).tolist() == pytest.approx(golden["k2"])
    acts = dorefa_act_quantize(torch.tensor(golden["act_x"], dtype=torch.float64), 2)
    assert acts.tolist() == pytest.approx(golden["act_k2"])
    for n_bits in (1, 2):
        quantizer = DoReFaQuantizer(n_bits).double()
        quantizer.pre_observe(w)
        assert quantizer(w).tolist() == pytest.approx(golden[f"k{n_bits}"])
    grad = torch.tensor([golden["grad"]], dtype=torch.float64)
    assert quantized_gradient(grad, 2, 0.0)[0].tolist() == pytest.approx(golden["grad_k2_noise0"])


def test_dorefa_weight_gradient_goes_through_tanh() -> None:
    w = torch.randn(50, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(50, dtype=torch.float64)
    absmax = w.detach().abs().max()
    (found,) = gradients(dorefa_weight_quantize(w, absmax, 4), upstream, w)
    assert torch.allclose(found, upstream * (1 - w.detach().tanh() ** 2) / absmax.tanh())


def test_dorefa_gradient_is_quantized_by_sample_without_bias() -> None:
    grad = torch.tensor([[0.4, -0.1, 0.05], [0.0, 0.0, 0.0], [8.0, -2.0, 1.0]])
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(4000):
        x = torch.zeros(3, 3, requires_grad=True)
        dorefa_gradient(x, 3, generator).backward(grad)
        found.append(x.grad)
    drawn = torch.stack(found)
    assert not drawn[:, 1].any()
    assert torch.allclose(drawn.mean(0)[:, 1:], grad[:, 1:], atol=0.02 * 8)
    assert drawn[:, 0, 1].unique().numel() <= 8
    steps = (drawn[:, 2] / 16 + 0.5) * 7
    assert torch.allclose(steps, steps.round(), atol=1e-4)
    # defect 29: one draw for a whole sample would move its elements together
    assert abs(number(torch.corrcoef(drawn[:, 2, 1:].T)[0, 1])) < 0.1


def test_dorefa_activation_quantizes_the_gradient_too() -> None:
    quantizer = tq.make_quantizer("dorefa:4,gradient_bits=2", site="output")
    x = torch.rand(5, 40, requires_grad=True)
    quantizer.pre_observe(x)
    quantizer(x).backward(torch.randn(5, 40))
    assert all(row.unique().numel() <= 4 for row in x.grad)


def test_ewgs_leans_the_gradient_by_the_rounding_error() -> None:
    x = torch.randn(300, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(300, dtype=torch.float64)
    quantizer = EWGSQuantizer(3, delta=0.2).double()
    quantizer.pre_observe(x)
    y = quantizer(x)
    (found,) = gradients(y, upstream, x)
    step = number(quantizer.step)
    inside = (x / step > -4) & (x / step < 3)
    lean = (x - y) / (3.5 * step)
    assert torch.allclose(found, upstream * inside * (1 + 0.2 * upstream.sign() * lean).detach())
    quantizer.set_delta(0.0)
    plain = LSQQuantizer(3).double()
    plain.pre_observe(x)
    assert torch.equal(gradients(quantizer(x), upstream, x)[0], gradients(plain(x), upstream, x)[0])


LEARNED = ["lsq:4", "lsqplus:4", "ewgs:4", "tqt:4", "apot:4"]


@pytest.mark.parametrize("text", LEARNED)
def test_learned_numbers_move_to_less_error(text: str) -> None:
    """From a start twice too large, training on the error alone finds a smaller one; the number stays positive."""
    torch.manual_seed(0)
    quantizer = tq.make_quantizer(text)
    x = torch.randn(4000)
    quantizer.pre_observe(2.5 * x)

    def error() -> Tensor:
        return (quantizer(x) - x).square().mean()

    before = number(error().detach())
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        error().backward()
        optimizer.step()
    assert number(error().detach()) < 0.7 * before


@pytest.mark.parametrize("text", ["lsq:4", "apot:4", "ttq"])
def test_a_number_pushed_below_zero_stays_usable_and_comes_back(text: str) -> None:
    quantizer = tq.make_quantizer(text)
    x = torch.randn(100)
    quantizer.pre_observe(x)
    for parameter in quantizer.parameters():
        parameter.data.fill_(-1.0)
    y = quantizer(x)
    assert y.isfinite().all()
    y.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in quantizer.parameters())


@pytest.mark.parametrize("text", ["lsq:4", "tqt:4", "apot:4", "ewgs:4"])
def test_the_first_tensor_decides_the_sign_and_a_checkpoint_keeps_it(text: str) -> None:
    x = torch.rand(50)
    quantizer = tq.make_quantizer(text, site="output")
    with pytest.raises(UnobservedRangeError):
        _ = quantizer.code_range
    quantizer.pre_observe(x)
    assert quantizer.code_range[0] == 0
    file = io.BytesIO()
    torch.save(quantizer.state_dict(), file)
    file.seek(0)
    loaded = tq.make_quantizer(text, site="output")
    loaded.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert loaded.code_range == quantizer.code_range
    assert torch.equal(loaded(x), quantizer(x))
    other = tq.make_quantizer(text, site="output")
    other.pre_observe(-x)
    assert other.code_range[0] < 0


def test_groups_learn_too() -> None:
    quantizer = tq.make_quantizer("lsq:4/group=16")
    w = torch.randn(8, 40, requires_grad=True)
    quantizer.pre_observe(w)
    quantizer(w).square().sum().backward()
    assert [tuple(p.grad.shape) for p in quantizer.parameters()] == [(16,), (8,)]


@pytest.mark.parametrize(
    ("text", "site", "message"),
    [
        ("pact:4", "weight", "pact is for input and output, not for weight"),
        ("ttq", "output", "ttq is for weight, not for output"),
        ("pact:4,init=-1.0", "output", "init must be 'mse' or a number > 0"),
        ("tqt:4,init=best", "weight", "init must be one of mse, 3sigma, absmax"),
        ("ttq:2,t=1.5", "weight", "t must be between 0 and 1"),
        ("apot:8", "weight", "from 2 to 7 .signed."),
        ("dorefa:17", "weight", "n_bits must be a whole number from 1 to 16"),
        ("dorefa:4,gradient_bits=6", "weight", "gradient_bits quantizes the gradient of an activation"),
        ("ewgs:4,delta=-0.1", "weight", "delta must be a number >= 0"),
        ("lsq:4@ewgs", "weight", "lsq has its own gradient"),
    ],
)
def test_bad_settings_are_refused(text: str, site: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tq.make_quantizer(text, site)
