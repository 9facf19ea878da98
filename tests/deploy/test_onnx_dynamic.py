"""Files whose heights, widths and lengths are open compute QUANT_EVAL at other sizes than the example's."""

import pytest
import torch
from torch import nn
from torch.export import Dim

import torchquant as tq
from torchquant import QModuleState as S
from torchquant.deploy import certify, export_onnx, run_onnx
from torchquant.errors import ConfigError, ExportError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


class Pooled(nn.Sequential):
    """Strides, a residual addition, a concatenation with an average pool, a global pool and a linear head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.left, self.right = nn.Conv2d(8, 8, 3, 2, 1), nn.Conv2d(8, 8, 1, 2)
        self.pool = nn.AvgPool2d(3, 2, 1)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = self.stem(x)
        x = torch.cat([torch.relu(self.left(x) + self.right(x)), self.pool(x)], 1)
        return self.head(x.mean((2, 3)))


class Upsampled(nn.Module):
    """Takes even sizes only."""

    def __init__(self):
        super().__init__()
        self.down, self.up, self.out = nn.Conv2d(3, 4, 3, 2, 1), nn.ConvTranspose2d(4, 4, 2, 2), nn.Conv2d(7, 2, 1)

    def forward(self, x):
        return self.out(torch.cat([self.up(self.down(x)), x], 1))


class Fixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4 * 64, 2)

    def forward(self, x):
        return self.head(self.conv(x).flatten(1))


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.layer = nn.Parameter(torch.randn(12, 4)), nn.Linear(4, 2)

    def forward(self, x):
        return self.layer(x + self.table[: x.shape[1]])


def quantized(net, x):
    torch.manual_seed(0)
    model = tq.quantize(net.eval(), "int8-ort", x)
    with torch.no_grad(), tq.qmodule_state(model, S.CALIBRATION):
        model(x)
    tq.set_qmodule_state(model, S.QUANT_EVAL)
    return model


def sizes_of(path):
    (given,) = onnx.load(path).graph.input
    return [d.dim_param or d.dim_value for d in given.type.tensor_type.shape.dim]


@torch.no_grad()
def test_height_and_width_are_open(tmp_path):
    x = torch.randn(2, 3, 16, 16)
    model = quantized(Pooled(), x)
    path = export_onnx(model, tmp_path / "net.onnx", x[:1], dynamic_shapes=({2: "height", -1: "width"},))
    assert sizes_of(path) == ["batch", 3, "height", "width"]
    others = [torch.randn(n, 3, h, w) for n, h, w in ((1, 16, 16), (3, 33, 20), (2, 17, 64))]
    assert certify(model, path, others).passed
    for other in others:
        expected = model(other)
        assert float((run_onnx(path, other) - expected).square().mean()) < 2e-2 * float(expected.square().mean())


@torch.no_grad()
def test_multiples_are_given_as_dims(tmp_path):
    x = torch.randn(2, 3, 8, 8)
    model = quantized(Upsampled(), x)
    with pytest.raises(ExportError, match=r"(?s)Constraints violated \(.*height.*only some valid sizes as a torch.exp"):
        export_onnx(model, tmp_path / "net.onnx", x, dynamic_shapes=({2: "height"},))
    rows = 2 * Dim("_rows", min=4)
    path = export_onnx(model, tmp_path / "net.onnx", x, dynamic_shapes=[{2: rows}])
    assert run_onnx(path, torch.randn(1, 3, 14, 8)).shape == (1, 2, 14, 8)


@pytest.mark.parametrize(
    ("net", "x", "message"),
    [
        (Fixed(), torch.randn(2, 3, 8, 8), r"(?s)trace the model: .*height.*that the model fixes must not be"),
        (Positions(), torch.randn(2, 8, 4), "(?s)the model fails at twice the size of the example .*verify=False"),
    ],
)
def test_a_model_that_cannot_is_refused_by_name(net, x, message, tmp_path):
    axes = {2: "height"} if x.ndim == 4 else {1: Dim("tokens", min=4, max=12)}
    with pytest.raises(ExportError, match=message):
        export_onnx(quantized(net, x), tmp_path / "net.onnx", x, dynamic_shapes=(axes,))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({2: "height"}, "dynamic_shapes must be a sequence of mappings from whole numbers .*, got {2: 'height'}"),
        ("height", "dynamic_shapes must be a sequence of mappings from whole numbers .*, got 'height'"),
        (({2: "height"}, {}), "has 2 mappings for 1 inputs"),
        (({4: "height"},), "an input of 4 dimensions has no axis 4"),
        (({"2": "height"},), "must be a sequence of mappings from whole numbers .*, got .{'2': 'height'}"),
        (({2: "the height"},), "axis 2 must be a name or a torch.export.Dim, got 'the height'"),
        (({2: 16},), "axis 2 must be a name or a torch.export.Dim, got 16"),
    ],
)
def test_what_is_no_choice_of_axes_is_refused(given, message, tmp_path):
    x = torch.randn(2, 3, 8, 8)
    model = quantized(nn.Sequential(nn.Conv2d(3, 4, 3)), x)
    with pytest.raises(ConfigError, match=message):
        export_onnx(model, tmp_path / "net.onnx", x, dynamic_shapes=given)
