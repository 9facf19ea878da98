"""Embeddings, recurrent layers and attention in files: their weights as codes, and the numbers of the simulation."""

import copy

import onnx
import pytest
import torch
from torch import nn

import torchquant as tq
from torchquant import QModuleState as S
from torchquant.deploy import certify, export_onnx, export_qonnx, runtime_exact, to_integer
from torchquant.deploy.lowering.deploy_form import deploy_form
from torchquant.deploy.lowering.stand_in import PassesForTensor
from torchquant.errors import ExportError
from torchquant.qmodule import QWeights
from torchquant.qmodule.weights import weight_names

KINDS = {
    "lstm": lambda: nn.LSTM(16, 12, 2, bidirectional=True, batch_first=True),
    "gru": lambda: nn.GRU(16, 24, batch_first=True),
    "rnn": lambda: nn.RNN(16, 24, nonlinearity="relu", bias=False),
}


def quantized(net, batches, rules="w8a8"):
    model = tq.quantize(net.eval(), rules, batches[0])
    with torch.no_grad(), tq.qmodule_state(model, S.CALIBRATION):
        for batch in batches:
            model(*batch)
    tq.set_qmodule_state(model, S.QUANT_EVAL)
    return model


class Language(nn.Module):
    """Token numbers -> numbers for the next token."""

    def __init__(self, recurrent):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(2000, 16)
        self.recurrent = recurrent()
        self.attention = nn.MultiheadAttention(24, 2, batch_first=True)
        self.head = nn.Linear(24, 30)

    def forward(self, ids):
        y, _ = self.recurrent(self.table(ids))
        y, _ = self.attention(y, y, y, need_weights=False)
        return self.head(y)


def tokens(*shape, seed=0):
    return torch.randint(0, 2000, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["lstm", *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS if k != "lstm")])
def test_a_language_model_is_its_codes_for_any_length(tmp_path, kind):
    model = quantized(Language(KINDS[kind]), [(tokens(4, 7),)])
    path = export_onnx(model, tmp_path / "m.onnx", tokens(2, 7), dynamic_shapes=({1: "length"},), verify=False)
    certificate = certify(model, path, [tokens(4, 7, seed=1), tokens(3, 11, seed=2)])
    assert not certificate.failures
    as_written = certificate.comparisons[1]  # optimized, ONNX Runtime cancels transpositions around the codes of a site
    assert len(as_written.compared) == len(as_written.sites) == 4
    floats = sum(p.nbytes for p in model.parameters())
    stored = onnx.load(path).graph.initializer
    assert sum(len(entry.raw_data) for entry in stored) < 0.4 * floats
    large = {entry.name: entry.data_type for entry in stored if len(entry.raw_data) > 1000}
    allowed = (onnx.TensorProto.UINT8, onnx.TensorProto.INT8)
    assert large.pop("table.weight.scale") == onnx.TensorProto.FLOAT  # one number a row
    assert all(kind in allowed for kind in large.values()), large
    assert "table.weight.codes" in large


@pytest.mark.parametrize("rule", ["affine:8", "affine:4/channel", "pot:4/channel", "nf4:4"])
def test_rows_of_a_table_are_the_rows_of_the_weight(rule):
    torch.manual_seed(0)
    model = quantized(nn.Sequential(nn.Embedding(50, 6), nn.Linear(6, 2)), [(tokens(2, 5) % 50,)], [{"weight": rule}])
    stored = deploy_form(model)[0].weight
    index = torch.tensor([[3, 0, 49], [7, 7, 1]])
    assert torch.equal(stored.rows(index), stored.real()[index])
    with torch.no_grad():
        assert torch.equal(deploy_form(model)[0](index), model[0](index))


