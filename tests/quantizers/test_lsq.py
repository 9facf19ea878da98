"""The learned step size: its gradients, its start, its state, and that it learns."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import torchquant as tq
from tests import oracles
from tests.oracles import GOLDEN
from torchquant.errors import ConfigError
from torchquant.quantizers import LSQQuantizer
from torchquant.quantizers_functional import lsq_quantize


@pytest.fixture(scope="module")
def gaussian() -> Tensor:
    return torch.from_numpy(oracles.gaussian_quantile_grid(2**18))


def test_golden_gradients() -> None:
    golden = GOLDEN["golden"]["lsq_grad"]
    x = torch.tensor(golden["x"], dtype=torch.float64, requires_grad=True)
    for i, (q, dq_ds, dq_dx) in enumerate(zip(golden["q"], golden["dq_ds"], golden["dq_dx"], strict=True)):
        step = torch.tensor(golden["s"], dtype=torch.float64, requires_grad=True)
        y = lsq_quantize(x[i], step, 3)
        for_x, for_step = torch.autograd.grad(y, (x, step))
        assert (y.item(), for_x[i].item()) == (pytest.approx(q), dq_dx)
        assert for_step.item() == pytest.approx(dq_ds, abs=1e-12)
    assert golden["grad_scale"] == pytest.approx(1 / (len(golden["x"]) * golden["Qp"]) ** 0.5)


def test_the_step_gradient_is_that_of_the_surrogate_by_finite_differences() -> None:
    """With the rounding residue held, `step * (x / step + residue)` inside and `step * end` outside."""
    x = torch.linspace(-3, 3, 97, dtype=torch.float64)
    step = torch.tensor([0.31], dtype=torch.float64, requires_grad=True)
    weight = torch.randn(97, dtype=torch.float64)
    (lsq_quantize(x, step, 3) * weight).sum().backward()
    scaled = x / step.detach()
    residue = scaled.round() - scaled

    def surrogate(s: float) -> Tensor:
        inside = (scaled > -4) & (scaled < 3)
        return (torch.where(inside, s * (x / s + residue), s * scaled.clamp(-4, 3).round()) * weight).sum()

    difference = (surrogate(0.31 + 1e-6) - surrogate(0.31 - 1e-6)) / 2e-6
    assert float(step.grad) == pytest.approx(float(difference), rel=1e-6)


def test_steps_per_channel_have_gradients_of_their_own() -> None:
    w = torch.randn(3, 5, 2)
    together = LSQQuantizer(4, axis=0)
    together.pre_observe(w)
    together(w).square().sum().backward()
    for i in range(3):
        alone = LSQQuantizer(4)
        alone.pre_observe(w[i])
        alone(w[i]).square().sum().backward()
        assert torch.allclose(together.step.grad[i], alone.step.grad, rtol=1e-5)


@pytest.mark.parametrize("n_bits", [2, 4, 8])
def test_first_step(gaussian: Tensor, n_bits: int) -> None:
    row = GOLDEN["lsq_init_N01"][str(n_bits)]
    for init, step, error in (
        ("paper", row["lsq_init"], row["lsq_init_mse"]),
        ("mse", row["optimal_step"], row["optimal_mse"]),
    ):
        quantizer = LSQQuantizer(n_bits, init=init).double()
        quantizer.pre_observe(gaussian)
        assert quantizer.step.item() == pytest.approx(step, rel=1e-3)
        found = (quantizer(gaussian) - gaussian).square().mean().item()
        assert found == pytest.approx(
            error, rel=0.015 if n_bits == 8 else 2e-3
        )  # the grid of quantiles has no far tail


def test_first_step_of_unsigned_codes_on_positive_data(gaussian: Tensor) -> None:
    quantizer = LSQQuantizer(4, signed=False).double()
    x = gaussian.clamp_min(0)
    quantizer.pre_observe(x)
    narrow = GOLDEN["uniform_midtread_narrow"]["N(0,1)"]["5"]
    assert quantizer.step.item() == pytest.approx(narrow["step"], rel=1e-3)
    assert (quantizer(x) - x).square().mean().item() == pytest.approx(narrow["mse"] / 2, rel=2e-3)


@pytest.mark.parametrize("n_bits", [2, 3, 4])
def test_the_gradient_pulls_towards_the_optimal_step(gaussian: Tensor, n_bits: int) -> None:
    """It nearly vanishes there; not quite, because the estimator takes the rounding residue for constant."""
    best = GOLDEN["uniform_midtread_full_zp0"]["N(0,1)"][str(n_bits)]["step"]
    found = []
    for factor in (0.7, 1.0, 1.3):
        step = torch.tensor(best * factor, dtype=torch.float64, requires_grad=True)
        (0.5 * (lsq_quantize(gaussian, step, n_bits) - gaussian).square()).mean().backward()
        found.append(step.grad.item())
    assert found[0] < 0 < found[2]
    assert abs(found[1]) < 0.15 * abs(found[0])


def test_gradient_scale_counts_the_group_or_the_sample() -> None:
    x = torch.randn(8, 3, 5)
    found = {}
    for per_sample in (False, True):
        quantizer = LSQQuantizer(4, per_sample=per_sample)
        quantizer.pre_observe(x)
        quantizer(x).sum().backward()
        found[per_sample] = float(quantizer.step.grad)
    assert found[True] == pytest.approx(found[False] * 8**0.5, rel=1e-5)
    assert tq.make_quantizer("lsq:4,signed=false", site="output").per_sample
    assert not tq.make_quantizer("lsq:4/channel").per_sample


def test_only_the_first_tensor_sets_the_step_until_reset() -> None:
    quantizer = LSQQuantizer(4)
    quantizer.pre_observe(torch.randn(100))
    before = quantizer.step.item()
    quantizer.pre_observe(torch.randn(100) * 50)
    assert quantizer.step.item() == before
    quantizer.reset()
    assert not quantizer.is_ready
    quantizer.pre_observe(torch.randn(100) * 50)
    assert quantizer.step.item() > 10 * before


def test_a_step_driven_below_zero_stays_positive_and_comes_back() -> None:
    quantizer = LSQQuantizer(4)
    x = torch.randn(100)
    quantizer.pre_observe(x)
    with torch.no_grad():
        quantizer.step.fill_(-1.0)
    y = quantizer(x)
    assert y.isfinite().all()
    assert bool((quantizer.levels().diff() > 0).all())
    (y - x).square().sum().backward()
    assert float(quantizer.step.grad) < 0  # a descent step makes it larger


def test_an_optimizer_made_before_the_first_batch_trains_the_steps_of_a_wrapper() -> None:
    torch.manual_seed(0)
    text = "lsq:8,init=paper/channel"  # a bad start: many times the least error
    layer = tq.QWrapper(nn.Linear(64, 8), tq.make_quantizer(text), tq.make_quantizer("lsq:4", site="output"))
    group = tq.quantizer_parameters(layer)
    assert [tuple(p.shape) for p in group["params"]] == [(8,), (1,)]
    optimizer = torch.optim.Adam([group | {"lr": 1e-4}])
    x = torch.randn(256, 64)
    target = layer(x).detach()
    tq.set_qmodule_state(layer, tq.QModuleState.QUANT_AWARE_TRAIN_WEIGHT_ONLY)
    losses = []
    for _ in range(60):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    tq.set_qmodule_state(layer, tq.QModuleState.QUANT_AWARE_TRAIN)
    layer(x)
    step = layer.weight_quantizer.step
    assert not torch.allclose(step, layer.weight_quantizer.initial_step)
    fresh = tq.QWrapper(nn.Linear(64, 8), tq.make_quantizer(text), tq.make_quantizer("lsq:4", site="output"))
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), layer(x))


def test_exports_as_a_uniform_grid() -> None:
    quantizer = tq.make_quantizer("lsq:8/channel")
    w = torch.randn(4, 9)
    quantizer.pre_observe(w)
    delta, zero_point, qmin, qmax = quantizer.affine_params()
    assert (zero_point, qmin, qmax) == (0, -128, 127)
    assert torch.equal((w / delta[:, None]).round().clamp(qmin, qmax) * delta[:, None], quantizer(w))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lsq:1", "from 2 to 12 .signed., got 1"),
        ("lsq:12,signed=false", "from 1 to 11 .unsigned., got 12"),
        ("lsq:4,init=guess", "init must be one of mse, paper"),
        ("lsq:4@clipped", "lsq has its own gradient"),
    ],
)
def test_bad_arguments(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tq.make_quantizer(text)
