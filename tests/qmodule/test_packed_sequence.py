"""What recurrent and other modules of many weights take and give in structures is quantized, or refused by name."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import torchquant as tq
from torchquant import QModuleState as S
from torchquant.errors import UnsupportedPatternError
from torchquant.qmodule import QOp, QWeights
from torchquant.qmodule.weights import weight_names

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections")  # torch says which kernel it takes
LENGTHS = torch.tensor([3, 5, 1, 4])
LAYERS = {
    "LSTM": lambda: nn.LSTM(4, 6),
    "GRU": lambda: nn.GRU(4, 6, num_layers=2, batch_first=True),
    "RNN": lambda: nn.RNN(4, 6, nonlinearity="relu", bias=False, batch_first=True),
    "projected": lambda: nn.LSTM(4, 6, num_layers=2, proj_size=3, batch_first=True),
    "both directions": lambda: nn.LSTM(4, 6, num_layers=2, proj_size=3, bidirectional=True, batch_first=True),
}


def quantized(layer, acts="affine:8", weight="affine:8/channel"):
    names = weight_names(layer)
    made = {name: tq.make_quantizer(weight, "weight") for name in names}
    return QWeights(layer, made, tq.make_quantizer(acts, "output"), tq.make_quantizer(acts, "input"))


def padded(batch_first):
    x = torch.randn(4, 5, 4)
    return x if batch_first else x.transpose(0, 1)


def pack(x, layer, enforce_sorted=False):
    return pack_padded_sequence(x, LENGTHS, batch_first=layer.batch_first, enforce_sorted=enforce_sorted)


def unpack(y, layer):
    return pad_packed_sequence(y, batch_first=layer.batch_first)[0]


@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_a_packed_sequence_is_quantized(kind):
    torch.manual_seed(0)
    layer = LAYERS[kind]().eval()
    module = quantized(layer)
    packed = pack(padded(layer.batch_first), layer)
    expected, states = layer(packed)
    got, _ = module(packed)
    assert torch.equal(got.data, expected.data)
    with tq.qmodule_state(module, S.CALIBRATION):
        assert torch.equal(module(packed)[0].data, expected.data)
    assert all(quantizer.is_ready for quantizer in module.quantizers().values())
    low, high = module.input_quantizer.observer.get_ranges()
    assert (float(low), float(high)) == (min(float(packed.data.min()), 0.0), max(float(packed.data.max()), 0.0))
    with tq.qmodule_state(module, S.QUANT_EVAL):
        got, _ = module(packed)
    assert isinstance(got, PackedSequence)
    assert all(torch.equal(a, b) for a, b in zip(got[1:], packed[1:], strict=True))
    assert not torch.equal(got.data, expected.data)
    assert torch.equal(module.acts_quantizer(got.data), got.data)
    for name, weight, quantizer in module.weights():  # the same by hand: every weight, the first input, the last output
        layer.get_parameter(name).copy_(quantizer(weight))
    by_hand = layer(packed._replace(data=module.input_quantizer(packed.data)))[0].data
    assert torch.equal(got.data, module.acts_quantizer(by_hand))


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if kind != "both directions"])
@torch.no_grad()
def test_packed_and_padded_are_the_same_within_the_lengths(kind):
    torch.manual_seed(1)
    layer = LAYERS[kind]().eval()
    module = quantized(layer)
    x = padded(layer.batch_first)
    with tq.qmodule_state(module, S.CALIBRATION):
        module(x)
    for state in S:
        with tq.qmodule_state(module, state):
            if state.is_act_observed or state.is_weight_observed:
                continue
            y, plain = unpack(module(pack(x, layer))[0], layer), module(x)[0]
            y, plain = (t if layer.batch_first else t.transpose(0, 1) for t in (y, plain))
            for row, n in enumerate(LENGTHS):
                torch.testing.assert_close(y[row, :n], plain[row, :n])


def test_a_packed_sequence_trains():
    torch.manual_seed(2)
    module = quantized(nn.LSTM(4, 6), "lsq:4", "lsq:4/channel")
    packed = pack_padded_sequence(torch.randn(5, 4, 4, requires_grad=True), LENGTHS, enforce_sorted=False)
    tq.set_qmodule_state(module, S.QUANT_AWARE_TRAIN)
    module(packed)[0].data.square().sum().backward()
    assert all(p.grad is not None for p in module.parameters())


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 6, 2, batch_first=True)
        self.head = nn.Linear(6, 2)

    def forward(self, x, lengths):
        y, _ = self.lstm(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
        return self.head(pad_packed_sequence(y, batch_first=True)[0])


@torch.no_grad()
def test_a_model_that_packs():
    x = torch.randn(4, 5, 4)
    model = tq.quantize(Tagger().eval(), "w8a8", (x, LENGTHS))
    assert isinstance(model.lstm, QWeights)
    with tq.qmodule_state(model, S.CALIBRATION):
        model(x, LENGTHS)
    assert all(row.calibrated for row in tq.state_report(model))
    assert [r.site for r in tq.state_report(model) if r.path == "lstm"][:4] == weight_names(nn.LSTM(1, 1, 2))


@torch.no_grad()
def test_inputs_by_name_and_further_ones_are_quantized():
    torch.manual_seed(3)
    a, b, c = (torch.randn(1, 3, 4) * scale for scale in (1, 2, 3))
    module = quantized(nn.MultiheadAttention(4, 2, batch_first=True).eval())
    with tq.qmodule_state(module, S.CALIBRATION):
        module(a, b, value=c)
    assert float(module.input_quantizer.observer.get_ranges()[1]) == max(float(t.max()) for t in (a, b, c))
    with tq.qmodule_state(module, S.QUANT_EVAL_ACT_ONLY):
        got = module(a, key=b, value=c)[0]
    expected = module.layer(*map(module.input_quantizer, (a, b, c)))[0]
    assert torch.equal(got, module.acts_quantizer(expected))
    seen = []
    module.input_quantizer.register_forward_hook(lambda *given: seen.append(given))
    with tq.qmodule_state(module, S.QUANT_EVAL):
        module(a, a, a)
    assert len(seen) == 1
    cell = quantized(nn.GRUCell(4, 3))
    with tq.qmodule_state(cell, S.CALIBRATION):
        cell(input=a[0], hx=torch.full((3, 3), 9.0))
    assert float(cell.input_quantizer.observer.get_ranges()[1]) == float(a.max())


@pytest.mark.parametrize("structure", [lambda x: (x, 2 * x), lambda x: {"out": x}, lambda x: [[x]]])
def test_tensors_in_a_structure_are_refused_by_name(structure):
    model = nn.Sequential(QOp(structure, tq.make_quantizer("affine:8", "output")))
    x = torch.randn(3)
    model(x)
    with tq.qmodule_state(model, S.CALIBRATION), pytest.raises(UnsupportedPatternError, match="^0: its output is a"):
        model(x)


def test_sizes_pass():
    op = QOp(lambda x: x.shape, tq.make_quantizer("affine:8", "output"))
    with tq.qmodule_state(op, S.CALIBRATION):
        assert op(torch.randn(2, 3)) == (2, 3)
