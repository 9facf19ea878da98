"""Every gradient estimator against its written formula, alone and on every format that takes it."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import torchquant as tq
from tests.oracles import GOLDEN
from torchquant.errors import ConfigError
from torchquant.quantizers import QUANTIZERS, GridQuantizer
from torchquant.quantizers_functional import GRADIENTS, Gradient, Projected
from torchquant.quantizers_functional._gradient import make_gradient
from torchquant.quantizers_functional.gradients import EWGS

COMBINATIONS = [
    pytest.param(name, gradient, axis, id=f"{name}-{gradient}-{'tensor' if axis is None else f'axis{axis}'}")
    for name in QUANTIZERS
    if issubclass(QUANTIZERS[name], GridQuantizer)
    for gradient in QUANTIZERS[name].gradients()
    for axis in (None, 0)
    if QUANTIZERS[name].examples(axis)
]


SLOW = pytest.param("rdfs", marks=pytest.mark.slow)


def gradient_of(quantizer: GridQuantizer, x: Tensor, upstream: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    quantizer(x).backward(upstream)
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize(("name", "gradient", "axis"), COMBINATIONS)
def test_the_forward_is_that_of_the_format_and_the_gradient_is_finite(
    name: str, gradient: str, axis: int | None
) -> None:
    quantizer = QUANTIZERS[name].examples(axis)[0]
    x = torch.randn(4, 6, 5)
    quantizer.pre_observe(x)
    expected = quantizer(x)
    quantizer.set_gradient(gradient)
    soft = quantizer(x.clone().requires_grad_())
    assert torch.equal(soft, expected) != GRADIENTS[gradient].softens
    assert torch.equal(quantizer.eval()(x.clone().requires_grad_()), expected)
    quantizer.train()
    with torch.no_grad():
        x[0, 0, 0], x[0, 0, 1] = float("inf"), -3e38
    grad = gradient_of(quantizer, x, torch.randn(x.shape))
    assert grad.isfinite().all()
    assert (grad != 0).float().mean() > 0.5
    assert torch.equal(copy.deepcopy(quantizer)(x), quantizer(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("name", "gradient"), sorted({tuple(p.values[:2]) for p in COMBINATIONS}))
def test_every_gradient_in_every_type(name: str, gradient: str, dtype: torch.dtype) -> None:
    quantizer = QUANTIZERS[name].examples(None)[0]
    x = torch.randn(4, 60).to(dtype)
    quantizer.pre_observe(x)
    quantizer.set_gradient(gradient)
    grad = gradient_of(quantizer, x, torch.randn(x.shape).to(dtype))
    assert grad.dtype == dtype
    assert grad.isfinite().all()
    wide = gradient_of(quantizer, x.double(), torch.ones(x.shape, dtype=torch.float64))
    ones = gradient_of(quantizer, x, torch.ones(x.shape, dtype=dtype)).double()
    if gradient in ("ste", "clipped"):  # elements at the very edge may round to its other side
        assert float((wide.to(dtype) != ones.to(dtype)).double().mean()) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize(("name", "gradient", "axis"), COMBINATIONS)
def test_every_combination_compiles(name: str, gradient: str, axis: int | None) -> None:
    quantizer = QUANTIZERS[name].examples(axis)[0]
    x, upstream = torch.randn(4, 6, 5), torch.randn(4, 6, 5)
    quantizer.pre_observe(x)
    quantizer.set_gradient(gradient)
    if gradient == "noise":
        quantizer.eval()  # what it draws differs
    expected = gradient_of(quantizer, x, upstream)
    torch.compiler.reset()
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    assert torch.allclose(gradient_of(compiled, x, upstream), expected, atol=1e-6)


@pytest.mark.parametrize("name", [n for n in GRADIENTS if "sign" not in GRADIENTS[n].needs and n != "rdfs"] + [SLOW])
def test_compiled_gradient_equals_eager(name: str) -> None:
    quantizer = tq.AffineQuantizer(3, tq.BatchMinMax(axis=0), "narrow")
    x, upstream = torch.randn(4, 50), torch.randn(4, 50)
    quantizer.pre_observe(x / 2)
    quantizer.set_gradient(name)
    expected = gradient_of(quantizer, x, upstream)
    torch._dynamo.reset()
    found = gradient_of(torch.compile(quantizer, fullgraph=True, backend="aot_eager"), x, upstream)
    assert torch.equal(found, expected)


def test_ewgs_golden() -> None:
    golden = GOLDEN["golden"]["ewgs"]
    xn, xq, g = (torch.tensor(golden[key], dtype=torch.float64) for key in ("xn", "xq", "g"))
    x = xn.clone().requires_grad_()
    ends = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    y = EWGS(delta=golden["delta"]).attach(Projected(x, xq, ends=lambda: (ends[0], ends[1])))
    y.backward(g)
    assert x.grad.tolist() == pytest.approx(golden["out"], abs=1e-7)


def test_ewgs_is_the_formula_on_a_grid() -> None:
    quantizer = tq.AffineQuantizer(2, tq.BatchMinMax(), "narrow")
    quantizer.observer.force_ranges(-1.0, 1.0)  # levels -1, 0, 1: already normalised
    quantizer.set_gradient("ewgs", delta=0.2)
    x = torch.linspace(-2, 2, 101)
    upstream = torch.randn(101)
    value = quantizer(x)
    inside = (x.round().abs() <= 1).float()
    expected = inside * upstream * (1 + 0.2 * upstream.sign() * (x - value))
    assert torch.allclose(gradient_of(quantizer, x, upstream), expected, atol=1e-7)


def test_ewgs_without_delta_is_the_clipped_straight_through() -> None:
    x, upstream = torch.randn(200), torch.randn(200)
    quantizer = tq.ESBQuantizer(4, 1, gradient_clip=True)
    quantizer.pre_observe(x / 2)
    expected = gradient_of(quantizer, x, upstream)
    quantizer.set_gradient("ewgs", delta=0.0)
    assert torch.equal(gradient_of(quantizer, x, upstream), expected)


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("hardtanh", lambda x: (x.abs() <= 1).float()),
        ("approxsign", lambda x: (2 - 2 * x.abs()).clamp_min(0)),
    ],
)
def test_one_bit_estimators_are_their_formula(name: str, factor) -> None:  # noqa: ANN001
    x = torch.linspace(-2, 2, 81).requires_grad_()
    upstream = torch.randn(81)
    make_gradient(name).attach(Projected(x, x.detach().sign())).backward(upstream)
    assert torch.allclose(x.grad, factor(x.detach()) * upstream, atol=1e-7)


def test_dsq_is_the_slope_of_its_soft_staircase() -> None:
    golden = GOLDEN["golden"]["dsq"]
    low, high, alpha, n_cells = golden["l"], golden["u"], golden["alpha"], 2 ** golden["bits"] - 1
    step = (high - low) / n_cells

    def soft(x: Tensor) -> Tensor:
        cell = ((x.clamp(low, high) - low) / step).floor().clamp(0, n_cells - 1).detach()
        middle = low + (cell + 0.5) * step
        phi = torch.tanh(math.log(2 / alpha - 1) / step * (x.clamp(low, high) - middle)) / (1 - alpha)
        return low + step * (cell + (phi + 1) / 2)

    x = torch.tensor(golden["x"], dtype=torch.float64)
    assert soft(x).tolist() == pytest.approx(golden["y"], abs=1e-12)  # the oracle itself is right
    x = torch.linspace(-1.3, 1.3, 41, dtype=torch.float64).requires_grad_()
    (expected,) = torch.autograd.grad(soft(x).sum(), x)
    quantizer = tq.AffineQuantizer(2, tq.BatchMinMax()).double()
    quantizer.observer.force_ranges(low, high)
    quantizer.set_gradient("dsq", alpha=alpha)
    grid = quantizer.levels()
    shift = float(grid.min()) - low  # real 0 is on the affine grid, so its ends may sit beside -1 and 1
    assert torch.allclose(gradient_of(quantizer, x.detach() + shift, torch.ones_like(x)), expected, atol=1e-9)


@pytest.mark.parametrize("exact", [False, True])
def test_pwl_leans_towards_x_in_training_only(exact: bool) -> None:
    quantizer = tq.AffineQuantizer(3, tq.BatchMinMax())
    x, upstream = torch.randn(50), torch.randn(50)
    quantizer.pre_observe(x)
    hard = quantizer(x)
    quantizer.set_gradient("pwl", rho=0.3, exact=exact)
    assert torch.allclose(quantizer(x.clone().requires_grad_()), hard + 0.3 * (x - hard))
    assert torch.allclose(gradient_of(quantizer, x, upstream), upstream * (0.3 if exact else 1.0))
    assert torch.equal(quantizer.eval()(x.clone().requires_grad_()), hard)


def test_pwlc_stays_within_the_range() -> None:
    quantizer = tq.AffineQuantizer(3, tq.BatchMinMax(), "narrow")
    quantizer.observer.force_ranges(-1.0, 1.0)
    quantizer.set_gradient("pwlc", rho=1.0)
    x = torch.tensor([-50.0, -0.4, 0.2, float("inf")]).requires_grad_()
    y = quantizer(x)
    y.sum().backward()
    assert torch.allclose(y, torch.tensor([-1.0, -0.4, 0.2, 1.0]))
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 0.0]


def test_noise_has_the_width_of_a_step_and_repeats() -> None:
    quantizer = tq.AffineQuantizer(4, tq.BatchMinMax(), "narrow")
    quantizer.observer.force_ranges(-7.0, 7.0)  # step 1
    quantizer.set_gradient("noise")
    x = torch.linspace(-6, 6, 10001).requires_grad_()
    torch.manual_seed(3)
    y = quantizer(x)
    error = (y - x).detach()
    assert error.abs().max() <= 0.5
    assert float(error.var()) == pytest.approx(1 / 12, rel=0.05)
    torch.manual_seed(3)
    assert torch.equal(quantizer(x), y)
    assert quantizer(torch.tensor([90.0], requires_grad=True)).item() == pytest.approx(7.0, abs=0.5)


def test_a_fused_clamp_goes_with_every_estimator() -> None:
    x, upstream = torch.randn(300) * 3, torch.randn(300)
    for name in ("ste", "clipped", "ewgs", "dsq", "pwl", "pwlc"):
        quantizer = tq.AffineQuantizer(4, tq.BatchMinMax())
        quantizer.observer.force_ranges(0.0, 2.5)
        quantizer.set_gradient(name)
        fused, apart = (x.clone().requires_grad_() for _ in range(2))
        quantizer(fused, clamp=(0.0, 6.0)).backward(upstream)
        quantizer(torch.nn.functional.relu6(apart)).backward(upstream)
        assert torch.allclose(fused.grad, apart.grad, atol=1e-7), name


def test_what_is_not_defined_is_refused_with_the_list() -> None:
    quantizer = tq.AffineQuantizer(4, tq.BatchMinMax())
    with pytest.raises(
        ConfigError,
        match="AffineQuantizer takes the gradients clipped, dsq, ewgs, .* ste, got 'approxsign'",
    ):
        quantizer.set_gradient("approxsign")
    with pytest.raises(ConfigError, match="no gradient 'magic'.* Known: approxsign, clipped"):
        quantizer.set_gradient("magic")
    with pytest.raises(ConfigError, match="delta must be a number >= 0, got -1"):
        quantizer.set_gradient("ewgs", delta=-1)
    with pytest.raises(ConfigError, match="'ewgs' needs the ends of the grid"):
        tq.quantizers_functional.ternary_quantize(torch.ones(2, requires_grad=True), 0.5, 1.0, gradient="ewgs")


def test_an_estimator_of_ones_own_goes_with_every_format() -> None:
    @dataclass(frozen=True, repr=False)
    class Half(Gradient):
        name = "half"
        share: float = 0.5

        def attach(self, projected: Projected) -> Tensor:
            share = projected.x * self.share
            return share + (projected.value - share).detach()

    GRADIENTS.register("half")(Half)
    try:
        quantizer = tq.TernaryQuantizer()
        assert "half" in quantizer.gradients()
        x = torch.randn(9)
        quantizer.pre_observe(x)
        quantizer.set_gradient("half", share=0.25)
        assert gradient_of(quantizer, x, torch.ones(9)).tolist() == [0.25] * 9
    finally:
        GRADIENTS.unregister("half")


BATCHED = ("affine:4@clipped", "affine:4@ewgs", "esb:4,k=1@clipped", "lsq:4", "lsqplus:4", "ewgs:4", "tqt:4", "apot:4")


@pytest.mark.parametrize("spec", BATCHED)
def test_a_batch_of_gradients_is_many_gradients(spec: str) -> None:
    """`is_grads_batched`, as for a Jacobian, gives tensors that are not in memory as they look."""
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    quantizer = tq.make_quantizer(spec)
    quantizer.pre_observe(0.5 * x)
    leaves, upstream = [x.requires_grad_(), *quantizer.parameters()], torch.randn(3, 5, 7)
    y = quantizer(x)
    together = torch.autograd.grad(y, leaves, upstream, retain_graph=True, is_grads_batched=True)
    for i in range(3):
        alone = torch.autograd.grad(y, leaves, upstream[i], retain_graph=True)
        for found, expected in zip(together, alone, strict=True):
            torch.testing.assert_close(found[i], expected, rtol=1e-5, atol=1e-5)
