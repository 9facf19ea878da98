"""A quantizer between a layer and its activation: integer kernels of convolutions want codes right behind them."""

from __future__ import annotations

import pickle
from collections import Counter

import pytest
import torch
from torch import nn

from torchquant import QModuleState, QuantPlan, QWrapper, make_quantizer, qmodule_state, quantize
from torchquant.deploy import certify, export_onnx
from torchquant.errors import ConfigError

CONV = {"types": ["Conv2d"], "weight": "affine:8,symmetric=narrow/channel", "input": "affine:8", "output": "affine:8"}


def wrapper():
    torch.manual_seed(0)
    weight, acts, before = make_quantizer("affine:8/channel"), *(make_quantizer("affine:4", "output") for _ in range(2))
    return QWrapper([nn.Conv2d(2, 4, 3), nn.PReLU(4)], weight, acts, preactivation_quantizer=before)


def calibrated(model, x):
    with torch.no_grad(), qmodule_state(model, QModuleState.CALIBRATION):
        model(x)
    return model


def test_what_goes_into_the_activation_is_observed_and_quantized():
    x = torch.randn(2, 2, 6, 6)
    model = calibrated(wrapper(), x)
    before, conv, act = model.preactivation_quantizer, model.layer, model.activation
    sums = conv(x)
    assert (before.observer.range_min, before.observer.range_max) == (sums.min(), sums.max())
    assert torch.equal(model(x), act(sums))
    with qmodule_state(model, QModuleState.QUANT_EVAL_ACT_ONLY):
        assert torch.equal(model(x), model.acts_quantizer(act(before(sums))))
    with qmodule_state(model, QModuleState.QUANT_AWARE_TRAIN):
        assert torch.autograd.grad(model(x).sum(), conv.weight)[0].any()


def test_it_compiles_and_has_a_state_of_its_own():
    x = torch.randn(2, 2, 6, 6)
    model = calibrated(wrapper(), x)
    fresh = wrapper()
    fresh.load_state_dict(model.state_dict(), strict=True)
    for state in (QModuleState.QUANT_EVAL, QModuleState.BYPASSED):
        with qmodule_state(model, state), qmodule_state(fresh, state):
            assert torch.equal(fresh(x), model(x))
            found = torch.compile(model, fullgraph=True, backend="eager")(x)
            assert torch.equal(found, model(x))
            assert torch.equal(torch.export.export(model, (x,)).module()(x), found)


def test_a_pickle_from_before_there_was_one_runs():
    model = QWrapper([nn.Conv2d(2, 4, 3), nn.PReLU()], None, None)
    del model.preactivation_quantizer
    assert pickle.loads(pickle.dumps(model))(torch.randn(1, 2, 4, 4)).shape == (1, 4, 2, 2)


def test_it_needs_an_activation_that_no_quantizer_does():
    with pytest.raises(ConfigError, match="a preactivation is quantized before an activation; give an activation too"):
        QWrapper(nn.Conv2d(2, 4, 3), None, None, preactivation_quantizer=make_quantizer("affine:8", "output"))
    with pytest.raises(
        ConfigError, match="rule 1 sets preactivation, but site '0' .* takes weight, input, output, bias"
    ):
        quantize(nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU()), [{"preactivation": "affine:8"}])


def test_a_plan_holds_it(tmp_path):
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.SiLU())
    plan = QuantPlan.from_rules([{**CONV, "preactivation": "affine:6"}], net)
    assert plan.sites[0].preactivation == "affine:6"
    assert "preactivation" in str(plan).splitlines()[0]
    again = QuantPlan.load(plan.save(tmp_path / "plan.yaml"))
    assert again == plan
    assert again.apply(net)[0].preactivation_quantizer.n_bits == 6


def test_a_norm_with_an_activation_of_its_own_has_it_too():
    layers = pytest.importorskip("timm.layers")
    net = nn.Sequential(nn.Conv2d(2, 4, 3), layers.BatchNormAct2d(4, act_layer=nn.SiLU), nn.Conv2d(4, 2, 1)).eval()
    x = torch.randn(2, 2, 6, 6)
    model = calibrated(quantize(net, "int8-ort", x), x)
    assert model.plan.sites[0].preactivation == "affine:8"
    assert (
        float(model[0].preactivation_quantizer.observer.range_min)
        < -1
        < float(model[0].acts_quantizer.observer.range_min)
    )


def test_the_ready_set_keeps_convolutions_in_integer_kernels(tmp_path):
    onnx, ort = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    activations = [nn.PReLU(8), nn.SiLU(), nn.GELU(), nn.Hardswish(), nn.LeakyReLU(), nn.Sigmoid(), nn.ELU(), nn.ReLU()]
    parts = [nn.Conv2d(8, 8, 3, padding=1) for _ in activations]
    net = nn.Sequential(*(layer for pair in zip(parts, activations, strict=True) for layer in pair), nn.Conv2d(8, 2, 1))
    x = torch.randn(2, 8, 8, 8)
    model = calibrated(quantize(net.eval(), "int8-ort", x), x)
    path = export_onnx(model, tmp_path / "model.onnx", x, verify=False)
    options = ort.SessionOptions()
    options.optimized_model_filepath = f"{path}.optimized"
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    kernels = Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)
    assert kernels["QLinearConv"] == 9
    assert not kernels["Conv"] + kernels["FusedConv"]
    assert certify(model, path, [(x,)]).passed
