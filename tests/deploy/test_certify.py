"""Certificates, the runtime-exact simulation, and the commands around them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import torchquant as tq
from tests.deploy.test_onnx_export import small_net
from torchquant.deploy import certify, export_onnx, export_qonnx, runtime_exact, to_integer
from torchquant.deploy.certificate.checking import graph_hash, metadata_of
from torchquant.deploy.onnx.run import CodeReader, open_session
from torchquant.errors import ConfigError, ExportError, UnobservedRangeError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The small network with all kinds of layers, its file, images and labels."""
    model, x = small_net()
    path = export_onnx(model, tmp_path_factory.mktemp("certify") / "net.onnx", x[:2])
    return model, path, x, torch.arange(len(x)) % 5


@pytest.fixture(scope="module")
def certificate(exported):
    model, path, x, labels = exported
    return certify(model, path, list(zip(x.split(24), labels.split(24), strict=True)))


def test_every_code_of_the_integer_kernels_is_the_reference_s(certificate):
    fused, plain = certificate.comparisons
    assert certificate.passed
    assert not certificate.failures
    assert (fused.way, fused.differ, fused.first) == ("ORT, integer kernels", 0, None)
    assert {"QLinearConv": 3, "QLinearAdd": 1, "QGemm": 1, "QLinearGlobalAveragePool": 1}.items() <= dict(
        fused.kernels
    ).items()
    sites = {s.site for s in fused.compared}
    assert sites == {f"{n}.output" for n in ("stem", "grouped", "add", "depthwise", "up", "pool", "head")} | {
        "stem.input"
    }
    assert fused.elements == plain.elements > 10_000
    assert certificate.float_operators == ("silu (after up)",)
    assert (certificate.samples, certificate.batches) == (64, 3)


def test_the_outputs_of_every_engine_are_set_beside_the_reference(certificate, exported):
    model, _, x, labels = exported
    rows = {row.engine: row for row in certificate.outputs}
    assert rows["integer reference"].same_top1 == 1.0
    assert rows["ORT, as deployed"].largest_difference == 0.0
    reference = to_integer(model, x[:2])(x)
    right = float((reference.argmax(1) == labels).double().mean())
    assert rows["integer reference"].accuracy == pytest.approx(right)
    assert rows["simulation"].largest_difference > 0.0  # it has biases in full precision
    assert certificate.simulation.differ > 0


def test_it_is_saved_as_json_and_as_a_table(certificate, tmp_path):
    path = certificate.save(tmp_path / "new" / "certificate.json")
    data = json.loads(path.read_text(encoding="utf-8"))
    assert data == json.loads(json.dumps(certificate.to_dict()))
    assert data["sha256"] == certificate.sha256
    assert path.with_suffix(".txt").read_text(encoding="utf-8").startswith("parity certificate: passed, 64 samples")
    assert sorted(p.name for p in path.parent.iterdir()) == ["certificate.json", "certificate.txt"]


def edited(path: Path, target: Path, change) -> Path:
    proto = onnx.load(path)
    change({entry.name: entry for entry in proto.graph.initializer})
    target.write_bytes(proto.SerializeToString())
    return target


def test_a_file_that_computes_something_else_fails_with_the_first_node_and_its_inputs(exported, tmp_path):
    model, path, x, _ = exported

    def shift(stored):
        bias = stored["grouped.stored_bias.0.codes"]
        values = onnx.numpy_helper.to_array(bias).copy()
        values[2] += 400
        bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))

    broken = certify(model, edited(path, tmp_path / "broken.onnx", shift), x[:8])
    assert not broken.passed
    assert all("grouped.output" in failure for failure in broken.failures)  # and nothing behind it
    first = broken.comparisons[0].first
    assert (first.site, first.kernel, first.index[1]) == ("grouped.output", "QLinearConv", 2)
    assert first.expected != first.found
    assert "grouped.weight.codes" in "".join(first.inputs) or any(t.ndim == 4 for t in first.inputs.values())
    assert "FAILED" in str(broken)
    assert "first difference at grouped.output" in str(broken)
    saved = broken.save(tmp_path / "certificate.json")
    assert set(torch.load(saved.with_suffix(".pt"), weights_only=True)) == {"ORT, integer kernels", "ORT, node by node"}


def test_export_refuses_a_file_that_does_not_compute_the_model(exported, tmp_path, monkeypatch):
    model, _, x, _ = exported
    monkeypatch.setattr("torchquant.deploy.onnx.export.describe", lambda proto, *_: spoil(proto))

    def spoil(proto):
        entry = next(e for e in proto.graph.initializer if e.name == "head.weight.codes")
        values = onnx.numpy_helper.to_array(entry).copy()
        values[0] = 127
        entry.CopyFrom(onnx.numpy_helper.from_array(values, entry.name))

    with pytest.raises(ExportError, match=r"computes something else than the model: .*head.output.*verify=False"):
        export_onnx(model, tmp_path / "net.onnx", x[:2])
    assert not list(tmp_path.iterdir())
    assert export_onnx(model, tmp_path / "net.onnx", x[:2], verify=False).exists()


