"""Files for runtimes beside ONNX Runtime: OpenVINO computes them; those for TensorRT have the form that it asks for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import torchquant as tq
from torchquant.deploy import certify, export_executorch, export_onnx, lower, run_executorch
from torchquant.deploy.executorch import decomposed
from torchquant.errors import ExportError

onnx = pytest.importorskip("onnx")


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8))
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return self.head(self.pool(torch.relu(y + self.second(y))).flatten(1))


def quantized(rules: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(16, 3, 12, 12)
    model = tq.quantize(Residual().eval(), rules, x)
    tq.calibrate(model, [x])
    return model, x


def written(rules: str, folder: Path) -> tuple[nn.Module, torch.Tensor, Path]:
    model, x = quantized(rules)
    return model, x, export_onnx(model, folder / "model.onnx", x[:2], keep_signed=True)


def test_openvino_is_part_of_the_certificate(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    model, x, path = written("int8-openvino", tmp_path)
    certificate = certify(model, path, x)
    assert certificate.passed
    (row,) = [row for row in certificate.outputs if row.engine == "OpenVINO"]
    assert row.same_top1 == 1.0
    with torch.no_grad():
        assert row.largest_difference < 0.05 * model(x).abs().max()


def test_files_for_tensorrt_have_signed_codes_around_zero(tmp_path: Path) -> None:
    model, x, path = written("int8-tensorrt", tmp_path)
    assert certify(model, path, x).passed
    graph = onnx.load(path).graph
    stored = {entry.name: onnx.numpy_helper.to_array(entry) for entry in graph.initializer}
    kinds = {"QuantizeLinear": 0, "DequantizeLinear": 0}
    of_weights = 0
    for node in graph.node:
        if node.op_type not in kinds:
            continue
        kinds[node.op_type] += 1
        if len(node.input) == 3 and stored[node.input[2]].dtype.name != "int32":  # biases are 32-bit codes
            assert stored[node.input[2]].dtype.name == "int8"
            assert not stored[node.input[2]].any()
        if (
            node.op_type == "DequantizeLinear"
            and node.input[0] in stored
            and stored[node.input[0]].dtype.name == "int8"
        ):
            of_weights += 1
            assert stored[node.input[1]].shape == (len(stored[node.input[0]]),)
            assert {a.name: a.i for a in node.attribute}["axis"] == 0
    assert of_weights == 3
    assert kinds["QuantizeLinear"] >= 5


def test_executorch_computes_the_numbers_of_the_model(tmp_path: Path) -> None:
    pytest.importorskip("executorch", reason="executorch is not installed: pip install executorch, then run this test")
    model, x = quantized("int8-openvino")
    path = export_executorch(model, tmp_path / "model.pte", x[:2])
    with torch.no_grad():
        wanted = model(x[:2])
    (found,) = run_executorch(path, x[:2])
    step = float(model.head.acts_quantizer.format().step(wanted))
    assert (found - wanted).abs().max() <= step * 1.001
    assert b"quantized_decomposed" not in path.read_bytes()  # XNNPACK took all of it


@pytest.mark.parametrize(
    "weight", ["affine:4/group=32", "affine:8,symmetric=narrow/group=32", "affine:8/channel", "affine:3/in_channel"]
)
def test_weights_are_decomposed_as_they_are(weight: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 64)
    model = tq.quantize(nn.Sequential(nn.Linear(64, 6)), [{"weight": weight}], x)
    tq.calibrate(model, [x])
    lowered = lower(model, x, keep_signed=True)
    torch.testing.assert_close(decomposed(lowered.form, (x,))(x), lowered.form(x))


def test_what_xnnpack_would_compute_otherwise_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("executorch", reason="executorch is not installed: pip install executorch, then run this test")
    model, x = quantized("int8-tensorrt")
    with pytest.raises(ExportError, match="XNNPACK clips codes at the ends of 8 bits only"):
        export_executorch(model, tmp_path / "model.pte", x[:2])
    assert not list(tmp_path.iterdir())
