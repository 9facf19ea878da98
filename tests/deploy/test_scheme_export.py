"""Schemes of every kind go to ONNX and compute there what the integer reference does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import torchquant as tq
from torchquant.deploy import certify, export_onnx, export_qonnx, run_onnx
from torchquant.deploy.integer.model import to_integer
from torchquant.deploy.lowering.deploy_form import deploy_form
from torchquant.errors import ExportError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


def trained(weight: str, acts: str) -> tuple[nn.Sequential, torch.Tensor]:
    """A small network after a few steps of training, in QUANT_EVAL; its images."""
    torch.manual_seed(0)
    model = nn.Sequential(
        tq.QWrapper(
            [nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU()],
            tq.make_quantizer(weight),
            tq.make_quantizer(acts, "output"),
            "rescale",
            input_quantizer=tq.make_quantizer("affine:8", "input"),
        ),
        nn.Flatten(),
        tq.QWrapper(nn.Linear(96, 5), tq.make_quantizer(weight), tq.make_quantizer("affine:8", "output")),
    )
    x = torch.randn(32, 1, 6, 6)
    tq.set_qmodule_state(model, tq.QModuleState.CALIBRATION)
    model(x)
    tq.set_qmodule_state(model, tq.QModuleState.QUANT_AWARE_TRAIN)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model.train()(x), torch.arange(32) % 5).backward()
        optimizer.step()
    for module in model.modules():
        if isinstance(module, tq.quantizers.LSQPlusQuantizer):
            module.snap()
    tq.observe_weights(model)
    tq.set_qmodule_state(model.eval(), tq.QModuleState.QUANT_EVAL)
    return model, x


@pytest.mark.parametrize(
    ("weight", "acts"),
    [
        ("lsq:4/channel", "lsq:4"),
        pytest.param("lsqplus:4/channel", "lsqplus:4", marks=pytest.mark.slow),
        pytest.param("ewgs:3", "ewgs:3", marks=pytest.mark.slow),
        pytest.param("tqt:4", "tqt:8", marks=pytest.mark.slow),
        ("affine:4,symmetric=narrow/channel", "pact:4"),
        pytest.param(
            "affine:8,symmetric=narrow,observer=mse/channel", "affine:8,observer=entropy", marks=pytest.mark.slow
        ),
        ("affine:8,symmetric=torch", "affine:8,observer=percentile"),
    ],
)
def test_what_is_uniform_computes_the_same_in_onnx_runtime(weight: str, acts: str, tmp_path: Path) -> None:
    model, x = trained(weight, acts)
    path = export_onnx(model, tmp_path / "net.onnx", x[:1])
    integer = to_integer(model, x[:1])
    assert torch.equal(run_onnx(path, x, optimize=True), integer(x))
    assert not integer.float_operators
    with torch.no_grad():
        assert float((integer(x).argmax(1) == model(x).argmax(1)).double().mean()) >= 0.8


TABLES = {"apot:4": 4, "codebook:3": 4, "residual:3": 4, "nf4": 4, "ttq": 2, "dorefa:4": 4, "xnor": 2, "twn/channel": 2}


OTHERS = ["fp8_e4m3", "esb:4,k=1/channel", "ul2q:3/channel", "pot:3", "vecq:4"]
SOMETIMES = {*TABLES, *OTHERS} - {"residual:3", "esb:4,k=1/channel", "ttq"}


@pytest.mark.parametrize(
    "weight", [pytest.param(w, marks=pytest.mark.slow if w in SOMETIMES else ()) for w in [*TABLES, *OTHERS]]
)
def test_weights_of_other_schemes_are_codes_with_their_exact_levels(weight: str, tmp_path: Path) -> None:
    """Codes as narrow as the scheme's, and the very weights of the simulation."""
    model, x = trained(weight, "affine:8")
    path = export_onnx(model, tmp_path / "net.onnx", x[:1])
    with torch.no_grad():
        wrapper = model[2]
        expected = wrapper.weight_quantizer(wrapper.float_weight())
        form = deploy_form(model)
        assert torch.equal(form.get_submodule("2").weight(), expected)
    names = {entry.name: entry for entry in onnx.load(path).graph.initializer}
    assert not [name for name, entry in names.items() if tuple(entry.dims) == (5, 96) and entry.data_type == 1]
    entry = names["2.weight.codes"]
    bits = {onnx.TensorProto.INT2: 2, onnx.TensorProto.UINT2: 2, onnx.TensorProto.INT4: 4, onnx.TensorProto.UINT4: 4}
    assert bits.get(entry.data_type, 8) == TABLES.get(weight, 8 if "fp8" in weight else 4)
    assert len(entry.raw_data or bytes(entry.int32_data)) <= 5 * 96 * bits.get(entry.data_type, 8) // 8
    with torch.no_grad():
        step = model[2].acts_quantizer.affine_params().delta
        off = (run_onnx(path, x) - model(x)).abs() / step
    assert float(off.max()) <= (1.01 if "nf4" in weight or "codebook" in weight else 4.0)


