"""`convert` covers every layer that torchquant can quantize, and says what stays float."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchquant.compat import autoqnn
from torchquant.compat.autoqnn.core import QuantLayer, convert
from torchquant.errors import ConfigError, StaysFloatWarning
from torchquant.quantizers import Quantizer


class OwnWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.mix


class Named(nn.Linear):
    pass


class Text(nn.Module):
    """Every kind of layer, on tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.lstm, self.gru, self.rnn = (kind(8, 8, batch_first=True) for kind in (nn.LSTM, nn.GRU, nn.RNN))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.own = OwnWeight()
        self.both = nn.Bilinear(8, 8, 8)
        self.last = Named(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for recurrent in (self.lstm, self.gru, self.rnn):
            x = recurrent(x)[0]
        x = self.own(self.norm(self.attention(x, x, x)[0]))
        return self.last(self.both(x, x))


LAYERS = ["embedding", "lstm", "gru", "rnn", "attention", "both", "last"]
TOKENS = torch.tensor([[1, 2, 3], [4, 5, 9]])


def given(**more: Quantizer) -> dict[str, Any]:
    quantizers = autoqnn.quantizers
    return {"weight_quant": quantizers.VecQ(3), "act_quant": quantizers.FixedQuantAct(8), **more}


def test_every_layer_is_converted_and_trains(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.warns(StaysFloatWarning, match=r"convert leaves float: own.mix \(a weight that no layer owns"):
        model = convert(Text(), quantize_config_dict=given())
    said = capsys.readouterr().out
    assert "own.mix" in said
    assert "a normalization stays float" in said
    assert [site.path for site in model.plan.sites] == LAYERS
    assert [(left.path, left.type) for left in model.plan.floats] == [
        ("norm", "LayerNorm"),
        ("own.mix", "OwnWeight.mix"),
    ]
    assert "<VecQ:3>" in str(model.plan)
    model(TOKENS).square().sum().backward()
    for path in LAYERS:
        layer = model.get_submodule(path)
        assert isinstance(layer, QuantLayer)
        for slot in layer.weight_slots():
            assert len(slot.quantizer(slot.seen()).unique()) <= 8
            assert slot.weight.grad is not None
    assert model.last.act_quant.n_bits == 8
    assert list(model.lstm.weight_quant) == ["weight_ih_l0", "weight_hh_l0"]
    assert type(model.embedding).__name__ == "Embedding"
    model.eval()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(TOKENS), model(TOKENS))


def test_what_no_quantizer_reaches_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    bias = autoqnn.quantizers.FixedQuant(8)
    with pytest.warns(StaysFloatWarning, match="lstm .its biases stay float: bias_quant quantizes those of conv"):
        convert(Text(), quantize_config_dict=given(bias_quant=bias))
    with pytest.warns(StaysFloatWarning, match=r"float: 0 \(no quantizer is given for it"):
        convert(nn.Sequential(nn.Embedding(3, 3)), quantize_config_dict={"act_quant": bias})
    with pytest.warns(StaysFloatWarning, match="found no layer to quantize: all of the model stays float"):
        convert(nn.ReLU(), quantize_config_dict=given())
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), quantize_config_dict=given())
        assert capsys.readouterr().out == ""
        convert(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), quantize_config_dict=given())
        assert "1           BatchNorm1d  a normalization stays float" in capsys.readouterr().out
        convert(
            nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.LSTM(2, 2)}),
            {nn.Linear: autoqnn.modules.Linear},
            False,
            given(),
        )
    assert "b           LSTM  its class is not in the mapping" in capsys.readouterr().out


def test_a_mapping_takes_a_class_of_the_user() -> None:
    class Counted(autoqnn.modules.Linear):
        calls = 0

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return super().forward(*args, **kwargs)

    model = convert(nn.Sequential(nn.Linear(4, 4)), {nn.Linear: Counted}, quantize_config_dict=given())
    model(torch.randn(2, 4))
    assert (type(model[0]), model[0].calls) == (Counted, 1)


def test_layers_by_hand() -> None:
    quantizers = autoqnn.quantizers
    layer = autoqnn.modules.Linear(
        4, 3, weight_quant=quantizers.VecQ(4), act_quant=quantizers.VecQAct(2), pre_act_quant=False
    )
    assert len(layer(torch.randn(50, 4)).unique()) <= 4
    assert not layer.pre_act_quant
    layer.weight_quant, layer.act_quant = quantizers.uL2Q(2, per_channel=True), quantizers.VecQAct(3)
    layer.bias_quant = quantizers.FixedQuant(8)
    assert 4 < len(layer(torch.randn(500, 4)).unique()) <= 8
    assert layer.weight_quant.get()[0].shape == (3,)
    with pytest.raises(ConfigError, match=r"weight_quant must be a quantizer, got None; Quantization\(\) quantizes"):
        layer.weight_quant = None
    conv = nn.Conv2d(3, 4, 3)
    made = autoqnn.modules.Conv2d.from_module(conv)
    x = torch.randn(1, 3, 5, 5)
    assert torch.equal(made(x), conv(x))
    made.weight_quant = quantizers.FixedQuant(2)
    made(x)
    assert len(made.weight_quant(made.layer.weight).unique()) <= 4
    with pytest.raises(ConfigError, match="Conv2d holds a Conv2d, got Linear"):
        autoqnn.modules.Conv2d.from_module(nn.Linear(2, 2))
    cell = autoqnn.modules.LSTMCell(4, 4, weight_quant=quantizers.VecQ(4), act_quant=quantizers.VecQAct(8))
    cell(torch.randn(2, 4))[0].sum().backward()
    assert sorted(cell.weight_quant) == ["weight_hh", "weight_ih"]