class Cells(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lstm, self.gru, self.head = nn.LSTMCell(8, 8), nn.GRUCell(8, 8), nn.Linear(8, 3)

    def forward(self, x, hidden, cell):
        hidden, cell = self.lstm(x, (hidden, cell))
        return self.head(self.gru(hidden)), hidden, cell


def test_cells_and_their_states(tmp_path):
    batches = [tuple(torch.randn(4, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))]
    model = quantized(Cells(), batches)
    path = export_onnx(model, tmp_path / "m.onnx", batches[0])
    certificate = certify(model, path, batches)
    assert certificate.passed, certificate.failures
    codes = [e for e in onnx.load(path).graph.initializer if e.name.endswith("weight_ih.codes")]
    assert {entry.name for entry in codes} == {"lstm.weight_ih.codes", "gru.weight_ih.codes"}


@pytest.mark.parametrize(
    ("layer", "inputs"),
    [
        (nn.LSTM(8, 6, 2, bidirectional=True), (torch.randn(5, 3, 8), (torch.randn(4, 3, 6), torch.randn(4, 3, 6)))),
        (nn.GRU(8, 6, batch_first=True), (torch.randn(5, 8), torch.randn(1, 6))),
        (nn.MultiheadAttention(8, 2), (torch.randn(5, 3, 8), torch.randn(4, 3, 8), torch.randn(4, 3, 8))),
        (nn.EmbeddingBag(20, 4), (torch.tensor([[1, 2], [3, 19]]),)),
        (nn.Bilinear(4, 5, 3), (torch.randn(2, 4), torch.randn(2, 5))),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_the_form_computes_the_simulation(layer, inputs):
    names = weight_names(layer)
    weights = {name: tq.AffineQuantizer(8, tq.BatchMinMax(axis=0), symmetric="narrow") for name in names}
    model = quantized_by_hand(QWeights(layer.eval(), weights), inputs)
    form = deploy_form(model)
    with torch.no_grad():
        for found, expected in zip(leaves(form(*inputs)), leaves(model(*inputs)), strict=True):
            torch.testing.assert_close(found, expected)
    assert not [p for p in form.parameters() if p.ndim > 1]
    assert all(isinstance(form.get_submodule(name.replace(".", "_")), PassesForTensor) for name in names)


def quantized_by_hand(model, inputs):
    with torch.no_grad(), tq.qmodule_state(model, S.CALIBRATION):
        model(*inputs)
    tq.set_qmodule_state(model, S.QUANT_EVAL)
    return model.eval()


def leaves(value):
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


@pytest.mark.filterwarnings("ignore:LSTM with projections")  # torch's own, of its speed
def test_what_onnx_has_no_form_for_is_refused_by_name(tmp_path):
    x = torch.randn(2, 5, 8)
    model = quantized(nn.Sequential(nn.LSTM(8, 6, proj_size=3)), [(x,)], [{"types": ["LSTM"], "weight": "affine:8"}])
    with pytest.raises(ExportError, match="0: ONNX has no LSTM with proj_size=3"):
        export_onnx(model, tmp_path / "m.onnx", x)
    with pytest.raises(ExportError, match="QONNX export supports convolutions and linear layers only, got LSTM"):
        export_qonnx(model, tmp_path / "m.onnx", x)


def test_a_simulation_with_the_numbers_of_the_runtime_goes_through_them():
    model = quantized(Language(KINDS["gru"]), [(tokens(4, 7),)])
    with torch.no_grad(), runtime_exact(model, (tokens(4, 7),)):
        torch.testing.assert_close(model(tokens(4, 7)), to_integer(model, (tokens(4, 7),))(tokens(4, 7)))


def test_forms_copy():
    model = quantized(Language(KINDS["lstm"]), [(tokens(4, 7),)])
    form = deploy_form(model)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(form)(tokens(2, 5)), form(tokens(2, 5)))


def test_ready_rules_for_runtimes_take_tables_and_leave_recurrent_layers_float():
    for rules in ("int8-ort", "int8-openvino"):
        plan = tq.QuantPlan.from_rules(rules, Language(KINDS["lstm"]))
        (table,) = [site for site in plan.sites if site.path == "table"]
        assert table.weight is not None
        assert table.output is None
        assert "recurrent" in {left.path for left in plan.floats}


class Encoder(nn.Module):
    """Features whose strength falls over three decades, each as important as the others -> numbers of a sequence."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lstm, self.head = nn.LSTM(28, 16, batch_first=True), nn.Linear(16, 8)
        with torch.no_grad():
            self.lstm.weight_ih_l0.mul_(4 / STRENGTHS)

    def forward(self, x):
        return self.head(self.lstm(x)[1][0][-1])


STRENGTHS = torch.logspace(0, -3, 28)
PER_ROW = [{"types": ["LSTM"], "weight": "affine:8,symmetric=narrow/channel"}]


def sequences(seed):
    return torch.randn(16, 12, 28, generator=torch.Generator().manual_seed(seed)) * STRENGTHS


def sqnr(reference, output):
    return float(10 * torch.log10(reference.square().sum() / (reference - output).square().sum()))


@pytest.mark.parametrize("rules", ["w8a8", "w4a8", "ternary", "w8a8-products", "w8a8-transformer"])
def test_features_of_any_strength_count_in_a_recurrent_layer(rules):
    x = sequences(0)
    with torch.no_grad():
        reference = Encoder().eval()(x)
        model = quantized(Encoder(), [(x,)], rules)
        assert sqnr(reference, model(x)) > 25
        per_row = quantized(Encoder(), [(x,)], PER_ROW)
        assert sqnr(reference, per_row(x)) < 15
        fresh = tq.quantize(Encoder().eval(), rules, x)
        fresh.load_state_dict(model.state_dict(), strict=True)
        assert torch.equal(fresh(x), model(x))


def test_a_recurrent_layer_in_groups_runs_in_onnx_runtime(tmp_path):
    model, x = quantized(Encoder(), [(sequences(0),)]), sequences(1)
    path = export_onnx(model, tmp_path / "m.onnx", x[:1], verify=False)
    certificate = certify(model, path, [(x,)])
    assert certificate.passed, certificate.failures
    codes = {e.name: tuple(e.dims) for e in onnx.load(path).graph.initializer if e.name.endswith("ih_l0.codes")}
    assert codes == {"lstm.weight_ih_l0.codes": (64, 28)}


@pytest.mark.parametrize("state", [S.QUANT_AWARE_TRAIN, pytest.param(S.QUANT_EVAL, marks=pytest.mark.slow)])
def test_a_cell_in_groups_compiles(state):  # torch compiles no LSTM, only its cell
    batch = tuple(torch.randn(4, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    model = quantized(Cells(), [batch])
    assert type(model.lstm.quantizers()["weight_ih"]).__name__ == "GroupQuantizer"
    tq.set_qmodule_state(model, state)
    twin = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(twin, fullgraph=True, backend="eager")
    for found, expected in zip(compiled(*batch), model(*batch), strict=True):
        assert torch.equal(found, expected)
