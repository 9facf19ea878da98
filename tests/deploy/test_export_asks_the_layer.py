"""Layers of a deploy form answer what model code reads of them; what evaluation does not run is left out, by name."""

import pytest
import torch
from torch import nn

import torchquant as tq
from torchquant import QModuleState as S
from torchquant.deploy import certify, export_onnx, to_integer
from torchquant.deploy.lowering.deploy_form import deploy_form, fix_bias_scales
from torchquant.errors import ExportError

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def quantized(net, x, calibrate=True):
    model = tq.quantize(net.eval(), "w8a8", x)
    if calibrate:
        with torch.no_grad(), tq.qmodule_state(model, S.CALIBRATION):
            model(x)
    tq.set_qmodule_state(model, S.QUANT_EVAL)
    return model


def exported(model, x, folder):
    certificate = certify(model, export_onnx(model, folder / "m.onnx", x), x)
    assert certificate.passed, certificate.failures
    return certificate


class Asking(nn.Module):
    """Reads of its layers whatever it can; the loop keeps torch.fx from following it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3, stride=2)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)
        self.unused = nn.Linear(4, 4)

    def forward(self, x):
        if bool((x == 12.5).all()):
            return x
        x = x.to(dtype=self.conv.weight.dtype, device=self.conv.weight.device)
        assert x.shape[-1] // self.conv.stride[0] == 4
        y = self.norm(self.conv(x))
        assert self.norm.num_features == self.conv.out_channels == self.conv.weight.shape[0] == len(self.conv.bias)
        y = y.mean((2, 3))
        assert self.head.in_features == y.shape[-1]
        return self.head(y) + nn.functional.linear(y, self.unused.weight, self.unused.bias).sum(1, keepdim=True)


def test_a_layer_answers_reads_and_its_weight_passes_for_a_tensor():
    model = quantized(Asking(), X)
    form = deploy_form(model)
    fix_bias_scales(form, (X,))
    assert isinstance(form.conv.weight * 2, torch.Tensor)
    assert torch.equal(2 * form.conv.weight, form.conv.weight.real() * 2)
    assert torch.equal(form.conv.weight[0], form.conv.weight.real()[0])
    assert form.conv.weight.to(torch.float64).dtype is torch.float64
    assert not hasattr(form.conv, "no_such_attribute")
    with torch.no_grad():
        torch.testing.assert_close(form(X), model(X), atol=0.05, rtol=0.0)
        assert torch.equal(form.unused.weight, model.unused.weight)  # read, never run: float here as there


class Patches(nn.Module):
    """As transformers' modelling files do: asks the projection for the type it wants."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.patch = nn.Conv2d(3, 8, 4, stride=4)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x):
        y = self.patch(x.to(dtype=self.patch.weight.dtype)).flatten(2).transpose(1, 2)
        assert y.shape[1] == (x.shape[-1] // self.patch.stride[0]) ** 2
        for block in self.blocks:
            y = torch.relu(block(y.to(block.weight.device)))
        return y


def test_code_that_asks_is_exported(tmp_path):
    exported(quantized(Patches(), X), X, tmp_path)


class WithHead(nn.Module):
    """An auxiliary head for training alone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Conv2d(3, 4, 3)
        self.aux = nn.Sequential(nn.Flatten(), nn.Linear(144, 5))
        self.head = nn.Linear(144, 5)

    def forward(self, x):
        y = self.trunk(x)
        out = self.head(y.flatten(1))
        return (out, self.aux(y)) if self.training else out


def test_a_part_that_only_training_runs_is_left_out_and_named(tmp_path):
    model = quantized(WithHead(), X)
    with pytest.warns(UserWarning, match=r"1 sites did not run on the example inputs .*: aux\.1\. .*training"):
        path = export_onnx(model, tmp_path / "m.onnx", X)
    certificate = certify(model, path, X)
    assert certificate.passed
    assert certificate.not_run == ("aux.1",)
    assert "did not run, not in the file: aux.1" in str(certificate)
    assert path.stat().st_size < 20_000
    form = deploy_form(model)
    assert fix_bias_scales(form, (X,)).not_run == ("aux.1",)
    with pytest.raises(ExportError, match=r"aux\.1: .*has seen no data"):
        form.aux(torch.zeros(1, 4, 6, 6))


def test_a_site_that_runs_and_has_seen_no_data_is_an_error(tmp_path):
    model = quantized(WithHead(), X, calibrate=False)
    with pytest.raises(ExportError, match=r"(trunk|quantize_x): .*has seen no data"):
        export_onnx(model, tmp_path / "m.onnx", X)


class OnLarge(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        y = self.second(x)
        return y + self.first(x)[:, :2] if len(x) > 3 else y


def test_what_did_not_run_on_the_example_raises_where_it_runs_later():
    torch.manual_seed(0)
    net = OnLarge().eval()
    model = tq.QuantPlan.from_rules("w8a8", net, trace=False).apply(net)
    with torch.no_grad(), tq.qmodule_state(model, S.CALIBRATION):
        model(torch.randn(5, 4))
    integer = to_integer(model, torch.randn(2, 4))
    assert integer.not_run == ("first",)
    with pytest.raises(ExportError, match="first did not run on the example inputs"):
        integer(torch.randn(5, 4))


@pytest.mark.slow
def test_a_vision_transformer_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.CLIPVisionConfig(**sizes, image_size=16, patch_size=4, projection_dim=8)
    torch.manual_seed(0)
    net = transformers.CLIPVisionModel(config)

    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(pixel_values=x).pooler_output

    x = torch.randn(2, 3, 16, 16)
    exported(quantized(Pooled(), x), x, tmp_path)


@pytest.mark.slow
def test_a_network_of_timm(tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    net = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=5)
    x = torch.randn(2, 3, 32, 32)
    exported(quantized(net, x), x, tmp_path)
