"""A certificate fails where a file is wrong and nowhere else, and passes only where every code was compared."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchquant as tq
from torchquant.deploy import certify, export_onnx
from torchquant.deploy.onnx.kernels import Contents, kernel_of
from torchquant.deploy.onnx.run import CodeReader
from torchquant.errors import ExportError
from torchquant.qmodule import register_pattern
from torchquant.qmodule.patterns import LayerPattern

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


def acts():
    return tq.AffineQuantizer(8, tq.BatchMinMax())


def layer(inner, has_input=True):
    weights = tq.AffineQuantizer(8, tq.BatchMinMax(axis=0), symmetric="narrow")
    return tq.QWrapper(inner, weights, acts(), input_quantizer=acts() if has_input else None)


def exported(model, x, path, **options):
    """Calibrated and written."""
    with torch.no_grad(), tq.qmodule_state(model.eval(), tq.QModuleState.CALIBRATION):
        model(x)
    tq.set_qmodule_state(model, tq.QModuleState.QUANT_EVAL)
    return export_onnx(model, path, x[:2], verify=False, **options)


def edited(path, change):
    """The file, changed in place."""
    proto = onnx.load(path)
    change(proto.graph)
    path.write_bytes(proto.SerializeToString())
    return path


def test_codes_moved_behind_float_operators_may_differ_at_a_tie(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(64)
            self.project = layer(nn.Linear(32, 16))
            self.mix = layer(nn.Conv1d(400, 8, 1))

        def forward(self, x):
            y = F.gelu(self.norm(x))
            return self.project(y.reshape(x.shape[0], -1, 32)), self.mix(y.transpose(1, 2).reshape(x.shape[0], 400, 32))

    torch.manual_seed(0)
    model, x = Net(), torch.randn(4, 200, 64)
    path = exported(model, x, tmp_path / "net.onnx")
    certificate = certify(model, path, [x, 1.01 * x, 0.99 * x])
    assert certificate.passed, str(certificate)
    integers = certificate.comparisons[0]
    kinds = {site.site: site.kernel for site in integers.sites}
    assert kinds["project.input"] == kinds["mix.input"] == "QuantizeLinear"
    assert kinds["mix.output"] == "QLinearConv"


def graph_of(*nodes, constants=()):
    return onnx.helper.make_model(
        onnx.helper.make_graph(
            [onnx.helper.make_node(kind, inputs, outputs) for kind, inputs, outputs in nodes],
            "graph",
            [],
            [],
            [onnx.numpy_helper.from_array(torch.tensor(value).numpy(), name) for name, value in constants],
        )
    )


def test_what_moves_codes_is_as_exact_as_what_made_them():
    graph = graph_of(
        ("QuantizeLinear", ["real", "s", "z"], ["rounded"]),
        ("QLinearConv", ["rounded"], ["summed"]),
        ("Transpose", ["rounded"], ["turned"]),
        ("Concat", ["summed", "turned"], ["joined"]),
        ("Reshape", ["joined"], ["shaped"]),
        ("MaxPool", ["summed"], ["pooled"]),
    ).graph
    made_by = {name: node for node in graph.node for name in node.output}
    assert kernel_of("shaped", made_by, {}) == "QuantizeLinear"
    assert kernel_of("pooled", made_by, {}) == "MaxPool"
    assert kernel_of("shaped", made_by, {"rounded": None}) == "Reshape"  # compared on its own


def test_equal_tensors_are_found_in_the_optimized_graph():
    scales = [("s", 0.5), ("t", 0.25), ("again", 0.5)]
    before = graph_of(
        ("QuantizeLinear", ["x", "s"], ["q.codes"]),
        ("QuantizeLinear", ["x", "again"], ["k.codes"]),
        ("QuantizeLinear", ["x", "t"], ["other.codes"]),
        ("DequantizeLinear", ["q.codes", "s"], ["real"]),
        ("Transpose", ["real"], ["turned"]),
        ("QuantizeLinear", ["turned", "s"], ["back.codes"]),
        constants=scales,
    )
    after = graph_of(("QuantizeLinear", ["x", "s"], ["q.codes"]), ("Transpose", ["q.codes"], ["t0"]), constants=scales)
    contents = Contents()
    first = contents.of_graph(before)
    second = contents.of_graph(after, {"q.codes": first["q.codes"]})
    assert first["q.codes"] == first["k.codes"] == second["q.codes"]
    assert first["other.codes"] not in second.values()
    assert first["back.codes"] == second["t0"]


class Attention(nn.Module):
    """Three layers that read one tensor, each through an equal quantizer of its own."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.q, self.k, self.v = (layer(nn.Linear(32, 32)) for _ in range(3))

    def forward(self, x):
        y = self.norm(x)
        return torch.softmax(self.q(y) @ self.k(y).transpose(1, 2) / 4, -1) @ self.v(y)


