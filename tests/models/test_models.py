"""Fused models: the float model bit for bit when bypassed, and trainable, observable, saveable when not."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from efficientnet_pytorch import EfficientNet
from efficientnet_pytorch.utils import Conv2dDynamicSamePadding, Conv2dStaticSamePadding, MemoryEfficientSwish
from torch import Tensor, nn
from torchvision import models as tv

from torchquant import (
    AffineQuantizer,
    BatchMinMax,
    ExpAvgMinMax,
    QModuleState,
    QOp,
    Quantizer,
    QWrapper,
    qmodule_state,
    set_qmodule_state,
    state_report,
)
from torchquant.errors import ConfigError, MissingDependencyError, UnsupportedPatternError
from torchquant.models import FusedEfficientNet, FusedMobileNetV2, FusedResNet
from torchquant.models._base import FusedModel

SLOW_RESNETS = ["resnet34", "resnet101", "resnet152", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet101_2"]
SMALL = ["resnet18", "mobilenet_v2", "efficientnet-b0"]
FAST = [*SMALL, "resnet50", "resnext50_32x4d"]
SLOW = ["wide_resnet50_2", *SLOW_RESNETS, *(f"efficientnet-b{i}" for i in range(1, 8))]


def weight_quantizer(module: nn.Module) -> Quantizer:
    return AffineQuantizer(8, BatchMinMax(axis=0), symmetric="narrow")


def acts_quantizer(module: nn.Module) -> Quantizer:
    return AffineQuantizer(8, ExpAvgMinMax())


def float_model(name: str, **kwargs: Any) -> nn.Module:
    if name.startswith("efficientnet"):
        # one batch moves the running statistics by 90%: with the initial ones the activations fade to nothing
        return EfficientNet.from_name(name, **{"batch_norm_momentum": 0.1, **kwargs})
    return tv.get_model(name, weights=None, **kwargs)


def fuse(net: nn.Module, **kwargs: Any) -> FusedModel:
    kinds = {EfficientNet: FusedEfficientNet, tv.MobileNetV2: FusedMobileNetV2, tv.ResNet: FusedResNet}
    kind = next(fused for float_kind, fused in kinds.items() if isinstance(net, float_kind))
    return kind(net, **{"weight_quantizer": weight_quantizer, "acts_quantizer": acts_quantizer, **kwargs})


def small_model(name: str) -> nn.Module:
    return float_model(name, num_classes=10)


def images(size: int = 64) -> Tensor:
    return torch.randn(2, 3, size, size)


@torch.no_grad()
def assert_bypassed_equals_float(net: nn.Module, fused: FusedModel, x: Tensor) -> None:
    """In train mode with the same random state, and in eval mode with the statistics that this left."""
    outputs = []
    for model in (net, fused):
        torch.manual_seed(1)
        outputs.append(model.train()(x))
    assert torch.equal(*outputs)
    expected, found = net.state_dict(), fused.float_state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[key]) for key, value in expected.items())
    y = net.eval()(x)
    assert torch.equal(y, fused.eval()(x))
    assert not torch.equal(y[0], y[1])  # the images reach the output


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)])
def test_bypassed_equals_float_bit_for_bit(name: str) -> None:
    net = float_model(name)
    assert_bypassed_equals_float(net, fuse(net, quantize_first=True, quantize_fc=True), images())


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("resnet50", {"replace_stride_with_dilation": [False, True, True]}),
        ("mobilenet_v2", {"width_mult": 0.35}),
        ("efficientnet-b0", {"include_top": False}),
        ("efficientnet-b0", {"image_size": None}),
        ("efficientnet-b0", {"drop_connect_rate": None}),
    ],
    ids=str,
)
def test_bypassed_equals_float_in_variants(name: str, kwargs: dict[str, Any]) -> None:
    net = float_model(name, **kwargs)
    assert_bypassed_equals_float(net, fuse(net, quantize_first=False), images(65))


@pytest.mark.parametrize("name", SMALL)
def test_random_layers_are_random(name: str) -> None:
    """Guards the test above: with another random state, dropout and drop-connect give another output."""
    fused = fuse(small_model(name)).train()
    x = images()
    assert torch.equal(fused(x), fused(x)) == (name == "resnet18")


def test_float_model_stays_usable_and_independent() -> None:
    net = small_model("mobilenet_v2").eval()
    before = copy.deepcopy(net.state_dict())
    fused = fuse(net)
    set_qmodule_state(fused, QModuleState.QUANT_AWARE_TRAIN)
    fused.train()(images(32)).sum().backward()
    torch.optim.SGD(fused.parameters(), 1.0).step()
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert not any(isinstance(module, QWrapper) for module in net.modules())


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_all_states_run(name: str) -> None:
    x = images()
    fused = fuse(small_model(name), quantize_fc=True)
    fused.train()(x)
    fused.eval()
    with qmodule_state(fused, QModuleState.CALIBRATION):
        bypassed = fused(x)
    assert all(row.calibrated for row in state_report(fused))
    for state in QModuleState:
        with qmodule_state(fused, state):
            y = fused(x)
        assert y.shape == (2, 10)
        assert y.isfinite().all()
        quantizes = state.is_weight_quantized or state.is_act_quantized
        assert torch.equal(y, bypassed) == (not quantizes), state


@pytest.mark.parametrize("fold_bn", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_training_step_reaches_every_weight(name: str, fold_bn: bool) -> None:
    fused = fuse(small_model(name), quantize_fc=True, fold_bn=fold_bn).train()
    set_qmodule_state(fused, QModuleState.QUANT_AWARE_TRAIN)
    fused(images()).square().mean().backward()
    for key, parameter in fused.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.any(), key


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_fold_bn_reaches_every_wrapper_and_quantizes_close_to_float(name: str) -> None:
    net = small_model(name).train()
    x = images()
    for _ in range(5):
        net(x)  # running statistics that resemble the data
    fine = Recorder(lambda module: AffineQuantizer(12, BatchMinMax(axis=0), symmetric="narrow"))
    fused = fuse(net.eval(), fold_bn=True, weight_quantizer=fine)
    wrappers = [module for module in fused.modules() if isinstance(module, QWrapper)]
    assert all((module.fold_mode == "corrected") == (module.bn is not None) for module in wrappers)
    set_qmodule_state(fused, QModuleState.CALIBRATION)
    expected = fused(x)
    set_qmodule_state(fused, QModuleState.QUANT_EVAL_WEIGHT_ONLY)
    error = (fused(x) - expected).norm() / expected.norm()
    assert 0 < error < 0.03


def test_readme_snippet() -> None:
    full_precision_model = tv.resnet18()
    seen: list[nn.Module] = []

    def quantizer_for(module: nn.Module) -> Quantizer:
        seen.append(module)
        return AffineQuantizer(8, BatchMinMax())

    fused_model = FusedResNet(
        full_precision_model,
        weight_quantizer=lambda module: quantizer_for(module),
        acts_quantizer=lambda module: quantizer_for(module),
    )
    assert all(isinstance(module, nn.Conv2d) for module in seen)
    with qmodule_state(fused_model, QModuleState.QUANT_AWARE_TRAIN):
        assert fused_model(images(32)).shape == (2, 1000)


class Recorder:
    """A factory that remembers the layers it was given."""

    def __init__(self, factory: Callable[[nn.Module], Quantizer]) -> None:
        self.factory = factory
        self.layers: list[nn.Module] = []

    def __call__(self, module: nn.Module) -> Quantizer:
        self.layers.append(module)
        return self.factory(module)

    def names(self, fused: FusedModel) -> list[str]:
        """Float names of the layers, in the order of the calls."""
        float_names = {key: float_key for float_key, key in fused.float_keys}
        owners = {id(parameter): float_names[key] for key, parameter in fused.named_parameters()}
        return [owners[id(layer.weight)].removesuffix(".weight") for layer in self.layers]


def record(net: nn.Module, *names: str, **kwargs: Any) -> tuple[FusedModel, list[list[str]]]:
    recorders = {
        name: Recorder(weight_quantizer if name.endswith("weight_quantizer") else acts_quantizer) for name in names
    }
    fused = fuse(net, **recorders, **kwargs)
    return fused, [recorder.names(fused) for recorder in recorders.values()]


def layer_names(net: nn.Module, kind: type[nn.Module]) -> list[str]:
    return [name for name, module in net.named_modules() if isinstance(module, kind)]


@pytest.mark.parametrize(("name", "first"), [("resnet18", "conv1"), ("mobilenet_v2", "features.0.0")])
def test_weight_factory_gets_every_convolution_once(name: str, first: str) -> None:
    net = small_model(name)
    _, (weights, acts) = record(net, "weight_quantizer", "acts_quantizer", quantize_first=False)
    assert sorted(weights) == sorted(set(layer_names(net, nn.Conv2d)) - {first})
    assert set(acts) == set(weights)


def test_order_of_factory_calls() -> None:
    _, (weights, acts) = record(small_model("resnet18"), "weight_quantizer", "acts_quantizer")
    assert weights[4:7] == ["layer2.0.conv1", "layer2.0.conv2", "layer2.0.downsample.0"]
    assert acts[6:10] == ["layer2.0.conv1", "layer2.0.conv2", "layer2.0.downsample.0", "layer2.0.conv2"]
    _, (weights, acts) = record(small_model("efficientnet-b0"), "weight_quantizer", "acts_quantizer")
    layers = ["_expand_conv", "_depthwise_conv", "_se_reduce", "_se_expand", "_project_conv"]
    assert weights[:5] == ["_conv_stem", *(f"_blocks.0.{layer}" for layer in layers[1:])]
    assert weights[-6:] == [*(f"_blocks.15.{layer}" for layer in layers), "_conv_head"]
    sites = ["_expand_conv", "_depthwise_conv", "_depthwise_conv", "_se_reduce", "_se_expand", "_se_expand"]
    sites += ["_project_conv", "_project_conv"]
    assert [name for name in acts if name.startswith("_blocks.2.")] == [f"_blocks.2.{site}" for site in sites]
    assert [name for name in acts if name.startswith("_blocks.1.")] == [f"_blocks.1.{site}" for site in sites[:-1]]


FC = {"resnet18": "fc", "mobilenet_v2": "classifier.1", "efficientnet-b0": "_fc"}
FC_FACTORIES = ("avg_pool_quantizer", "fc_weight_quantizer", "fc_acts_quantizer")


@pytest.mark.parametrize("name", SMALL)
def test_fc_factories_get_the_last_layer(name: str) -> None:
    net = small_model(name)
    _, given = record(net, *FC_FACTORIES, quantize_fc=True)
    assert given == [[FC[name]]] * 3
    _, given = record(net, *FC_FACTORIES)
    assert given == [[], [], []]
    _, (weights, acts) = record(net, "weight_quantizer", "acts_quantizer", quantize_fc=True)
    assert (weights.count(FC[name]), acts.count(FC[name])) == (1, 2)


@pytest.mark.parametrize(("name", "default"), [("resnet18", False), ("mobilenet_v2", True), ("efficientnet-b0", True)])
def test_quantize_first(name: str, default: bool) -> None:
    net = small_model(name)
    stem = next(name for name, _ in net.named_modules() if isinstance(net.get_submodule(name), nn.Conv2d))
    for kwargs, expected in [({}, default), ({"quantize_first": True}, True), ({"quantize_first": False}, False)]:
        _, (weights,) = record(net, "weight_quantizer", **kwargs)
        assert (stem in weights) == expected


READERS = {"resnet18": "layer1.0.conv1", "mobilenet_v2": "features.1.conv.0.0", "efficientnet-b0": "_depthwise_conv"}


@torch.no_grad()
def input_of(fused: FusedModel, layer: nn.Module, x: Tensor) -> Tensor:
    """What `layer` reads while activations are quantized."""
    read: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    with qmodule_state(fused, QModuleState.QUANT_AWARE_TRAIN_ACT_ONLY):
        fused(x)
    hook.remove()
    return read[0]


@pytest.mark.parametrize("name", SMALL)
def test_input_quantizer_sits_where_the_first_quantized_layer_reads(name: str) -> None:
    net = small_model(name).eval()
    x = images(32)
    for quantize_first in (True, False):
        fused, (given,) = record(net, "input_quantizer", quantize_first=quantize_first)
        first = next(module for module in fused.modules() if isinstance(module, QWrapper))
        read = input_of(fused, first.layer, x)
        assert len(given) == 1
        assert given[0].endswith(READERS[name]) != quantize_first
        assert read.unique().numel() <= 256 < x.unique().numel()
    assert_bypassed_equals_float(net, fused, x)


def test_factories_may_leave_sites_float() -> None:
    net = small_model("efficientnet-b0")
    fused = fuse(net, weight_quantizer=lambda module: None, acts_quantizer=lambda module: None, quantize_fc=True)
    assert state_report(fused) == []
    set_qmodule_state(fused, QModuleState.QUANT_EVAL)
    assert_bypassed_equals_float(net, fused, images())


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_deepcopy_and_pickle(name: str) -> None:
    fused = fuse(small_model(name), quantize_fc=True).eval()
    x = images(32)
    set_qmodule_state(fused, QModuleState.CALIBRATION)
    fused(x)
    set_qmodule_state(fused, QModuleState.QUANT_EVAL)
    expected = fused(x)
    for copied in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert torch.equal(copied(x), expected)
        assert copied.float_keys == fused.float_keys


def test_modes_and_activations_are_those_of_the_float_model() -> None:
    net = small_model("resnet18").train()
    net.bn1.eval()
    net.layer1[0].relu = nn.Hardswish()
    fused = fuse(net)
    assert fused.training
    assert not next(module for module in fused.modules() if isinstance(module, nn.BatchNorm2d)).training
    assert [module.training for module in fused.modules()].count(False) == 1
    assert isinstance(fused.layer1[0].qadd_relu, QOp)
    assert isinstance(fused.layer1[0].qadd_relu.activation, nn.Hardswish)
    assert not any(module.training for module in fuse(net.eval()).modules())


class OwnForward(tv.ResNet):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class OwnBlock(tv.resnet.BasicBlock):
    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("kind", "build", "message"),
    [
        (FusedResNet, tv.mobilenet_v2, r"FusedResNet takes torchvision.*ResNet.*got torchvision.*MobileNetV2"),
        (FusedMobileNetV2, tv.resnet18, r"FusedMobileNetV2 takes torchvision.*MobileNetV2.*got torchvision.*ResNet"),
        (FusedEfficientNet, tv.resnet18, r"FusedEfficientNet takes efficientnet_pytorch.*EfficientNet.*got.*ResNet"),
        (FusedResNet, lambda: OwnForward(tv.resnet.BasicBlock, [1] * 4), "keeps forward.*got.*OwnForward"),
        (FusedResNet, lambda: tv.ResNet(OwnBlock, [1] * 4), r"block takes .*BasicBlock or .*Bottleneck.*OwnBlock"),
        (FusedResNet, lambda: "resnet18", r"got builtins\.str"),
    ],
)
def test_wrong_net_is_refused(kind: type[FusedModel], build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kind(build(), weight_quantizer, acts_quantizer)


SHARED = AffineQuantizer(8, BatchMinMax())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"acts_quantizer": SHARED}, r"acts_quantizer must be a function of the layer.*got AffineQuantizer"),
        ({"weight_quantizer": None}, r"weight_quantizer must be a function of the layer.*got None"),
        ({"fc_acts_quantizer": 8}, "fc_acts_quantizer must be a function.*got 8"),
        ({"acts_quantizer": lambda module: SHARED}, "each site needs a quantizer of its own"),
        ({"acts_quantizer": lambda module: "affine:8"}, "must return a Quantizer or None, got 'affine:8'"),
        ({"fold_bn": "always"}, "fold_bn must be False, True or one of"),
    ],
)
def test_wrong_arguments_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fuse(tv.ResNet(tv.resnet.BasicBlock, [1] * 4), **kwargs)


def test_what_cannot_be_fused_is_refused() -> None:
    with pytest.raises(UnsupportedPatternError, match="GroupNorm"):
        fuse(tv.ResNet(tv.resnet.BasicBlock, [1] * 4, norm_layer=lambda channels: nn.GroupNorm(2, channels)))
    with pytest.raises(ConfigError, match="quantize_fc=True needs a last layer"):
        fuse(EfficientNet.from_name("efficientnet-b0", include_top=False), quantize_fc=True)
    net = small_model("resnet18")
    net.aux = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r"without aux.bias, aux.weight"):
        fuse(net)


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    net = small_model("resnet18")
    monkeypatch.setitem(sys.modules, "torchvision.models.resnet", None)
    with pytest.raises(MissingDependencyError, match="'torchvision', which is not installed"):
        fuse(net)


def test_import_needs_neither_torchvision_nor_efficientnet() -> None:
    code = (
        "import sys; sys.modules['torchvision'] = sys.modules['efficientnet_pytorch'] = None; "
        "import torchquant.models.efficientnet; from torchquant.models import FusedResNet, FusedMobileNetV2"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


class ExactQuantizer(Quantizer):
    """Takes the way of a quantizer and changes nothing, so that the output shows the layer's geometry."""

    def quantize(self, x: Tensor) -> Tensor:
        return x.clone()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [(8, 8), (7, 10)], ids=str)