def test_the_stamp_does_not_change_what_the_file_computes(exported, tmp_path):
    model, path, x, _ = exported
    copied = tmp_path / "net.onnx"
    copied.write_bytes(path.read_bytes())
    before = graph_hash(copied)
    stamped = certify(model, copied, x[:4], stamp=True)
    assert metadata_of(copied)["torchquant_certificate"] == stamped.sha256
    assert graph_hash(copied) == before == stamped.file_sha256
    assert certify(model, copied, x[:4]).passed


def test_metadata_has_the_plan(tmp_path):
    x = torch.randn(8, 4)
    model = tq.quantize(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), "int8-ort", x)
    with tq.qmodule_state(model, tq.QModuleState.CALIBRATION):
        model(x)
    metadata = metadata_of(export_onnx(model, tmp_path / "net.onnx", x))
    assert json.loads(metadata["torchquant_plan"])["sites"][0]["weight"] == "affine:8,symmetric=narrow/channel"


ERRORS = {
    "another model's file": (lambda m, p, x: certify(nn.Sequential(m), p, x), ExportError, "has none of the tensors"),
    "no file": (lambda m, p, x: certify(m, p.with_name("no.onnx"), x), ConfigError, "there is no file"),
    "not onnx": (lambda m, p, x: certify(m, Path(__file__), x), ConfigError, "is not an ONNX file"),
    "no data": (lambda m, p, x: certify(m, p, []), ConfigError, "data must hold at least one batch, got none"),
    "strings": (lambda m, p, x: certify(m, p, ["a"]), ConfigError, "a batch must be a tensor"),
    "number": (lambda m, p, x: certify(m, p, 3), ConfigError, "data must be tensors or batches"),
    "way": (lambda m, p, x: certify(m, p, x, ways=("gpu",)), ConfigError, "ways must be of integer, none, got gpu"),
    "level": (lambda m, p, x: open_session(p, "most"), ConfigError, "level must be one of none, integer, all"),
    "shape": (lambda m, p, x: to_integer(m, x[:, :2]), ExportError, "the model fails on the example inputs"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_came_and_what_is_allowed(case, exported):
    model, path, x, _ = exported
    do, kind, message = ERRORS[case]
    with pytest.raises(kind, match=message):
        do(model, path, x[:4])


def test_codes_are_named_after_sites(exported):
    _, path, x, _ = exported
    for level in ("none", "integer"):
        _, codes = CodeReader(path, level).run([x[:3]])
        assert codes["depthwise.output.codes"].shape == (3, 8, 5, 5)


@pytest.mark.parametrize("rounding", ["ort", "exact", "single", "double"])
@pytest.mark.parametrize(("scheme", "fold_bn"), [("w8-a8", True), ("w4-a4", False), ("qfmt", True)])
def test_runtime_exact_simulation_is_the_integer_reference(scheme, fold_bn, rounding):
    """Module by module, bit for bit, from real numbers."""
    model, x = small_net(scheme, fold_bn)
    tq.set_qmodule_state(model.eval(), tq.QModuleState.QUANT_EVAL)
    integer = to_integer(model, x[:2], rounding)
    with torch.no_grad(), runtime_exact(model, x[:2], rounding):
        seen = {}
        handles = [m.register_forward_hook(lambda m, a, y, n=n: seen.update({n: y})) for n, m in model.named_children()]
        output = model(x)
        for handle in handles:
            handle.remove()
    codes = integer.codes(x)
    for site, (expected,) in codes.items():
        name, _, kind = site.rpartition(".")
        if kind == "output":
            scale, zero_point = integer.form.get_submodule(name).output.shaped(expected.ndim)
            assert torch.equal((seen[name].double() / scale).round().long() + zero_point, expected)
    assert torch.equal(output, integer(x))
    with torch.no_grad():
        assert not torch.equal(output, model(x))  # outside of it the simulation is what it was


def test_fine_tuning_against_the_deployed_arithmetic():
    model, x = small_net("w4-a4")
    labels = torch.arange(len(x)) % 5
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    tq.set_qmodule_state(model.train(), tq.QModuleState.QUANT_AWARE_TRAIN)
    with runtime_exact(model, x[:2]):
        for _ in range(12):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x) * 20.0, labels)
            loss.backward()
            assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())
            assert float(model.stem.layer.weight.grad.abs().sum()) > 0.0
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_runtime_exact_leaves_calibration_alone_and_needs_it():
    x = torch.randn(8, 4)
    model = tq.quantize(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), "int8-ort", x)
    with pytest.raises((ExportError, UnobservedRangeError)), runtime_exact(model, x):
        pass
    with torch.no_grad(), tq.qmodule_state(model, tq.QModuleState.CALIBRATION):
        plain = model(x)
        with runtime_exact(model, x):
            assert torch.equal(model(x), plain)


