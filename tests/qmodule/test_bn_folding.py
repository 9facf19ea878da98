"""Batch-norm folding: golden numbers and the identities of docs/algorithms.md D2, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import torchquant as tq
from tests.oracles import GOLDEN
from torchquant.errors import ConfigError
from torchquant.qmodule.bn_folding import FOLD_MODES
from torchquant.quantizers import Quantizer
from torchquant.quantizers_functional.bn_fold import channel_view

TRAIN = tq.QModuleState.QUANT_AWARE_TRAIN


class Identity(Quantizer):
    """Quantizes to the value itself: what is left is the arithmetic of folding."""

    def quantize(self, x: Tensor) -> Tensor:
        return x


LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), nn.BatchNorm1d, (9, 6)),
    "linear-no-bias": (lambda: nn.Linear(6, 4, bias=False), nn.BatchNorm1d, (9, 6)),
    "conv1d": (lambda: nn.Conv1d(6, 4, 3, padding=1), nn.BatchNorm1d, (3, 6, 8)),
    "conv2d": (lambda: nn.Conv2d(6, 4, 3, dilation=2, padding=2, padding_mode="reflect"), nn.BatchNorm2d, (3, 6, 8, 8)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, bias=False), nn.BatchNorm2d, (3, 4, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2), nn.BatchNorm3d, (2, 2, 4, 4, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(6, 4, 3, stride=2, output_padding=1), nn.BatchNorm2d, (3, 6, 5, 5)),
    "transposed-groups": (lambda: nn.ConvTranspose2d(6, 4, 3, groups=2), nn.BatchNorm2d, (3, 6, 5, 5)),
}


def make(name: str, fold: bool | str, quantizer: Quantizer | None = None) -> tuple[tq.QWrapper, nn.Sequential, Tensor]:
    """(wrapper, the same float layers, input) in float64, with a batch norm that is not at its start."""
    layer, bn_type, shape = LAYERS[name]
    layers = [layer(), bn_type(4), nn.ReLU()]
    layers[1].weight.data = torch.tensor([1.5, -0.7, 0.3, 2.0])
    layers[1].bias.data = torch.randn(4)
    layers[1].running_mean = torch.randn(4)
    layers[1].running_var = torch.rand(4) + 0.2
    plain = nn.Sequential(*copy.deepcopy(layers)).double()
    wrapper = tq.QWrapper(layers, quantizer or Identity(), None, fold_bn=fold).double()
    return wrapper, plain, torch.randn(shape, dtype=torch.float64)


def close(a: Tensor, b: Tensor) -> bool:
    return float((a - b).detach().abs().max()) < 1e-10


def test_fold_golden() -> None:
    golden = GOLDEN["golden"]["bn_fold"]
    layer, bn = nn.Linear(3, 2).double(), nn.BatchNorm1d(2, eps=golden["eps"]).double()
    values = {"weight": "gamma", "bias": "beta", "running_mean": "mean", "running_var": "var"}
    for ours, theirs in values.items():
        getattr(bn, ours).data = torch.tensor(golden[theirs], dtype=torch.float64)
    layer.weight.data = torch.tensor(golden["W"], dtype=torch.float64)
    layer.bias.data = torch.tensor(golden["b"], dtype=torch.float64)
    folded = tq.QWrapper([layer, bn], None, None).fold()
    assert close(folded.weight, torch.tensor(golden["W_fold"], dtype=torch.float64))
    assert close(folded.bias, torch.tensor(golden["b_fold"], dtype=torch.float64))
    x = torch.tensor([golden["x"]], dtype=torch.float64)
    assert close(folded(x), torch.tensor([golden["y_bn"]], dtype=torch.float64))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("mode", FOLD_MODES)
def test_eval_and_frozen_equal_batch_norm_in_eval(name: str, mode: str) -> None:
    wrapper, plain, x = make(name, mode)
    tq.set_qmodule_state(wrapper, TRAIN)
    expected = plain.eval()(x)
    assert close(wrapper.eval()(x), expected)
    wrapper.freeze_bn()
    assert close(wrapper.train()(x), expected)
    assert close(wrapper.activation(wrapper.fold()(x)), expected)
    assert torch.equal(wrapper.bn.running_mean, plain[1].running_mean)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("mode", ["batch", "corrected", "rescale", True])
def test_train_equals_batch_norm_in_train_with_its_gradients(name: str, mode: bool | str) -> None:
    wrapper, plain, x = make(name, mode)
    tq.set_qmodule_state(wrapper, TRAIN)
    ours, theirs = wrapper.train()(x), plain.train()(x)
    assert close(ours, theirs)
    upstream = torch.randn_like(ours)
    ours.backward(upstream)
    theirs.backward(upstream)
    for a, b in zip([wrapper.layer, wrapper.bn], [plain[0], plain[1]], strict=True):
        for (key, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
            # The batch statistics cancel a bias before batch norm: its gradient is zero up to rounding.
            assert close(p.grad, q.grad), key


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("mode", FOLD_MODES)
def test_running_statistics_move_as_in_the_float_model(name: str, mode: str) -> None:
    wrapper, plain, x = make(name, mode)
    tq.set_qmodule_state(wrapper, TRAIN)
    for step in range(3):
        wrapper.train()(x + step)
        plain.train()(x + step)
    assert close(wrapper.bn.running_mean, plain[1].running_mean)
    assert close(wrapper.bn.running_var, plain[1].running_var)
    assert int(wrapper.bn.num_batches_tracked) == int(plain[1].num_batches_tracked)
    assert close(wrapper.eval()(x), plain.eval()(x))


@pytest.mark.parametrize("name", ["conv2d", "transposed-groups", "linear"])
@pytest.mark.parametrize("mode", FOLD_MODES)
def test_the_quantized_weight_is_the_folded_one(name: str, mode: str) -> None:
    """In eval the output is exactly that of the folded layer with its weight quantized."""
    quantizer = tq.AffineQuantizer(4, tq.BatchMinMax(axis=0), "narrow")
    wrapper, _, x = make(name, mode, quantizer)
    with tq.qmodule_state(wrapper, tq.QModuleState.CALIBRATION):
        wrapper.eval()(x)
    folded = wrapper.fold()
    check = tq.AffineQuantizer(4, tq.BatchMinMax(axis=0), "narrow").double()
    rows = wrapper.float_weight()
    check.pre_observe(rows)
    expected = tq.QWrapper([folded, nn.ReLU()], check, None)
    with tq.qmodule_state(wrapper, tq.QModuleState.QUANT_EVAL), tq.qmodule_state(expected, tq.QModuleState.QUANT_EVAL):
        assert close(wrapper(x), expected(x))
        assert not close(wrapper(x), folded(x).relu())


def test_rescale_runs_the_layer_once_a_step_and_the_others_twice() -> None:
    for mode in FOLD_MODES:
        wrapper, _, x = make("linear", mode)
        tq.set_qmodule_state(wrapper, TRAIN)
        runs = 0

        class Count(TorchFunctionMode):
            def __torch_function__(
                self, func: object, types: object, args: tuple = (), kwargs: object = None
            ) -> object:
                nonlocal runs
                runs += func is nn.functional.linear
                return func(*args, **(kwargs or {}))

        with Count():
            wrapper.train()(x)
        assert runs == (1 if mode == "rescale" else 2), mode


@pytest.mark.parametrize("name", LAYERS)
def test_rescale_has_the_gradients_of_what_it_computes(name: str) -> None:
    """The weight lies on a coarse grid, so that the gradients of folding and of its division do not cancel."""
    found = []
    for direct in (False, True):
        torch.manual_seed(0)
        quantizer = tq.AffineQuantizer(2, tq.BatchMinMax(axis=0), "narrow", gradient_clip=True)
        wrapper, _, x = make(name, "rescale", quantizer)
        tq.set_qmodule_state(wrapper, TRAIN)
        if direct:
            factor = wrapper.bn.weight / (wrapper.bn.running_var.clone() + wrapper.bn.eps).sqrt()
            y = wrapper._run(x, factor, None) / channel_view(factor, x.ndim)
            bias = wrapper.bias_in_use
            y = wrapper.bn(y if bias is None else y + channel_view(bias, x.ndim)).relu()
        else:
            y = wrapper.train()(x)
        y.backward(torch.linspace(-1.0, 1.0, y.numel(), dtype=y.dtype).view(y.shape))
        found.append([y, wrapper.bn.weight.grad, wrapper.layer.weight.grad])
    assert all(map(close, *found))


def test_gamma_zero_stays_finite_in_rescale() -> None:
    wrapper, plain, x = make("conv2d", "rescale")
    for bn in (wrapper.bn, plain[1]):
        bn.weight.data[1] = 0.0
    tq.set_qmodule_state(wrapper, TRAIN)
    assert close(wrapper.train()(x), plain.train()(x))


def test_states_that_do_not_quantize_weights_run_the_plain_layers_bit_for_bit() -> None:
    for state in (tq.QModuleState.BYPASSED, tq.QModuleState.CALIBRATION):
        wrapper, plain, x = make("conv2d", True)
        with tq.qmodule_state(wrapper, state):
            assert torch.equal(wrapper.train()(x), plain.train()(x))
            assert torch.equal(wrapper.eval()(x), plain.eval()(x))


def test_freezing_survives_train_and_the_checkpoint() -> None:
    wrapper, _, x = make("conv2d", True)
    tq.freeze_bn(nn.Sequential(wrapper))
    wrapper.train()
    before = wrapper.bn.running_mean.clone()
    wrapper(x)
    assert torch.equal(wrapper.bn.running_mean, before)
    other, _, _ = make("conv2d", True)
    other.load_state_dict(wrapper.state_dict(), strict=True)
    assert not other.train().bn.training
    tq.freeze_bn(wrapper, frozen=False)
    assert wrapper.train().bn.training


def test_loading_a_checkpoint_leaves_train_and_eval_of_the_batch_norm_alone() -> None:
    wrapper, _, _ = make("conv2d", True)
    wrapper.train().bn.eval()
    wrapper.load_state_dict(wrapper.state_dict(), strict=True)
    assert not wrapper.bn.training


def test_what_cannot_be_folded_is_refused() -> None:
    with pytest.raises(ConfigError, match="track_running_stats=False has nothing to fold"):
        tq.QWrapper([nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2, track_running_stats=False)], None, None, fold_bn=True)
    with pytest.raises(ConfigError, match="one of running, batch, corrected, rescale, got 'folded'"):
        tq.QWrapper([nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)], None, None, fold_bn="folded")
    with pytest.raises(ConfigError, match="2 output channels, its batch norm 3"):
        tq.QWrapper([nn.Conv2d(1, 2, 1), nn.BatchNorm2d(3)], None, None, fold_bn=True)


def test_a_linear_whose_batch_norm_runs_along_another_axis_is_not_folded() -> None:
    wrapper = tq.QWrapper([nn.Linear(6, 4), nn.BatchNorm1d(4)], Identity(), None, fold_bn=True).eval()
    assert wrapper(torch.randn(2, 4, 6)).shape == (2, 4, 4)
    with tq.qmodule_state(wrapper, TRAIN), pytest.raises(ConfigError, match=r"for inputs \(N, features\) only"):
        wrapper(torch.randn(2, 4, 6))
