"""Layers below those of torch with a forward of their own: what they compute with is what is quantized."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import Tensor, nn

import torchquant as tq
from torchquant import QModuleState as S
from torchquant.deploy import certify, export_onnx, load_packed, save_packed
from torchquant.errors import ConfigError
from torchquant.graph import capture
from torchquant.qmodule import QWrapper
from torchquant.qmodule.patterns import row_of, why_no_layer
from torchquant.training import OscillationTracker


class Plain(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class StaticSame(nn.Conv2d):
    """As in efficientnet_lite_pytorch: pads by a module of its own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.static_padding = nn.ZeroPad2d((0, 1, 0, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.static_padding(x)
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class DynamicSame(nn.Conv2d):
    """Pads by the size of its input, if there is something to pad."""

    def forward(self, x: Tensor) -> Tensor:
        size, step = x.shape[-1], self.stride[0]
        pad = max((math.ceil(size / step) - 1) * step + self.kernel_size[0] - size, 0)
        if pad > 0:
            x = F.pad(x, [pad // 2, pad - pad // 2, pad // 2, pad - pad // 2])
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Equalised(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias * 0.1
        return F.linear(x, self.weight * self.in_features**-0.5, bias=bias)


class Block(nn.Module):
    """Drop connect as in efficientnet_lite_pytorch: another graph in training, with random numbers."""

    def __init__(self, conv: type[nn.Conv2d]) -> None:
        super().__init__()
        self.conv, self.bn = conv(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)

    def forward(self, inputs: Tensor, drop_connect_rate: float | None = None) -> Tensor:
        x = self.bn(self.conv(inputs))
        if drop_connect_rate and self.training:
            keep = 1 - drop_connect_rate
            x = x / keep * torch.floor(keep + torch.rand([x.shape[0], 1, 1, 1], dtype=x.dtype))
        return x + inputs


class Blocks(nn.Module):
    def __init__(self, conv: type[nn.Conv2d]) -> None:
        super().__init__()
        self.stem = conv(3, 6, 3, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.blocks = nn.ModuleList(Block(conv) for _ in range(2))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.bn(self.stem(x)))
        for i, block in enumerate(self.blocks):
            x = block(x, drop_connect_rate=0.2 * i)
        return self.head(x.mean((2, 3)))


LAYERS = {
    "plain": lambda: Plain(3, 6, 3, padding=1),
    "static": lambda: StaticSame(3, 6, 3, stride=2),
    "dynamic": lambda: DynamicSame(3, 6, 3, stride=2),
    "timm same": lambda: Conv2dSame(3, 6, 3, stride=2),
    "standardised": lambda: StdConv2d(3, 6, 3),
    "standardised, padded": lambda: StdConv2dSame(3, 6, 3, stride=2, padding="same"),
    "scaled standardised": lambda: ScaledStdConv2dSame(3, 6, 3, stride=2, padding="same"),
}


def net_of(layer: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(layer, nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), Equalised(6, 4))
    net[1].running_mean.uniform_(-0.3, 0.3)
    net[1].running_var.uniform_(0.5, 2.0)
    return net.eval()


def calibrated(net: nn.Module, x: Tensor, rules: Any = "int8-ort") -> nn.Module:
    model = tq.quantize(net, rules, x)
    with torch.no_grad(), tq.qmodule_state(model, S.CALIBRATION):
        model(x)
    tq.set_qmodule_state(model, S.QUANT_EVAL)
    return model


def n_quantized(model: nn.Module) -> int:
    return sum(q is not None for m in model.modules() if isinstance(m, tq.QModule) for _, _, q in m.weights())


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_with_a_forward_of_its_own_is_quantized_on_what_it_computes(name: str) -> None:
    net, x = net_of(LAYERS[name]()), torch.randn(4, 3, 11, 11)
    model = tq.quantize(net, "int8-ort", x)
    assert [type(m).__name__ for m in (model[0], model[5])] == ["QWrapper", "QWrapper"]
    assert torch.equal(model(x), net(x))
    model = calibrated(net, x)
    taken: list[Tensor] = []
    conv = F.conv2d
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "conv2d", lambda x, w, *a, **k: (taken.append(w), conv(x, w, *a, **k))[1])
        net[0](x)  # what a spy in the float layer sees, the wrapper holds
    if taken:
        assert torch.equal(model[0].weights()[0][1], taken[0])
    wrapper = model[0]
    folded = wrapper.weight_quantizer.quantize(wrapper.float_weight())
    assert (folded - wrapper.float_weight()).abs().max() < wrapper.float_weight().abs().max() / 250
    assert (model(x) - net(x)).abs().max() < 0.05 * net(x).abs().max() + 0.02


@pytest.mark.parametrize("name", ["static", "standardised, padded"])
def test_it_exports_and_packs(name: str, tmp_path: Path) -> None:
    net, x = net_of(LAYERS[name]()), torch.randn(4, 3, 11, 11)
    model = calibrated(net, x)
    y = model(x)
    export_onnx(model, tmp_path / "net.onnx", x)
    certificate = certify(model, tmp_path / "net.onnx", [x])
    assert certificate.passed, str(certificate)
    assert "QLinearConv" in str(certificate)
    assert torch.equal(load_packed(save_packed(model, tmp_path / "net.safetensors"), net)(x), y)


@pytest.mark.parametrize("name", ["dynamic", pytest.param("scaled standardised", marks=pytest.mark.slow)])
def test_it_compiles_copies_and_trains(name: str) -> None:
    net, x = net_of(LAYERS[name]()), torch.randn(4, 3, 11, 11)
    model = calibrated(net, x)
    y = model(x)
    assert torch.equal(torch.compile(model, fullgraph=True, backend="eager")(x), y)
    assert torch.equal(copy.deepcopy(model)(x), y)
    tq.set_qmodule_state(model.train(), S.QUANT_AWARE_TRAIN)
    model(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("conv", [Plain, StdConv2d])
def test_blocks_that_go_another_way_in_training_keep_their_layers(conv: type[nn.Conv2d]) -> None:
    net, x = Blocks(conv).eval(), torch.randn(2, 3, 13, 13)
    model = tq.quantize(net, "w8a8", x)
    assert n_quantized(model) == 4
    assert isinstance(model.blocks[1].conv, QWrapper)
    assert model.blocks[1].conv.bn is not None
    assert torch.equal(model(x), net(x))


def test_rules_by_type_select_the_classes_below_too() -> None:
    net, x = net_of(Conv2dSame(3, 6, 3)), torch.randn(2, 3, 9, 9)
    for kind in ("Conv2d", "Conv2dSame"):
        plan = tq.QuantPlan.from_rules([{"types": [kind], "weight": "affine:8/channel"}], net, x)
        assert [site.path for site in plan.sites] == ["0"]
    assert capture(net, x).sites[0].types == ("Conv2d", "Conv2dSame")

    class Below(Conv2dSame):
        pass

    assert capture(net_of(Below(3, 6, 3)), x).sites[0].types == ("Conv2d", "Conv2dSame", "Below")


def test_the_ready_sets_quantize_all_of_a_network_of_timm() -> None:
    net = timm.create_model("tf_efficientnet_lite0").eval()
    sites = tq.QuantPlan.from_rules("int8-ort", net).sites
    assert sum(site.weight is not None for site in sites) == sum(p.ndim > 1 for p in net.parameters())


class Twice(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.weight), self.weight, self.bias)


class Behind(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)
        y *= 2
        return y


class Modulated(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * (1 + x.mean()), self.bias)


class Noisy(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight + torch.randn_like(self.weight) if self.training else self.weight, self.bias)


class Counting(nn.Linear):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return F.linear(x, self.weight, self.bias)


class Writing(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        self.weight.data.clamp_(-0.01, 0.01)
        return F.linear(x, self.weight, self.bias)


class Needs(nn.Linear):
    def forward(self, x: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
        return F.linear(x * scale, self.weight, self.bias)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Twice, "it has 2 products, not one linear"),
        (Behind, "it computes on behind its linear"),
        (Modulated, "depends on its input"),
        (Noisy, "it draws random numbers"),
        (Counting, "it changes what hangs on it"),
        (Writing, "it changes what hangs on it"),
        (Needs, "it does not run on a sample"),
    ],
)
def test_a_forward_that_is_more_than_one_product_is_none_and_the_plan_says_why(kind: type[nn.Linear], why: str) -> None:
    layer = kind(4, 4)
    before, random = copy.deepcopy(layer.state_dict()), torch.get_rng_state()
    assert row_of(layer) is None
    assert why in why_no_layer(layer)
    assert torch.equal(random, torch.get_rng_state())
    assert torch.equal(layer.weight, before["weight"])
    assert layer.__dict__.get("calls") is None
    captured = capture(nn.Sequential(nn.Linear(4, 4), layer))
    assert any(why in left.why for left in captured.floats if left.path.startswith("1"))


def test_what_cannot_be_done_to_a_computed_weight_is_refused() -> None:
    wrapper = QWrapper([StdConv2d(3, 6, 3), nn.BatchNorm2d(6)], tq.make_quantizer("affine:4,symmetric=narrow"), None)
    with pytest.raises(ConfigError, match="computes the weight"):
        wrapper.fold()
    wrapper.observe_weight()
    with pytest.raises(ConfigError, match="track it without freeze_above"):
        OscillationTracker(wrapper, freeze_above=0.02)
    OscillationTracker(wrapper).step()
