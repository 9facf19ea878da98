"""Adapters (LoRA) on quantized layers take part in the forward, whoever puts them there and when, or are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchquant as tq
from torchquant.deploy import export_onnx
from torchquant.errors import ConfigError, ExportError, UnsupportedPatternError

S = tq.QModuleState
FINE = [{"weight": "affine:12,symmetric/channel", "output": "affine:12", "fold_bn": False}]
"""So fine that what quantizing does is far below what the adapter does."""


class Lora(nn.Module):
    """A layer as peft puts it in the place of another: with the other in it, and its tensors as properties."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base_layer = base
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.lora_a = nn.Linear(base.in_features, 2, bias=False)
            self.lora_b = nn.Linear(2, base.out_features, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_b(self.lora_a(x))


class Net(nn.Module):
    def __init__(self, bn: bool = False) -> None:
        super().__init__()
        self.fc1 = nn.Linear(8, 16)
        self.norm: nn.Module = nn.BatchNorm1d(16) if bn else nn.LayerNorm(16)
        self.fc2 = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.norm(self.fc1(x)))


def net(bn: bool = False) -> Net:
    torch.manual_seed(0)
    return Net(bn).eval()


def batch() -> Tensor:
    return torch.randn(64, 8, generator=torch.Generator().manual_seed(1))


def quantized(model: nn.Module, rules: Any = FINE) -> nn.Module:
    model = tq.quantize(model, rules, batch())
    return calibrated(model)


def calibrated(model: nn.Module) -> nn.Module:
    with tq.qmodule_state(model, S.CALIBRATION):
        model(batch())
    return model


def around(model: Any) -> None:
    model.fc1 = Lora(model.fc1)


def by_forward(model: Any) -> None:
    layer = model.fc1.layer if isinstance(model.fc1, tq.QWrapper) else model.fc1
    model.lora = Lora(layer)
    del model.lora.base_layer
    own, a, b = layer.forward, model.lora.lora_a, model.lora.lora_b
    layer.forward = lambda x: own(x) + b(a(x))


LATER = pytest.mark.filterwarnings("ignore:.*operators new in it stay float. fc1.lora_a")
"""Of an adapter that comes after the quantizers it is said that it stays float."""


@LATER
@pytest.mark.parametrize("put", [around, by_forward])
@pytest.mark.parametrize("is_first", [True, False])
def test_an_adapter_takes_part_in_every_state(put: Callable[[Any], None], is_first: bool) -> None:
    plain, adapted, x = net(), net(), batch()
    put(adapted)
    if is_first:
        model = quantized(adapted)
    else:
        model = quantized(net())
        put(model)
        calibrated(model)
    changed = (adapted(x) - plain(x)).abs().max()
    for state in S:
        with tq.qmodule_state(model, state), torch.no_grad():
            off = (model(x) - adapted(x)).abs().max()
        assert off < 0.02 * changed, state
        assert state is not S.BYPASSED or off == 0


@LATER
def test_the_gradient_reaches_an_adapter_on_a_quantized_layer() -> None:
    model: Any = quantized(net())
    model.fc1 = Lora(model.fc1)
    calibrated(model)
    with tq.qmodule_state(model, S.QUANT_EVAL):
        model(batch()).sum().backward()
    assert model.fc1.lora_a.weight.grad.any()
    assert model.fc1.lora_b.weight.grad.any()


def test_the_wrapped_layer_is_not_replaced_by_what_would_not_be_run() -> None:
    model: Any = quantized(net())
    with pytest.raises(UnsupportedPatternError, match=r"Lora cannot take the place of the Linear there.*model\.fc ="):
        model.fc1.layer = Lora(model.fc1.layer)
    with pytest.raises(UnsupportedPatternError, match="cannot take the place"):
        model.set_submodule("fc1.layer", nn.Conv1d(8, 16, 1))
    model.fc1.layer = nn.Linear(8, 16)  # is run, with its weight quantized

    lstm: Any = quantized(nn.LSTM(8, 4), [{"weight": "affine:8"}])
    with pytest.raises(UnsupportedPatternError, match="take the place of the LSTM"):
        lstm.layer = nn.Sequential(lstm.layer)


def test_a_weight_of_an_attention_that_an_adapter_computes_is_refused() -> None:

    attention: Any = tq.quantize(nn.MultiheadAttention(8, 2).eval(), [{"weight": "affine:8"}])
    attention.out_proj = Lora(attention.out_proj)
    tq.observe_weights(attention)
    x = torch.ones(3, 1, 8)
    with (
        tq.qmodule_state(attention, S.QUANT_EVAL_WEIGHT_ONLY),
        pytest.raises(UnsupportedPatternError, match="Lora computes its weight in a property"),
    ):
        attention(x, x, x)


def test_a_replaced_forward_is_not_folded_into_nor_exported(tmp_path: Any) -> None:
    folded = quantized(net(bn=True), [{"weight": "affine:8/channel", "fold_bn": True}])
    by_forward(folded)
    with tq.qmodule_state(folded, S.QUANT_EVAL_WEIGHT_ONLY), pytest.raises(ConfigError, match="fc1.*fold_bn=False"):
        folded(batch())
    model = quantized(net(), "w8a8")
    by_forward(model)
    tq.set_qmodule_state(model, S.QUANT_EVAL)
    with pytest.raises(ExportError, match="the forward of its layer was replaced"):
        export_onnx(model, tmp_path / "m.onnx", batch())
