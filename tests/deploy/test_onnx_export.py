"""The exported file computes what QUANT_EVAL computes, from weights stored as 8-bit codes only."""

import copy
import operator
import os
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from torchquant import (
    AffineQuantizer,
    BatchMinMax,
    QfmtQuantizer,
    QModule,
    QModuleState,
    QOp,
    QWrapper,
    TernaryQuantizer,
    __version__,
    make_quantizer,
    qmodule_state,
    quantize,
    set_qmodule_state,
)
from torchquant._files import write_whole
from torchquant.deploy import export_onnx, run_onnx
from torchquant.deploy.integer.model import to_integer
from torchquant.deploy.lowering.deploy_form import DeployLayer, deploy_form
from torchquant.errors import ConfigError, ExportError, MissingDependencyError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

FLOAT, UINT8, INT8, INT32, INT4 = 1, 2, 3, 6, 22


def weights(n_bits=8, symmetric="narrow", axis=0):
    return AffineQuantizer(n_bits, BatchMinMax(axis=axis), symmetric=symmetric)


def acts(n_bits=8, symmetric=False):
    return AffineQuantizer(n_bits, BatchMinMax(), symmetric=symmetric)


SCHEMES = {
    "w8-a8": (lambda: weights(), lambda: acts()),
    "w4-a4": (lambda: weights(4), lambda: acts(4)),
    "w8-published": (lambda: weights(8, True), lambda: acts(8, True)),
    "w4-full-a6": (lambda: weights(4, "full", None), lambda: acts(6, "full")),
    "w8-asymmetric-a8-narrow": (lambda: weights(8, False), lambda: acts(8, "narrow")),
    "w5-asymmetric-tensor": (lambda: weights(5, False, None), lambda: acts(5, True)),
    "qfmt": (lambda: QfmtQuantizer(8, True, BatchMinMax(axis=0)), lambda: QfmtQuantizer(7, True, BatchMinMax())),
}


def shuffle_batch_norms(model, generator, negative=True):
    """Statistics and parameters as after training; among gamma a zero and, if asked for, negative ones."""
    for bn in model.modules():
        if isinstance(bn, nn.modules.batchnorm._BatchNorm):
            n = bn.num_features
            bn.running_mean.copy_(torch.randn(n, generator=generator) * 0.3)
            bn.running_var.copy_(torch.rand(n, generator=generator) + 0.5)
            gamma = torch.rand(n, generator=generator) + 0.5
            gamma[0] = 0.0
            gamma[1::3] *= -1.0 if negative else 1.0
            bn.weight.data.copy_(gamma)
            bn.bias.data.copy_(torch.randn(n, generator=generator) * 0.3)
    return model


def calibrated(model, x):
    with torch.no_grad(), qmodule_state(model.eval(), QModuleState.CALIBRATION):
        model(x)
    return model


@torch.no_grad()
def simulated(model, *x):
    with qmodule_state(model.eval(), QModuleState.QUANT_EVAL):
        return model(*x)


def graph_of(path):
    return onnx.load(path).graph


def stored(path):
    """Initializer name -> (type, shape) of the file."""
    return {i.name: (i.data_type, tuple(i.dims)) for i in graph_of(path).initializer}


def op_counts(path):
    return Counter(node.op_type for node in graph_of(path).node)