class Twice(nn.Module):
    """One layer under two names, on inputs with other scales."""

    def __init__(self):
        super().__init__()
        acts = [tq.AffineQuantizer(8, tq.BatchMinMax()) for _ in range(4)]
        weights = tq.AffineQuantizer(8, tq.BatchMinMax(axis=0), symmetric="narrow")
        self.shared = tq.QWrapper(nn.Linear(6, 6), weights, acts[0], input_quantizer=acts[1])
        self.again = self.shared
        self.first = tq.QOp(torch.mul, acts[2])
        self.add = tq.QOp(torch.add, acts[3])

    def forward(self, x):
        once = self.shared(x)
        return self.add(once, self.again(self.first(once, once)))


def test_a_layer_that_is_called_twice_has_a_bias_for_each_call(tmp_path):
    torch.manual_seed(0)
    model, x = Twice().eval(), torch.randn(64, 6)
    with torch.no_grad(), tq.qmodule_state(model, tq.QModuleState.CALIBRATION):
        model(x)
    path = export_onnx(model, tmp_path / "twice.onnx", x[:2])
    assert certify(model, path, x).passed


@pytest.mark.parametrize(
    "scheme", [pytest.param("w8-a8", marks=pytest.mark.slow), "w4-a4", pytest.param("qfmt", marks=pytest.mark.slow)]
)
def test_qonnx_has_true_widths_and_computes_the_simulation(scheme, tmp_path, monkeypatch):
    model, x = small_net(scheme)
    path = export_qonnx(model, tmp_path / "net.onnx", x[:4])
    graph = onnx.load(path).graph
    quants = [node for node in graph.node if node.op_type == "Quant"]
    assert len(quants) == 8 + 5
    stored = {e.name: float(onnx.numpy_helper.to_array(e)) for e in graph.initializer if not e.dims}
    widths = {stored[node.input[3]] for node in quants}
    assert widths == {"w8-a8": {8.0}, "w4-a4": {4.0}, "qfmt": {8.0, 7.0, 6.0}}[scheme]
    assert not [node for node in graph.node if node.op_type == "BatchNormalization"]
    execute = pytest.importorskip("qonnx.core.onnx_exec").execute_onnx
    wrapper = pytest.importorskip("qonnx.core.modelwrapper").ModelWrapper(str(path))
    monkeypatch.setattr(onnx, "IR_VERSION", 10)  # qonnx writes a file for each node, newer than ORT reads
    got = torch.from_numpy(execute(wrapper, {graph.input[0].name: x[:4].numpy()})[graph.output[0].name])
    with torch.no_grad(), tq.qmodule_state(model, tq.QModuleState.QUANT_EVAL):
        expected = model.eval()(x[:4])
    steps = (got - expected).abs() / model.head.acts_quantizer.affine_params().delta
    assert float(steps.max()) <= 1.01


def test_qonnx_refuses_levels_that_are_no_grid(tmp_path):
    model = tq.QWrapper(nn.Linear(8, 4), tq.make_quantizer("nf4"), tq.make_quantizer("affine:8", "output"))
    with torch.no_grad(), tq.qmodule_state(model, tq.QModuleState.CALIBRATION):
        model(torch.randn(4, 8))
    with pytest.raises(ExportError, match="weight: QONNX has uniform quantizers only"):
        export_qonnx(model, tmp_path / "net.onnx", torch.randn(1, 8))


def tampered_head(quantized: bool):
    """A network whose last layer has no codes behind it: only its output tells of it."""
    torch.manual_seed(0)
    rules = [{"types": ["Conv2d"], "weight": "affine:8/channel", "input": "affine:8", "output": "affine:8"}]
    if quantized:
        rules.append({"types": ["Linear"], "weight": "affine:8,symmetric=narrow/channel"})
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).eval()
    x = torch.randn(8, 2, 6, 6)
    model = tq.quantize(net, rules, x)
    with torch.no_grad(), tq.qmodule_state(model, tq.QModuleState.CALIBRATION):
        model(x)
    return model, x


@pytest.mark.parametrize("quantized", [True, False])
def test_a_last_layer_without_codes_is_judged_by_its_output(quantized, tmp_path):
    model, x = tampered_head(quantized)
    path = export_onnx(model, tmp_path / "net.onnx", x[:2])

    def negate(stored):
        last = [e for n, e in stored.items() if n.startswith("3.") and len(e.dims) == 2 and "scale" not in n]
        assert len(last) == 1
        last[0].CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(last[0]), last[0].name))

    broken = certify(model, edited(path, tmp_path / "broken.onnx", negate), x)
    assert [failure for failure in broken.failures if "an output differs by" in failure]
    assert certify(model, path, x).passed


