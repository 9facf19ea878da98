"""Layers with transforms and low-rank products in files: ONNX Runtime, the certificate, packed models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import torchquant as tq
from tests.qmodule.test_input_transform import put
from torchquant.deploy import certify, export_onnx, load_packed, save_packed
from torchquant.graph.own_inputs import read_own_input
from torchquant.ptq.folding import fold_for_good


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.grouped, self.head = nn.Conv2d(8, 8, 3, groups=2), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.first(x)))
        return self.head(torch.relu(self.grouped(y)).mean((2, 3)))


CONVS = {"types": ["Conv2d"], "weight": "affine:8,symmetric=narrow/channel"}
TOKENS = {"types": ["Linear"], "weight": "affine:4/channel", "input": "affine:8,symmetric=narrow/token"}


@pytest.mark.parametrize(
    "rules",
    [
        pytest.param("int8-ort", marks=pytest.mark.slow, id="int8-ort"),
        pytest.param([{**CONVS, "input": "affine:8"}, TOKENS], id="tokens"),
    ],
)
def test_files_compute_what_the_model_computes(rules: object, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = Net(), torch.randn(4, 8, 7, 7)
    net(x)
    expected = net.eval()(x)
    model = tq.quantize(net, rules, x)  # type: ignore[arg-type]
    fold_for_good({path: m for path, m in model.named_modules() if isinstance(m, tq.QWrapper)})
    for path in ("first", "grouped", "head"):
        read_own_input(model, path)
        put(model.get_submodule(path))  # type: ignore[arg-type]
    torch.testing.assert_close(model(x), expected)
    tq.calibrate(model, [x], with_targets=False)
    y = model(x)
    path = export_onnx(model, tmp_path / "model.onnx", x)
    certificate = certify(model, path, [x])
    assert certificate.passed
    assert any("input_transform (after" in operator for operator in certificate.float_operators)
    assert any("low_rank (after head" in operator for operator in certificate.float_operators)
    import onnx
    import onnxruntime

    assert {"Mul", "MatMul"} <= {node.op_type for node in onnx.load(path).graph.node}
    (found,) = onnxruntime.InferenceSession(path).run(None, {"x": x.numpy()})
    assert (torch.from_numpy(found) - y).abs().max() < 0.05 * y.abs().max()
    packed = save_packed(model, tmp_path / "model.safetensors")
    assert torch.equal(load_packed(packed, net)(x), y)


def test_files_with_split_channels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)).eval(), torch.randn(12, 8)
    model = tq.quantize(net, [{"types": ["Linear"], "weight": "affine:8,symmetric=narrow", "input": "affine:8"}], x)
    tq.ptq.run(model, ["split:ratio=0.3", "calibrate", "gptq"], [x], keep="always")
    assert model.get_submodule("0").weight.shape[1] > 8
    y = model(x)
    path = export_onnx(model, tmp_path / "model.onnx", x)
    assert certify(model, path, [x]).passed
    import onnxruntime

    (found,) = onnxruntime.InferenceSession(path).run(None, {"input": x.numpy()})
    assert (torch.from_numpy(found) - y).abs().max() < 0.05 * y.abs().max()
    packed = save_packed(model, tmp_path / "model.safetensors")
    assert torch.equal(load_packed(packed, net)(x), y)