def test_equal_quantizers_that_the_runtime_merges_are_judged_each(tmp_path):
    torch.manual_seed(0)
    model, x = Attention(), torch.randn(4, 100, 32)
    path = exported(model, x, tmp_path / "net.onnx")
    made = [name for node in onnx.load(path).graph.node for name in node.output]
    assert {"q.input.codes", "k.input.codes", "v.input.codes"} <= set(made)
    reader = CodeReader(path, "integer")
    assert len({reader.visible[f"{name}.input.codes"] for name in "qkv"}) == 1
    with torch.no_grad():
        model.norm.bias += 0.1  # the model rounds to other codes than the file, in all three
    integers = certify(model, path, x).comparisons[0]
    assert all(site.differ for site in integers.sites if site.site.endswith(".input"))
    assert {site.missing for site in integers.sites} == {0}
    outputs = {site.site: site.differ for site in integers.sites if site.site in ("q.output", "k.output", "v.output")}
    assert outputs == {"q.output": 0, "k.output": 0, "v.output": 0}


class Sliced(nn.Module):
    """A part of its list, taken by a slice; the first layer stands under another name too."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([layer(nn.Linear(16, 16)) for _ in range(4)])
        self.first = self.layers[0]

    def forward(self, x):
        for part in self.layers[:3]:
            x = torch.relu(part(x))
        self.layers[3](x)  # nobody reads it, and the file has none of it
        return x


def test_every_site_of_a_slice_is_compared(tmp_path):
    torch.manual_seed(0)
    model, x = Sliced(), torch.randn(32, 16)
    for part in model.layers:
        with torch.no_grad(), tq.qmodule_state(part, tq.QModuleState.CALIBRATION):
            part(x)
    path = exported(model, x, tmp_path / "net.onnx")
    certificate = certify(model, path, x)
    assert certificate.passed
    assert all(len(c.sites) == 6 and not c.missing for c in certificate.comparisons)
    assert "ORT, integer kernels: 6 of 6 sites, 3,072 of 3,072 codes" in str(certificate)

    def lose(graph):
        for node in graph.node:
            for ends in (node.input, node.output):
                ends[:] = ["renamed" if name == "layers.1.output.codes" else name for name in ends]

    lost = certify(model, edited(path, lose), x)
    assert not lost.passed
    assert not lost.failures
    assert lost.verdict == "INCOMPLETE"
    assert lost.comparisons[0].hidden == ("layers.1.output",)
    assert [reason.split(";")[0] for reason in lost.incomplete] == [
        "ORT, integer kernels: 5 of 6 sites, 2,560 of 3,072 codes compared",
        "ORT, node by node: 5 of 6 sites, 2,560 of 3,072 codes compared",
    ]
    assert "parity certificate: INCOMPLETE" in str(lost)
    saved = json.loads(lost.save(tmp_path / "certificate.json").read_text(encoding="utf-8"))
    assert (saved["passed"], saved["verdict"]) == (False, "INCOMPLETE")


def test_export_refuses_a_file_whose_codes_it_cannot_see(tmp_path, monkeypatch):
    monkeypatch.setattr("torchquant.deploy.onnx.graph.code_name", lambda site, call: f"{site}.{call}.codes.{call + 1}")
    torch.manual_seed(0)
    model, x = nn.Sequential(layer(nn.Linear(4, 3))), torch.randn(8, 4)
    with torch.no_grad(), tq.qmodule_state(model.eval(), tq.QModuleState.CALIBRATION):
        model(x)
    with pytest.raises(ExportError, match="could not be checked|has none of the tensors"):
        export_onnx(model, tmp_path / "net.onnx", x)


BETWEEN = {
    "nothing": lambda y: y,
    "zero": lambda y: torch.relu(y + 0),
    "one": lambda y: y * 1.0,
    "dropout": lambda y: F.dropout(y, training=False),
    "relu": torch.relu,
    "clamp": lambda y: y.clamp(-0.3, 0.4),
    "transpose": lambda y: y.transpose(2, 3),
    "reshape": lambda y: y.reshape(y.shape[0], 8, 6, 54),
    "pool and slice": lambda y: F.max_pool2d(y, 2)[:, :, 1:],
    "halves": lambda y: torch.cat(y.chunk(2, 1), 1),
    "padding": lambda y: F.pad(y, (1, 1, 1, 1)),
}


class Branches(nn.Module):
    """Pairs of convolutions; between the quantizer behind the first and another before the second stands `kind`."""

    def __init__(self):
        super().__init__()
        self.read = tq.QOp(torch.neg, acts())
        self.first = nn.ModuleDict({kind: layer(nn.Conv2d(3, 8, 3), has_input=False) for kind in BETWEEN})
        self.second = nn.ModuleDict({kind: layer(nn.Conv2d(8, 4, 1)) for kind in BETWEEN})

    def forward(self, x):
        x = self.read(x)
        return tuple(second(BETWEEN[kind](self.first[kind](x))) for kind, second in self.second.items())


def test_quantizers_that_follow_each_other_keep_their_grids_in_the_runtime(tmp_path):
    torch.manual_seed(0)
    model, x = Branches().eval(), torch.randn(4, 3, 20, 20)
    with torch.no_grad(), tq.qmodule_state(model, tq.QModuleState.CALIBRATION):
        model(x)
        for kind, second in model.second.items():
            second.input_quantizer.pre_observe(BETWEEN[kind](0.9 * torch.randn(4, 8, 18, 18)))
    tq.set_qmodule_state(model, tq.QModuleState.QUANT_EVAL)
    path = export_onnx(model, tmp_path / "net.onnx", x[:2], verify=False)
    certificate = certify(model, path, x)
    assert certificate.passed, str(certificate)
    assert certificate.comparisons[0].kernels["QLinearConv"] >= 2 * len(BETWEEN)  # they stay in integer kernels
    deployed = next(row for row in certificate.outputs if row.engine == "ORT, as deployed")
    assert deployed.largest_difference < 1e-5

    def join(graph):
        """Without the nodes between."""
        barriers = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Max"}
        assert len(barriers) == len(BETWEEN) - 1  # the halves are joined by an integer kernel
        kept = [node for node in graph.node if node.op_type != "Max"]
        del graph.node[:]
        graph.node.extend(kept)
        for node in graph.node:
            node.input[:] = [barriers.get(name, name) for name in node.input]

    joined = certify(model, edited(path, join), x, ways="integer")
    wrong = {site.site.split(".")[1] for site in joined.comparisons[0].sites if site.missing or site.largest > 1}
    assert {"nothing", "one", "dropout", "padding"} <= wrong  # they would not be needed otherwise


class Padded(nn.Conv2d):
    """Pads by itself, and has no bias: that of its batch norm is added behind it."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, None, self.stride)


def test_a_bias_behind_a_layer_of_the_model_s_own_counts_as_it_is_stored(tmp_path):
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(8)
    norm.running_mean.normal_()
    norm.bias.data.normal_()
    register_pattern(Padded, LayerPattern(batch_norm=nn.BatchNorm2d))
    wrapper = layer([Padded(3, 8, 3, 2, bias=False), norm.eval()])
    model, x = nn.Sequential(wrapper, layer(nn.Conv2d(8, 4, 1), has_input=False)), torch.randn(4, 3, 32, 32)
    certificate = certify(model, exported(model, x, tmp_path / "net.onnx"), x)
    assert certificate.passed, str(certificate)