def hand_built(op, shape=(8, 2, 6, 6)):
    """A convolution, an operator of the model's own, a convolution that reads what it gives."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            acts = [tq.AffineQuantizer(8, tq.BatchMinMax()) for _ in range(3)]
            weights = [tq.AffineQuantizer(8, tq.BatchMinMax(axis=0), symmetric="narrow") for _ in range(2)]
            self.first = tq.QWrapper(nn.Conv2d(2, 4, 3, padding=1), weights[0], acts[0], input_quantizer=acts[1])
            self.second = tq.QWrapper(nn.Conv2d(4, 4, 3), weights[1], acts[2])
            self.between = op

        def forward(self, x):
            return self.second(self.between(self.first(x)))

    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(*shape) * 4.0
    with torch.no_grad(), tq.qmodule_state(model, tq.QModuleState.CALIBRATION):
        model(x)
    return model, x


BETWEEN = {
    "relu6 of its own": nn.ReLU6(),
    "pad with 50": lambda y: nn.functional.pad(y, (1, 1, 1, 1), value=50.0),
    "pad with 0": lambda y: nn.functional.pad(y, (1, 1, 1, 1)),
    "softmax": lambda y: y.softmax(1),
    "keywords": lambda y: torch.add(input=y, other=y),
    "split and joined": lambda y: torch.cat(y.chunk(2, axis=1), axis=1),
    "an average of parts": lambda y: nn.functional.avg_pool2d(y, 2),
    "type": lambda y: y.type(torch.float64).to(torch.float32),
}


ALWAYS = ("pad with 50", "softmax", "split and joined", "type")


@pytest.mark.parametrize("between", [pytest.param(b, marks=() if b in ALWAYS else pytest.mark.slow) for b in BETWEEN])
def test_what_a_model_does_between_its_layers(between, tmp_path):
    model, x = hand_built(BETWEEN[between])
    assert certify(model, export_onnx(model, tmp_path / "net.onnx", x[:2]), x).passed


def test_writing_into_a_quantized_tensor_is_refused_by_name():
    model, x = hand_built(lambda y: (y.mul_(0.5), y)[1])
    with pytest.raises(ExportError, match=r"first.output: the model writes into a quantized tensor.*mul_"):
        to_integer(model, x)


def test_a_softmax_with_a_quantizer_may_be_a_step_off(tmp_path):
    softmax = tq.QOp(nn.Softmax(1), tq.AffineQuantizer(8, tq.BatchMinMax()))
    model, x = hand_built(softmax)
    assert certify(model, export_onnx(model, tmp_path / "net.onnx", x[:2]), x).passed


def test_runtime_exact_runs_batch_norms_that_are_left_on_their_statistics():
    model = tq.QWrapper(
        [nn.Linear(6, 4), nn.BatchNorm1d(4)],
        tq.AffineQuantizer(8, tq.BatchMinMax(axis=0), symmetric="narrow"),
        tq.AffineQuantizer(8, tq.BatchMinMax()),
        input_quantizer=tq.AffineQuantizer(8, tq.BatchMinMax()),
    )
    x = torch.randn(32, 6)
    with torch.no_grad(), tq.qmodule_state(model.eval(), tq.QModuleState.CALIBRATION):
        model(x)
    tq.set_qmodule_state(model.train(), tq.QModuleState.QUANT_EVAL)
    before = int(model.bn.num_batches_tracked)
    with torch.no_grad(), runtime_exact(model, x):
        model(x)
    assert int(model.bn.num_batches_tracked) == before + 1  # by the simulation alone
    assert model.bn.training


def test_a_bias_quantizer_quantizes_before_a_batch_norm_that_is_not_folded_in_training():
    layers = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)]
    layers[1].running_mean.normal_()
    layers[1].running_var.uniform_(0.1, 3.0)
    model = tq.QWrapper(
        layers,
        tq.AffineQuantizer(8, tq.BatchMinMax(axis=0), symmetric="narrow"),
        tq.AffineQuantizer(8, tq.BatchMinMax()),
        bias_quantizer=tq.AffineQuantizer(4, tq.BatchMinMax()),
        input_quantizer=tq.AffineQuantizer(8, tq.BatchMinMax()),
    ).eval()
    x = torch.randn(8, 2, 6, 6)
    with torch.no_grad(), tq.qmodule_state(model, tq.QModuleState.CALIBRATION):
        model(x)
    with torch.no_grad(), tq.qmodule_state(model, tq.QModuleState.QUANT_EVAL):
        steps = (to_integer(model, x)(x) - model(x)).abs() / model.acts_quantizer.affine_params().delta
    assert float(steps.max()) <= 1.01