@pytest.mark.parametrize("weight", ["mxfp4", "nvfp4", "pot:3/group=8"])
def test_blocks_with_scales_of_their_own_are_refused_by_name(weight: str, tmp_path: Path) -> None:
    model, x = trained(weight, "affine:8")
    with pytest.raises(ExportError, match=r"0: the weight quantizer.*has scales per block or group"):
        export_onnx(model, tmp_path / "net.onnx", x[:1])
    assert not list(tmp_path.iterdir())


LAYERS = {
    "linear": (lambda: nn.Linear(13, 5), (3, 13)),
    "conv": (lambda: nn.Conv2d(3, 4, 3, padding=1), (2, 3, 5, 5)),
    "depthwise": (lambda: nn.Conv1d(4, 4, 3, groups=4), (2, 4, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
}


GROUPS = ["affine:8/group=4", "affine:4,symmetric=narrow/group=64", "lsq:4/group=8"]
INPUTS = ["affine:8/in_channel", "lsq:4/in_channel", "nf4/in_channel", "twn/in_channel"]
BLOCKS = {
    "linear": ("affine:4/block=5x13", "affine:8/block=5x1"),
    "conv": ("affine:4/block=2x3x1", "affine:8/block=2x-1x1x3", "lsq:4/block=4x1x-1x1"),
    "transposed": ("affine:4/block=3x2x3x1", "affine:8/block=2x1"),
}


@pytest.mark.parametrize(
    ("kind", "weight"),
    [(kind, weight) for kind in LAYERS for weight in (*GROUPS, *INPUTS, *BLOCKS.get(kind, ()))],
)
def test_a_grid_for_each_group_gives_the_very_weights(kind: str, weight: str) -> None:
    """Rows that are no multiple of the group, and rows shorter than one group, among them."""
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    wrapper = tq.QWrapper([make()], tq.make_quantizer(weight), input_quantizer=tq.make_quantizer("affine:8", "input"))
    x = torch.randn(shape)
    with tq.qmodule_state(wrapper, tq.QModuleState.CALIBRATION):
        wrapper(x)
    tq.set_qmodule_state(wrapper, tq.QModuleState.QUANT_EVAL)
    form = deploy_form(nn.Sequential(wrapper))
    with torch.no_grad():
        assert torch.equal(form.get_submodule("0.weight")().contiguous(), seen_by(wrapper))
        torch.testing.assert_close(form(x), wrapper(x))
        torch.testing.assert_close(to_integer(nn.Sequential(wrapper), x)(x), wrapper(x))


def seen_by(wrapper: tq.QWrapper) -> torch.Tensor:
    """The quantized weight in the layout of the layer."""
    assert wrapper.weight_quantizer is not None
    quantized = wrapper.weight_quantizer(wrapper.float_weight())
    return wrapper.row.channels_first(wrapper.layer, quantized).contiguous()


@pytest.mark.parametrize(
    "weight",
    [
        "affine:8/in_channel",
        *(pytest.param(s, marks=pytest.mark.slow) for s in ("affine:4,symmetric=narrow/block=4x3", "twn/in_channel")),
    ],
)
def test_scales_along_the_inputs_run_in_onnx_runtime(weight: str, tmp_path: Path) -> None:
    """Layers with as many inputs as outputs, for which its integer kernels would take the scales for the others'."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(12, 12, 3), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 12)).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim > 1:
                parameter *= torch.logspace(-1, 1, 12).view(-1, *[1] * (parameter.ndim - 2))
    x = torch.randn(4, 12, 14)
    rules = [{"weight": weight, "input": "affine:8", "output": "affine:8"}]
    model = tq.quantize(net, rules, x)
    tq.calibrate(model, [x])
    path = export_onnx(model, tmp_path / "net.onnx", x[:1], verify=False)
    certificate = certify(model, path, [(x,)])
    assert certificate.passed, certificate.failures
    assert not certificate.failures


def test_groups_run_in_onnx_runtime_between_codes_and_behind_a_batch_norm(tmp_path: Path) -> None:
    model, x = trained("affine:4/group=8", "affine:8")
    path = export_onnx(model, tmp_path / "net.onnx", x[:1], verify=False)
    certificate = certify(model, path, [(x,)])
    assert certificate.passed, certificate.failures
    proto = onnx.load(path)
    blocks = {a.i for n in proto.graph.node for a in n.attribute if a.name == "block_size"}
    assert (blocks, proto.opset_import[0].version) == ({8}, 21)
    codes = {entry.name: tuple(entry.dims) for entry in proto.graph.initializer if entry.name.endswith("weight.codes")}
    assert codes == {"0.weight.codes": (6, 9), "2.weight.codes": (5, 96)}
    with pytest.raises(ExportError, match="0.weight: QONNX is written with one scale per tensor or channel"):
        export_qonnx(model, tmp_path / "q.onnx", x[:1])
