"""A float checkpoint loads into the quantized model and the other way round; nothing else is taken for one."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from efficientnet_pytorch import EfficientNet
from torch import Tensor, nn
from torchvision import models as tv

from torchquant import AffineQuantizer, BatchMinMax, ExpAvgMinMax, QModuleState, set_qmodule_state, state_report
from torchquant.errors import ConfigError
from torchquant.models import FusedEfficientNet, FusedMobileNetV2, FusedResNet
from torchquant.models._base import FusedModel
from torchquant.qmodule import FloatCheckpoints, QWrapper
from torchquant.runs.small_resnet import QuantSmallResNet, SmallResNet

NAMES = ["resnet", "mobilenet", "efficientnet"]


def float_model(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    if name == "resnet":
        net: nn.Module = tv.ResNet(tv.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10)
    elif name == "mobilenet":
        net = tv.mobilenet_v2(num_classes=10, width_mult=0.35)
    else:
        net = EfficientNet.from_name("efficientnet-b0", num_classes=10, batch_norm_momentum=0.1)
    with torch.no_grad():
        net.train()(images())  # batch norm statistics that differ between seeds
    return net.eval()


def images() -> Tensor:
    return torch.randn(2, 3, 32, 32)


def fuse(net: nn.Module, **kwargs: Any) -> FusedModel:
    kinds = {EfficientNet: FusedEfficientNet, tv.MobileNetV2: FusedMobileNetV2, tv.ResNet: FusedResNet}
    return kinds[type(net)](
        net,
        weight_quantizer=lambda module: AffineQuantizer(4, BatchMinMax(axis=0), symmetric="narrow"),
        acts_quantizer=lambda module: AffineQuantizer(8, ExpAvgMinMax()),
        **kwargs,
    )


@torch.no_grad()
def calibrated(net: nn.Module, **kwargs: Any) -> FusedModel:
    """In QUANT_EVAL, with ranges from one batch."""
    fused = fuse(net, **kwargs).eval()
    set_qmodule_state(fused, QModuleState.CALIBRATION)
    fused(images())
    set_qmodule_state(fused, QModuleState.QUANT_EVAL)
    return fused


@torch.no_grad()
def bypassed(fused: nn.Module, x: Tensor) -> Tensor:
    copied = copy.deepcopy(fused)
    set_qmodule_state(copied, QModuleState.BYPASSED)
    return copied(x)


@pytest.mark.parametrize("quantize_fc", [False, True])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_float_checkpoint_loads_into_quantized_model(name: str, quantize_fc: bool) -> None:
    fused, other, x = calibrated(float_model(name), quantize_fc=quantize_fc), float_model(name, seed=1), images()
    report = str(state_report(fused))
    checkpoint = other.state_dict()
    given = dict(checkpoint)
    assert not torch.equal(bypassed(fused, x), other(x))
    result = fused.load_state_dict(checkpoint)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert torch.equal(bypassed(fused, x), other(x))
    assert str(state_report(fused)) == report  # states and ranges as before
    assert given.keys() == checkpoint.keys()  # the caller's dictionary is not touched


@pytest.mark.parametrize("quantize_fc", [False, True])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_quantized_model_gives_a_float_checkpoint(name: str, quantize_fc: bool) -> None:
    net, other, x = float_model(name), float_model(name, seed=1), images()
    other.load_state_dict(calibrated(net, quantize_fc=quantize_fc).float_state_dict())
    assert list(fuse(net).float_state_dict()) == list(net.state_dict())
    assert torch.equal(other(x), net(x))


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_quantized_checkpoint_loads_with_equal_output(name: str) -> None:
    fused, fresh, x = (
        calibrated(float_model(name), quantize_fc=True),
        fuse(float_model(name, 1), quantize_fc=True),
        images(),
    )
    fresh.load_state_dict(fused.state_dict())
    assert torch.equal(fresh.eval()(x), fused(x))
    assert str(state_report(fresh)) == str(state_report(fused))


@torch.no_grad()
def test_a_network_wrapped_by_hand() -> None:
    torch.manual_seed(0)
    net, other, x = SmallResNet().eval(), SmallResNet().eval(), torch.randn(2, 1, 16, 16)
    fused = QuantSmallResNet(net, lambda module: AffineQuantizer(4, BatchMinMax()), lambda module: None)
    other.load_state_dict(fused.float_state_dict())
    assert torch.equal(other(x), net(x))
    other = SmallResNet().eval()
    fused.load_state_dict(other.state_dict())
    assert torch.equal(fused(x), other(x))


def test_layers_left_out_are_named() -> None:
    class Half(FloatCheckpoints):
        def __init__(self, net: nn.Sequential) -> None:
            super().__init__()
            self.first = QWrapper(net[0], None, None)
            self.link_float_state(net)

    with pytest.raises(ConfigError, match=r"Half was built without 1.bias, 1.weight of the float model"):
        Half(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)))


@torch.no_grad()
def test_checkpoints_of_data_parallel_models() -> None:
    fused, other, x = calibrated(float_model("resnet")), float_model("resnet", seed=1), images()
    parallel = nn.DataParallel(fused)
    parallel.load_state_dict(nn.DataParallel(other).state_dict())
    assert torch.equal(bypassed(fused, x), other(x))
    parallel.load_state_dict(nn.DataParallel(calibrated(float_model("resnet", 2))).state_dict())
    assert torch.equal(bypassed(fused, x), float_model("resnet", 2)(x))


@torch.no_grad()
def test_copies_still_speak_float_checkpoints() -> None:
    fused, other, x = calibrated(float_model("resnet")), float_model("resnet", seed=1), images()
    for copied in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        copied.load_state_dict(other.state_dict(), assign=True)
        assert torch.equal(bypassed(copied, x), other(x))
        assert copied.float_state_dict().keys() == other.state_dict().keys()


def test_part_of_a_float_checkpoint() -> None:
    fused, other = calibrated(float_model("resnet"), quantize_fc=True), float_model("resnet", seed=1)
    backbone = {key: value for key, value in other.state_dict().items() if not key.startswith("fc.")}
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "fc.weight", "fc.bias"\. $'):
        fused.load_state_dict(backbone)
    before = fused.fc.layer.weight.clone()
    result = fused.load_state_dict(backbone, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["fc.weight", "fc.bias"], [])
    assert torch.equal(fused.fc.layer.weight, before)
    assert torch.equal(fused.float_state_dict()["layer1.0.conv1.weight"], other.layer1[0].conv1.weight)


def test_foreign_checkpoints_are_refused() -> None:
    net = float_model("resnet")
    fused = fuse(net)
    before = {key: value.clone() for key, value in fused.state_dict().items()}
    with pytest.raises(RuntimeError, match='Unexpected.*"layer1.1.conv1.weight"'):
        fused.load_state_dict(tv.resnet18(num_classes=10).state_dict())
    with pytest.raises(RuntimeError, match='Missing.*"fused_1.0.weight"'):
        fused.load_state_dict(float_model("mobilenet").state_dict())
    with pytest.raises(RuntimeError, match='Unexpected.*"conv1.weight"'):
        fused.load_state_dict({**fused.state_dict(), **net.state_dict()})
    fresh = fuse(float_model("resnet"))
    incomplete = {key: value for key, value in before.items() if "range_min" not in key}
    with pytest.raises(RuntimeError, match="Missing.*range_min"):
        fresh.load_state_dict(incomplete)
    with pytest.raises(RuntimeError, match="Unexpected"):
        net.load_state_dict(fused.state_dict())


@torch.no_grad()
def test_parameter_that_several_wrappers_share() -> None:
    """One PReLU after two convolutions and an addition: one key in the float model, three in the fused."""
    net, other = float_model("resnet"), float_model("resnet", seed=1)
    for model, slope in ((net, 0.1), (other, 0.7)):
        model.layer1[0].relu = nn.PReLU(init=slope)
    fused, x = fuse(net).eval(), images()
    fused.load_state_dict(other.state_dict())
    assert torch.equal(fused(x), other(x))
    assert fused.float_state_dict()["layer1.0.relu.weight"] == 0.7
    net.load_state_dict(fused.float_state_dict())
    assert torch.equal(net(x), other(x))
