"""Hooks that a file would not run are refused by name; hooks and parametrizations that compute weights are not."""

import pytest
import torch
from torch import nn

import torchquant as tq
from torchquant import AffineQuantizer, BatchMinMax, QOp, QWrapper
from torchquant import QModuleState as S
from torchquant.deploy import runtime_exact, to_integer
from torchquant.deploy.lowering.deploy_form import deploy_form
from torchquant.errors import ExportError

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def quantized(net):
    model = tq.quantize(net.eval(), "int8-ort", X)
    with torch.no_grad(), tq.qmodule_state(model, S.CALIBRATION):
        model(X)
    tq.set_qmodule_state(model, S.QUANT_EVAL)
    return model


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))


def double(module, args, output):
    return 2 * output


@pytest.mark.parametrize("name", ["0", "0.layer", "0.bn", "4"])
def test_a_hook_that_the_file_would_not_run_is_refused(name):
    model = quantized(small_net())
    handle = model.get_submodule(name).register_forward_hook(double)
    with pytest.raises(ExportError, match=rf"^{name[0]}: .* has forward hooks \(double\).*remove\(\)"):
        deploy_form(model)
    handle.remove()
    assert deploy_form(model)(X).shape == (4, 2)


def test_hooks_of_operators_are_refused_and_those_of_float_modules_are_kept():
    op = QOp(torch.neg, AffineQuantizer(8, BatchMinMax()))
    model = nn.Sequential(QWrapper(nn.Conv2d(3, 2, 1), AffineQuantizer(8, BatchMinMax()), None), nn.Flatten(), op)
    with torch.no_grad(), tq.qmodule_state(model, S.CALIBRATION):
        model(X)
    model[1].register_forward_hook(double)
    with torch.no_grad(), tq.qmodule_state(model, S.QUANT_EVAL):
        assert torch.equal(deploy_form(model)(X), model(X))
    op.register_forward_pre_hook(lambda module, args: None)
    with pytest.raises(ExportError, match="^2: the operator has forward hooks"):
        deploy_form(model)


def test_a_simulation_with_the_runtime_s_numbers_is_no_hindrance():
    model = quantized(small_net())
    with torch.no_grad(), runtime_exact(model, X):
        assert torch.equal(model(X), to_integer(model, X)(X))


def test_parametrized_weights_are_in_the_form():
    net = small_net()
    nn.utils.parametrizations.weight_norm(net[0])
    model = quantized(net)
    with torch.no_grad():
        torch.testing.assert_close(deploy_form(model)(X), model(X))


def test_what_cannot_be_copied_says_what_to_do():
    """A tensor that was computed has a history, which torch does not copy."""
    model = nn.Sequential(QWrapper(nn.Linear(3, 2), AffineQuantizer(8, BatchMinMax()), None))
    model.weight = torch.ones(2, requires_grad=True) * 2
    with pytest.raises(ExportError, match="the model cannot be copied: Only Tensors .* with remove_weight_norm"):
        deploy_form(model)