@pytest.mark.parametrize(
    "geometry",
    [
        {"kernel_size": 3},
        {"kernel_size": 1},
        {"kernel_size": 5, "stride": 2},
        {"kernel_size": (3, 2), "stride": (2, 1), "dilation": (1, 2)},
        {"kernel_size": 3, "dilation": 2, "groups": 4},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [Conv2dStaticSamePadding, Conv2dDynamicSamePadding])
@torch.no_grad()
def test_same_padding_layers_run_as_the_plain_layer(
    kind: type[nn.Conv2d], geometry: dict[str, Any], size: tuple[int, int], bias: bool
) -> None:
    static = {"image_size": size} if kind is Conv2dStaticSamePadding else {}
    layer = kind(4, 8, bias=bias, **geometry, **static)
    bn, swish = nn.BatchNorm2d(8).eval(), MemoryEfficientSwish()
    x = torch.randn(2, 4, *size)
    wrapper = QWrapper([layer, bn, swish], ExactQuantizer(), ExactQuantizer()).eval()
    set_qmodule_state(wrapper, QModuleState.QUANT_EVAL)
    assert torch.equal(wrapper(x), swish(bn(layer(x))))
    folded = QWrapper([layer, bn, swish], ExactQuantizer(), None, fold_bn=True).eval()
    set_qmodule_state(folded, QModuleState.QUANT_EVAL)
    torch.testing.assert_close(folded(x), wrapper(x))


def compile_and_train(module: nn.Module, x: Tensor) -> None:
    """Two steps compiled and two eager ones: equal outputs, a gradient for every parameter."""
    set_qmodule_state(module, QModuleState.QUANT_AWARE_TRAIN)
    eager = copy.deepcopy(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(x), eager(x))
    compiled(x).square().mean().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.slow
def test_models_compile_in_one_graph(name: str) -> None:
    net = small_model(name)
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    fused = fuse(net)
    for module in fused.modules():
        if hasattr(module, "drop_connect_rate"):
            module.drop_connect_rate = 0.0
    compile_and_train(fused, images())


@pytest.mark.slow
def test_same_padding_and_memory_efficient_swish_compile_in_one_graph() -> None:
    compile_and_train(fuse(small_model("efficientnet-b0")).conv_stem, images(8))
