"""Transformer layers of torch, whose fused paths in evaluation read weights past the modules that quantize them."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchquant as tq
from torchquant import QModuleState as S
from torchquant.qmodule import QWrapper

WEIGHTS = [{"weight": "affine:8,symmetric=narrow/channel"}]
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


def layer(**changes: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, **changes)


def rounded(weight: Tensor) -> Tensor:
    """8 bits, symmetric, narrow, a scale a row."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round().clamp(-127, 127) * scale


def with_rounded_weights(net: nn.Module) -> nn.Module:
    net = copy.deepcopy(net)
    for name, parameter in net.named_parameters():
        if "weight" in name and "norm" not in name:
            parameter.data = rounded(parameter.data)
    return net


NETS = {
    "layer": lambda: layer(),
    "norm first": lambda: layer(norm_first=True, activation="gelu"),
    "encoder": lambda: nn.TransformerEncoder(layer(), 2),
    "encoder in a net": lambda: nn.ModuleDict({"encoder": nn.TransformerEncoder(layer(), 1)})["encoder"],
}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_quantized_in_every_state_and_the_float_model_when_bypassed(name: str, with_mask: bool) -> None:
    torch.manual_seed(0)
    net, x = NETS[name]().eval(), torch.randn(4, 5, 16)
    mask = torch.arange(5).expand(4, 5) >= torch.tensor([[5], [3], [4], [5]])
    masks = {"src_key_padding_mask": mask} if with_mask else {}
    model = tq.quantize(net, WEIGHTS, x)
    assert torch.equal(model(x, **masks), net(x, **masks))
    with tq.qmodule_state(model, S.CALIBRATION):
        model(x, **masks)
    assert all(row.calibrated for row in tq.state_report(model))
    real = ~mask if with_mask else torch.ones(4, 5, dtype=torch.bool)
    expected = with_rounded_weights(net)(x, **masks)[real]
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with tq.qmodule_state(other, S.QUANT_EVAL):
            assert torch.allclose(other(x, **masks)[real], expected, atol=1e-5)
        assert torch.equal(other(x, **masks), net(x, **masks))


@pytest.mark.parametrize("preset", ["w8a8", "int8-ort"])
@torch.no_grad()
def test_a_whole_transformer(preset: str) -> None:
    torch.manual_seed(0)
    net = nn.Transformer(16, 2, 1, 1, 32, dropout=0.0, batch_first=True).eval()
    x, y = torch.randn(4, 5, 16), torch.randn(4, 3, 16)
    model = tq.quantize(net, preset, (x, y))
    assert torch.equal(model(x, y), net(x, y))
    with tq.qmodule_state(model, S.CALIBRATION):
        model(x, y)
    assert all(row.calibrated for row in tq.state_report(model))
    with tq.qmodule_state(model, S.QUANT_EVAL):
        error = (model(x, y) - net(x, y)).square().mean() / net(x, y).square().mean()
    assert 1e-7 < error < 1e-2


@torch.no_grad()
def test_a_layer_wrapped_by_hand() -> None:
    net, x = layer().eval(), torch.randn(4, 5, 16)
    expected = net(x)
    net.linear1 = QWrapper(net.linear1, tq.make_quantizer("affine:2/channel"), None)
    assert torch.equal(net(x), expected)
    tq.set_qmodule_state(net, S.CALIBRATION)
    net(x)
    tq.set_qmodule_state(net, S.QUANT_EVAL)
    assert not torch.allclose(net(x), expected, atol=1e-3)


@torch.no_grad()
def test_compiled_exported_and_reverted() -> None:
    net, x = layer().eval(), torch.randn(4, 5, 16)
    plan = tq.QuantPlan.from_rules(WEIGHTS, net)
    model = plan.apply(copy.deepcopy(net))
    tq.observe_weights(model)
    tq.set_qmodule_state(model, S.QUANT_EVAL)
    expected = model(x)
    assert torch.allclose(torch.compile(model, fullgraph=True, backend="eager")(x), expected, atol=1e-6)
    assert torch.allclose(torch.export.export(model, (x,)).module()(x), expected, atol=1e-6)
    float_model = plan.revert(model)
    assert type(float_model.activation_relu_or_gelu) is int
    assert torch.equal(float_model(x), net(x))


def test_attributes_of_attention_are_read_through_the_wrapper() -> None:
    attention = nn.MultiheadAttention(8, 2)
    model = tq.quantize(nn.ModuleList([attention, nn.Linear(8, 8)]), WEIGHTS)
    assert model[0]._qkv_same_embed_dim is True
    assert model[0].in_proj_weight.shape == (24, 8)
    assert model[0].out_proj.weight is model.get_parameter("0.out_proj.weight")
    with pytest.raises(AttributeError, match="_no_such_thing"):
        _ = model[0]._no_such_thing