class SmallNet(nn.Module):
    """Padding mode, dilation, groups, depthwise, transposed, residual addition, pooling and a linear head."""

    def __init__(self, scheme="w8-a8", fold_bn=True):
        super().__init__()
        w, a = SCHEMES[scheme]
        stem = [nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect", bias=False), nn.BatchNorm2d(8), nn.ReLU()]
        self.stem = QWrapper(stem, w(), a(), fold_bn, input_quantizer=a())
        grouped = [nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2), nn.BatchNorm2d(8)]
        self.grouped = QWrapper(grouped, w(), a(), fold_bn)
        self.add = QOp(operator.add, a(), activation=nn.ReLU())
        depthwise = [nn.Conv2d(8, 8, 3, stride=2, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6()]
        self.depthwise = QWrapper(depthwise, w(), a(), fold_bn)
        up = [nn.ConvTranspose2d(8, 6, 3, stride=2, output_padding=1), nn.BatchNorm2d(6), nn.SiLU()]
        self.up = QWrapper(up, w(), a(), fold_bn)
        self.pool = QOp(nn.AdaptiveAvgPool2d(1), a())
        self.drop = nn.Dropout(0.5)
        self.head = QWrapper(nn.Linear(6, 5), w(), a())

    def forward(self, x):
        x = self.stem(x)
        x = self.add(self.grouped(x), x)
        x = self.up(self.depthwise(x))
        return self.head(self.drop(self.pool(x).flatten(1)))


QUANTIZED_WEIGHTS = {
    "stem": (8, 3, 3, 3),
    "grouped": (8, 4, 3, 3),
    "depthwise": (8, 1, 3, 3),
    "up": (8, 6, 3, 3),
    "head": (5, 6),
}


def small_net(scheme="w8-a8", fold_bn=True):
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = SmallNet(scheme, fold_bn)
    x = torch.randn(64, 3, 12, 12, generator=generator) * torch.rand(64, 1, 1, 1, generator=generator) * 3
    return calibrated(shuffle_batch_norms(model, generator), x), x


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    model, x = small_net()
    return model, x, export_onnx(model, tmp_path_factory.mktemp("onnx") / "net.onnx", x[:1])


def assert_agrees(model, x, path, optimize, off_share=0.02):
    """The integer reference, number for number; node by node in float32 a few sums next to a tie may differ."""
    expected, got = to_integer(model, x[:2])(x), run_onnx(path, x, batch_size=48, optimize=optimize)
    assert got.shape == expected.shape
    assert expected.unique().numel() > 4
    assert float((got != expected).float().mean()) <= (0.0 if optimize else off_share)
    # the simulation has biases in full precision
    same = float((got.argmax(1) == simulated(model, x).argmax(1)).float().mean())
    assert same >= (0.9 if model.head.weight_quantizer.n_bits == 8 else 0.7)


SAVED = [
    ("w4-a4", True),
    pytest.param("w8-a8", False, marks=pytest.mark.slow),
    pytest.param("w8-asymmetric-a8-narrow", False, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("scheme", "fold_bn"), SAVED)
def test_file_equals_the_simulation(scheme, fold_bn, tmp_path):
    model, x = small_net(scheme, fold_bn)
    path = export_onnx(model, tmp_path / "net.onnx", x[:2])
    assert_agrees(model, x, path, optimize=False)
    assert_agrees(model, x, path, optimize=True)
    found = stored(path)
    kind = INT4 if scheme.startswith("w4") else UINT8
    for name, shape in QUANTIZED_WEIGHTS.items():
        assert found[f"{name}.weight.codes"] == (kind, shape)
    assert op_counts(path)["BatchNormalization"] == 0


def test_only_codes_of_the_weights_are_stored(exported):
    _, _, path = exported
    found = stored(path)
    for name, shape in QUANTIZED_WEIGHTS.items():
        assert [n for n, (_, dims) in found.items() if dims == shape] == [f"{name}.weight.codes"]
        channels = shape[1] if name == "up" else shape[0]
        assert found[f"{name}.weight.scale"] == (FLOAT, (channels,))
        assert found[f"{name}.weight.zero_point"] == (UINT8, (channels,))
    assert max(len(dims) for kind, dims in found.values() if kind == FLOAT) <= 1
    counts = op_counts(path)
    sites = 8
    sites_and_pad = sites + 1
    assert counts["QuantizeLinear"] == sites_and_pad
    assert counts["DequantizeLinear"] == sites_and_pad + 2 * len(QUANTIZED_WEIGHTS)
    assert counts["Clip"] == counts["Relu"] == 0  # bounds of the codes, which saturate by themselves
    for name in QUANTIZED_WEIGHTS:
        assert found[f"{name}.stored_bias.0.codes"][0] == INT32


def test_codes_in_the_file_are_those_of_the_quantizer(exported):
    model, _, path = exported
    arrays = {i.name: torch.from_numpy(onnx.numpy_helper.to_array(i).copy()) for i in graph_of(path).initializer}
    for name in QUANTIZED_WEIGHTS:
        wrapper = getattr(model, name)
        codes = wrapper.weight_quantizer.encode(wrapper.float_weight())
        got = arrays[f"{name}.weight.codes"]
        assert torch.equal((got.transpose(0, 1) if name == "up" else got).int() - 127, codes)


@pytest.mark.parametrize("optimize", [False, True])
def test_runtime_agrees_node_by_node_and_with_integer_kernels(exported, optimize):
    assert_agrees(*exported, optimize=optimize)


@torch.no_grad()
def test_sums_of_a_plain_session_do_not_saturate(tmp_path):
    """Products of the largest uint8 and int8 codes leave 16 bits in pairs, where processors without VNNI add them."""
    layer = nn.Linear(64, 4, bias=False)
    layer.weight.copy_(torch.tensor([1.0, -1.0, 0.9, 0.4])[:, None].expand(4, 64))
    x = torch.cat([torch.full((1, 64), 3.0), torch.rand(7, 64) * 3])
    model = calibrated(QWrapper(layer, weights(), acts(), input_quantizer=acts()), x)
    runtime = pytest.importorskip("onnxruntime")
    path = export_onnx(model, tmp_path / "net.onnx", x)
    assert [stored(path)[f"weight.{name}"][0] for name in ("codes", "zero_point")] == [UINT8, UINT8]
    session = runtime.InferenceSession(str(path))
    y = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    assert torch.equal(y, to_integer(model, x)(x))
    assert deploy_form(model, keep_signed=True).weight.codes.dtype == torch.int8
    narrow = calibrated(QWrapper(nn.Linear(8, 4), weights(7), acts()), torch.randn(8, 8))
    assert deploy_form(narrow).weight.codes.dtype == torch.int8  # cannot saturate, and is faster


def test_a_model_in_training_is_written_as_it_evaluates(tmp_path):
    """After a step of the optimizer, with weight ranges that are a step old, as QUANT_EVAL has them."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(288, 4))
    x = torch.randn(8, 3, 8, 8)
    model = quantize(nn.Sequential(*layers), "int8-ort", x).train()
    set_qmodule_state(model, QModuleState.QUANT_AWARE_TRAIN)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(x).square().mean().backward()
    optimizer.step()
    before = copy.deepcopy(model.state_dict())
    path = export_onnx(model, tmp_path / "net.onnx", x)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not op_counts(path).keys() & {"Dropout", "BatchNormalization"}
    got, expected = run_onnx(path, x), simulated(model, x)
    assert float((got - expected).square().mean()) < 1e-3 * float(expected.square().mean())


@pytest.mark.parametrize("n", [1, 2, 7, 300])
def test_batch_size_is_open(exported, n):
    model, x, path = exported
    x = x[torch.arange(n) % len(x)]
    assert run_onnx(path, x).shape == (n, 5)


def test_file_is_small_anonymous_and_signed(exported):
    model, _, path = exported
    proto = onnx.load(path)
    assert {p.key: p.value for p in proto.metadata_props} == {"torchquant_version": __version__}
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", 20)]
    assert [(d.dim_param, d.dim_value) for d in proto.graph.input[0].type.tensor_type.shape.dim][:2] == [
        ("batch", 0),
        ("", 3),
    ]
    assert os.fsencode(os.path.dirname(__file__)) not in path.read_bytes()
    assert b"stack_trace" not in path.read_bytes()
    assert sorted(os.listdir(path.parent)) == ["net.onnx"]


def test_wide_layer_with_a_fixed_batch(tmp_path):
    model = calibrated(QWrapper(nn.Linear(256, 512), weights(), acts(), input_quantizer=acts()), torch.randn(4, 256))
    path = export_onnx(model, tmp_path / "new" / "wide.onnx", [torch.randn(4, 256)], dynamic_batch=False)
    assert 256 * 512 < path.stat().st_size < 256 * 512 * 1.15
    assert run_onnx(path, torch.randn(8, 256)).shape == (8, 512)
    with pytest.raises(ConfigError, match="takes batches of exactly 4, got 6 rows"):
        run_onnx(path, torch.randn(6, 256))


def test_export_leaves_the_model_alone():
    model, x = small_net()
    set_qmodule_state(model.train(), QModuleState.QUANT_AWARE_TRAIN)
    before = copy.deepcopy(model.state_dict())
    form = deploy_form(model)
    assert not form.training
    assert model.training
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.stem.layer.weight.shape == (8, 3, 3, 3)


LAYERS = {
    "linear": (lambda: [nn.Linear(6, 9), nn.GELU()], (7, 6)),
    "linear-bn": (lambda: [nn.Linear(6, 9), nn.BatchNorm1d(9)], (7, 6)),
    "linear-3d": (lambda: [nn.Linear(6, 9), nn.PReLU()], (7, 4, 6)),
    "conv1d": (lambda: [nn.Conv1d(6, 9, 3, bias=False), nn.BatchNorm1d(9), nn.Hardswish()], (4, 6, 11)),
    "conv2d": (lambda: [nn.Conv2d(6, 9, 3, 2, padding="valid"), nn.BatchNorm2d(9), nn.ReLU6()], (4, 6, 9, 9)),
    "circular": (lambda: [nn.Conv2d(6, 9, 3, padding=1, padding_mode="circular"), nn.BatchNorm2d(9)], (4, 6, 9, 9)),
    "replicate": (lambda: [nn.Conv2d(6, 9, 3, padding="same", padding_mode="replicate")], (4, 6, 9, 9)),
    "conv3d": (lambda: [nn.Conv3d(6, 9, 2, groups=3), nn.BatchNorm3d(9), nn.Sigmoid()], (2, 6, 4, 4, 4)),
    "transposed1d": (lambda: [nn.ConvTranspose1d(6, 9, 3, 2), nn.BatchNorm1d(9), nn.LeakyReLU()], (4, 6, 7)),
    "transposed3d": (lambda: [nn.ConvTranspose3d(6, 9, 2, 2), nn.BatchNorm3d(9)], (2, 6, 3, 3, 3)),
}


@pytest.mark.parametrize("fold_bn", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", LAYERS)
def test_deploy_form_computes_quant_eval(kind, scheme, fold_bn):
    """Bit for bit where no batch norm moves into the scale; else to float32 rounding before the last step."""
    make, shape = LAYERS[kind]
    generator = torch.Generator().manual_seed(3)
    w, a = SCHEMES[scheme]
    layers = make()
    model = shuffle_batch_norms(QWrapper(layers, w(), a(), fold_bn, input_quantizer=a()), generator)
    x = torch.randn(shape, generator=generator)
    calibrated(model, x)
    x = x * 1.5  # beyond the calibrated range: both ends saturate
    form = deploy_form(model)
    with torch.no_grad():
        expected, got = simulated(model, x), form(x)
    assert not any(p.untyped_storage().nbytes() >= model.layer.weight.nbytes for p in form.parameters())
    if fold_bn or model.bn is None or form.bn is not None:
        assert torch.equal(got, expected)
    steps = (got - expected).abs() / model.acts_quantizer.affine_params().delta
    assert float(steps.max()) <= 1.01
    assert float((steps > 0.01).float().mean()) <= 0.01


@pytest.mark.parametrize("kind", ["linear-3d", "conv3d", "transposed1d"])
def test_layers_of_every_rank_run_in_onnx(kind, tmp_path):
    make, shape = LAYERS[kind]
    generator = torch.Generator().manual_seed(4)
    model = shuffle_batch_norms(QWrapper(make(), weights(6), acts(7), False, input_quantizer=acts(8, True)), generator)
    x = torch.randn(shape, generator=generator)
    calibrated(model, x)
    got = run_onnx(export_onnx(model, tmp_path / "layer.onnx", x), x * 1.5, optimize=False)
    steps = (got - simulated(model, x * 1.5)).abs() / model.acts_quantizer.affine_params().delta
    assert float(steps.max()) <= 1.01
    assert float((steps > 0.01).float().mean()) <= 0.01


@pytest.fixture
def conv_with_negative_gamma():
    def make(quantizer):
        layers = [nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4)]
        layers[0].weight.data.copy_(torch.linspace(-1.0, 0.4, 8).view(4, 2, 1, 1))
        layers[1].weight.data.copy_(torch.tensor([-1.0, -2.0, 0.0, 3.0]))
        return calibrated(QWrapper(layers, quantizer, acts()), torch.randn(8, 2, 3, 3))

    return make


def test_batch_norm_with_negative_gamma_flips_codes(conv_with_negative_gamma):
    model = conv_with_negative_gamma(weights())
    codes = model.weight_quantizer.encode(model.float_weight())
    form = deploy_form(model)
    assert form.bn is None
    signs = torch.tensor([-1, -1, 0, 1]).view(4, 1, 1, 1)
    assert torch.equal(form.weight.codes.int(), codes * signs)
    assert bool((form.weight.scale > 0).all())


def test_batch_norm_stays_where_the_lowest_code_cannot_flip(conv_with_negative_gamma):
    form = deploy_form(conv_with_negative_gamma(weights(8, "full", None)), keep_signed=True)
    assert isinstance(form.bn, nn.BatchNorm2d)
    assert int(form.weight.codes.min()) == -128


def test_asymmetric_weights_mirror_with_their_zero_point(conv_with_negative_gamma):
    model = conv_with_negative_gamma(weights(8, False, None))
    form = deploy_form(model)
    zero_point = int(model.weight_quantizer.affine_params().zero_point)
    assert form.weight.zero_point.tolist() == [255 - zero_point, 255 - zero_point, zero_point, zero_point]
    real = form.weight() * torch.tensor([1.0, 1.0, 0.0, 1.0]).view(4, 1, 1, 1)
    factor = model.bn.weight / torch.sqrt(model.bn.running_var + model.bn.eps)
    expected = model.weight_quantizer(model.float_weight()) * factor.view(4, 1, 1, 1)
    torch.testing.assert_close(real, expected)


def test_batch_norm_without_statistics_and_per_input_channel_scales_stay_float():
    x = torch.randn(8, 2, 5, 5)
    no_statistics = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)]
    assert deploy_form(calibrated(QWrapper(no_statistics, weights(), acts()), x)).bn is not None
    model = calibrated(QWrapper([nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)], weights(axis=1), acts()), x)
    form = deploy_form(model)
    assert form.bn is not None
    assert form.weight.scale.shape == (4, 2)  # in every row: with a scale along the inputs alone ONNX Runtime fails
    with torch.no_grad():
        assert torch.equal(form(x), simulated(model, x))


def grouped_transposed(axis, bn=False):
    layers = [nn.ConvTranspose2d(4, 6, 3, groups=2), *([nn.BatchNorm2d(6)] if bn else [])]
    model = QWrapper(layers, weights(axis=axis), acts())
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(8, 4, 5, 5, generator=generator)
    return calibrated(shuffle_batch_norms(model, generator), x), x


@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize("bn", [False, True])
def test_grouped_transposed_convolution(axis, bn):
    model, x = grouped_transposed(axis, bn)
    form = deploy_form(model)
    assert (form.bn is not None) == (bn and axis == 1)  # scales per input channel have no place for its factors
    with torch.no_grad():
        torch.testing.assert_close(form(x), simulated(model, x))


def test_grouped_transposed_convolution_in_onnx(tmp_path):
    model, x = grouped_transposed(axis=1, bn=True)
    got = run_onnx(export_onnx(model, tmp_path / "up.onnx", x), x)
    steps = (got - simulated(model, x)).abs() / model.acts_quantizer.affine_params().delta
    assert float(steps.max()) <= 1.01
    assert float((steps > 0.01).float().mean()) <= 0.01


def test_grouped_transposed_convolution_per_channel():
    model, x = grouped_transposed(0)
    form = deploy_form(model)
    assert (form.weight.axis, form.weight.scale.shape) == (0, (6,))  # stored channels first, moved when it is real
    with torch.no_grad():
        assert torch.equal(form(x), simulated(model, x))
    model.layer.weight.data.sign_()  # now every channel has the same range
    form = deploy_form(calibrated(model, x))
    assert (form.weight.axis, form.weight.scale.shape) == (1, (3,))
    with torch.no_grad():
        assert torch.equal(form(x), simulated(model, x))


class TwoPaths(nn.Module):
    """One module used twice, a site without quantizer, two inputs, and QModules inside a QOp."""

    def __init__(self):
        super().__init__()
        self.shared = QWrapper([nn.Linear(4, 4), nn.ReLU()], weights(), None)
        self.again = self.shared
        self.plain = QWrapper(nn.Linear(4, 4), None, acts())
        inner = nn.Sequential(QWrapper(nn.Linear(4, 3), weights(4), acts(4)), nn.Tanh())
        self.op = QOp(inner, QfmtQuantizer(8, True, BatchMinMax()))

    def forward(self, x, y):
        return self.op(self.plain(self.shared(x)) + self.again(y))


def test_shared_modules_float_sites_and_two_inputs(tmp_path):
    model = TwoPaths()
    x, y = torch.randn(2, 16, 4).unbind()
    with qmodule_state(model.eval(), QModuleState.CALIBRATION), torch.no_grad():
        model(x, y)
    form = deploy_form(model)
    assert form.again is form.shared
    assert sum(isinstance(m, DeployLayer) for m in form.modules()) == 3
    with torch.no_grad():
        assert torch.equal(form(x, y), simulated(model, x, y))
    path = export_onnx(model, tmp_path / "two.onnx", (x[:1], y[:1]))
    kinds = Counter(kind for kind, dims in stored(path).values() if len(dims) == 2)
    assert kinds == {UINT8: 2, INT4: 1, FLOAT: 1}  # a weight of its own for each call
    with pytest.raises(ConfigError, match="run_onnx feeds one input; .* has 2: x, y"):
        run_onnx(path, x)


class Odd(QModule):
    def forward(self, x):
        return x


def linear(weight_quantizer, acts_quantizer=None):
    return nn.Sequential(QWrapper(nn.Linear(3, 2), weight_quantizer, acts_quantizer))


ERRORS = {
    "float model": (lambda: nn.Linear(3, 2), "Linear has no QModule, so nothing in it is quantized. Wrap its layers"),
    "never seen": (
        lambda: nn.Sequential(QWrapper(nn.Linear(3, 2), None, acts())),
        r"0: the output quantizer \(AffineQuantizer\) has seen no data. Run a batch in QModuleState.CALIBRATION",
    ),
    "weight in blocks": (
        lambda: calibrated(linear(make_quantizer("mxfp4")), torch.randn(4, 3)),
        r"0: the weight quantizer \(MXQuantizer\) has scales per block or group.*give this site None",
    ),
    "non-uniform output": (
        lambda: calibrated(linear(None, TernaryQuantizer()), torch.randn(4, 3)),
        r"0: the output quantizer \(TernaryQuantizer\) has no scale and zero point.*give this site None",
    ),
    "too wide": (
        lambda: calibrated(linear(weights(9)), torch.randn(4, 3)),
        r"0: the weight quantizer \(AffineQuantizer\) uses codes -255..255, which 8 bits do not hold. Use n_bits <= 8",
    ),
    "foreign QModule": (lambda: nn.Sequential(Odd()), "0: Odd is neither a QWrapper nor a QOp"),
    "float64 weight": (
        lambda: calibrated(linear(weights()).double(), torch.randn(4, 3).double()),
        "0: the weight is torch.float64, but files are written in float32. Call model.float()",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_and_where_and_the_way_out(case, tmp_path):
    make, message = ERRORS[case]
    with pytest.raises(ExportError, match=message):
        export_onnx(make(), tmp_path / "net.onnx", torch.randn(2, 3))
    assert os.listdir(tmp_path) == []


def test_example_inputs_must_be_tensors(tmp_path):
    model = calibrated(linear(weights()), torch.randn(4, 3))
    with pytest.raises(ConfigError, match="must be a tensor or a sequence of tensors or None, got .*array.*, 3"):
        export_onnx(model, tmp_path / "net.onnx", (torch.ones(1).numpy(), 3))


class FixedBatch(nn.Sequential):
    def forward(self, x):
        return super().forward(x.view(2, 3))


class NoOnnxOperator(nn.Sequential):
    def forward(self, x):
        return torch.linalg.eigvals(super().forward(x).unsqueeze(1).expand(-1, 2, 2)).real


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (FixedBatch, "(?s)torch.export cannot trace the model.*batch.*pass dynamic_batch=False"),
        (NoOnnxOperator, "cannot translate the model: No ONNX function found for .*linalg_eig"),
    ],
)
def test_what_torch_cannot_export_is_an_export_error(kind, message, tmp_path):
    model = calibrated(kind(linear(weights())), torch.randn(2, 3))
    with pytest.raises(ExportError, match=message):
        export_onnx(model, tmp_path / "net.onnx", torch.randn(2, 3))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("broken", ["replace", "write"])
def test_a_failure_leaves_the_old_file_and_nothing_else(broken, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError("disk full")

    def write_half(path, data):
        with open(path, "wb") as file:
            file.write(data[: len(data) // 2])
        fail()

    if broken == "replace":
        monkeypatch.setattr(os, "replace", fail)
    else:
        monkeypatch.setattr(Path, "write_bytes", write_half)
    target = tmp_path / "net.onnx"
    with open(target, "wb") as file:
        file.write(b"old")
    with pytest.raises(OSError, match="disk full"):
        write_whole(target, lambda path: path.write_bytes(b"new content"))
    assert os.listdir(tmp_path) == ["net.onnx"]
    assert target.read_bytes() == b"old"


def test_without_the_extra_the_error_names_it(tmp_path, monkeypatch):
    model = calibrated(linear(weights()), torch.randn(4, 3))
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'torchquant\[deploy\]'"):
        export_onnx(model, tmp_path / "net.onnx", torch.randn(2, 3))
    with pytest.raises(MissingDependencyError, match=r"'onnxruntime'.*pip install 'torchquant\[deploy\]'"):
        run_onnx(tmp_path / "net.onnx", torch.randn(2, 3))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "fold_bn"),
    [("resnet18", True), ("resnet18", False), ("mobilenet_v2", True), ("efficientnet-b0", True)],
)
def test_fused_models(name, fold_bn, tmp_path):
    pytest.importorskip("torchvision")
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(24, 3, 64, 64, generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = fused(name, fold_bn)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        model.train()(x)  # running statistics that fit the fresh weights, so that signals do not fade
    calibrated(model, x)
    path = export_onnx(model, tmp_path / "model.onnx", x[:2])
    expected, got = simulated(model, x), run_onnx(path, x, batch_size=16)
    assert expected.unique().numel() > 20
    noise = float((got - expected).norm() / (expected - expected.mean()).norm())
    assert noise < 0.1
    assert float((got.argmax(1) == expected.argmax(1)).float().mean()) >= 0.9
    floats = [dims for kind, dims in stored(path).values() if kind == FLOAT and len(dims) > 1]
    assert floats == []
    assert op_counts(path)["BatchNormalization"] == 0
    n_weights = sum(m.layer.weight.numel() for m in model.modules() if isinstance(m, QWrapper))
    assert n_weights < path.stat().st_size < 1.25 * n_weights


def fused(name, fold_bn):
    from torchquant.models import FusedEfficientNet, FusedMobileNetV2, FusedResNet

    settings = {"quantize_first": True, "quantize_fc": True, "fold_bn": fold_bn, "input_quantizer": lambda _: acts()}
    factories = (lambda _: weights(), lambda _: acts())
    if name.startswith("efficientnet"):
        efficientnet = pytest.importorskip("efficientnet_pytorch").EfficientNet
        return FusedEfficientNet(efficientnet.from_name(name, num_classes=10), *factories, **settings)
    import torchvision

    net = getattr(torchvision.models, name)(num_classes=10)
    return {"resnet18": FusedResNet, "mobilenet_v2": FusedMobileNetV2}[name](net, *factories, **settings)


def test_a_weight_that_is_stored_in_by_out_keeps_its_scales_per_output():
    kind = pytest.importorskip("transformers.pytorch_utils").Conv1D
    layer = kind(6, 6)
    layer.weight.data.mul_(torch.linspace(0.1, 20.0, 6))
    x = torch.randn(16, 6)
    model = calibrated(QWrapper(layer, weights(), acts(), input_quantizer=acts()), x)
    form = deploy_form(model)
    assert torch.equal(form.weight(), model.weight_quantizer(model.float_weight()).t())
    with torch.no_grad():
        assert torch.equal(form(x), simulated(model, x))
