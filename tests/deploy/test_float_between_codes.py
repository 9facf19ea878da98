"""A layer that stays float between quantized ones is float in ONNX Runtime too, in its default settings."""

from collections import Counter

import pytest
import torch
from torch import nn

from torchquant import QModuleState, qmodule_state, quantize
from torchquant.deploy import certify, export_onnx

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

INT8 = {"weight": "affine:8,symmetric=narrow/channel", "input": "affine:8", "output": "affine:8"}
CONV = "Conv2d"


def exported(net, rules, x, folder):
    torch.manual_seed(0)
    model = quantize(net.eval(), rules, x)
    with torch.no_grad(), qmodule_state(model, QModuleState.CALIBRATION):
        model(x)
    return model, export_onnx(model, folder / "model.onnx", x, verify=False)


def kernels(path):
    """What ONNX Runtime computes, in its default settings."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = f"{path}.optimized"
    options.log_severity_level = 3
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(f"{path}.optimized").graph.node)


def between(*parts):
    """Layers that stay float, with a quantized one behind them."""
    return [*parts, nn.Conv2d(8, 8, 1), nn.ReLU()]


def test_skipped_convolutions_keep_their_weights(tmp_path):
    torch.manual_seed(1)
    net = nn.Sequential(
        *between(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()),
        *between(nn.Conv2d(8, 8, 3, padding=1, bias=False)),
        *between(nn.Conv2d(8, 8, 3, groups=8), nn.ReLU6()),
        *between(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        *between(nn.ConvTranspose2d(8, 8, 2, groups=2, bias=False)),
        *between(nn.ConvTranspose2d(8, 8, 2, stride=2)),
        *between(nn.MaxPool2d(2), nn.Conv2d(8, 8, 3)),
        *between(nn.Conv2d(8, 8, 3), nn.MaxPool2d(2)),
        *between(nn.Conv2d(8, 1, 1), nn.Conv2d(1, 8, 3)),
    )
    sizes = {
        name: (m.in_channels, m.out_channels, *m.kernel_size)
        for name, m in net.named_children()
        if type(m) is nn.Conv2d
    }
    quantized = [name for name, size in sizes.items() if size == (8, 8, 1, 1)]
    rules = [{"types": ["Conv2d", "ConvTranspose2d"], "output": "affine:8", "input": "affine:8"}]
    x = torch.randn(2, 8, 16, 16)
    model, path = exported(net, [*rules, {"names": quantized, **INT8}], x, tmp_path)
    found = kernels(path)
    assert found["QLinearConv"] == len(quantized) == 9
    assert found["Conv"] + found["FusedConv"] + found["ConvTranspose"] == 10
    assert certify(model, path, [(x,)]).passed


def test_a_skipped_linear_keeps_its_weight(tmp_path):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    rules = [{"types": ["Linear"], **INT8}, {"names": ["2"], "weight": None}]
    x = torch.randn(5, 6)
    model, path = exported(net, rules, x, tmp_path)
    assert kernels(path)["Gemm"] == 1
    assert certify(model, path, [(x,)]).passed


def test_a_weight_of_levels_keeps_them(tmp_path):
    """ONNX Runtime computes such a weight when it loads the file, and takes it for a float one."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    rules = [{"types": [CONV], **INT8}, {"names": ["2"], "weight": "minifloat:8,e=4,m=3"}]
    x = torch.randn(2, 3, 16, 16)
    model, path = exported(net, rules, x, tmp_path)
    assert certify(model, path, [(x,)]).passed


def test_the_bias_is_the_same_number(tmp_path):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 2, 1))
    with torch.no_grad():
        net[1].bias.copy_(torch.tensor([0.0, 0.1, -1e-20, 3e5, -(2.0**24 - 1), 1 / 3]))
    _, path = exported(
        net, [{"types": [CONV], **INT8}, {"names": ["1"], "weight": None}], torch.randn(2, 3, 4, 4), tmp_path
    )
    values = {entry.name: onnx.numpy_helper.to_array(entry) for entry in onnx.load(path).graph.initializer}
    name = next(name for name in values if name.endswith(".bias.codes"))
    bias = torch.from_numpy(values[name].astype("float32") * values[name.replace("codes", "scale")])
    assert torch.equal(bias, net[1].bias)
