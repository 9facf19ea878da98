"""QWrapper and QOp: every layer behaves as the plain one, every pattern, every state."""

from __future__ import annotations

import copy
import itertools
import operator

import pytest
import torch
from efficientnet_pytorch.utils import (
    Conv2dDynamicSamePadding,
    Conv2dStaticSamePadding,
    MemoryEfficientSwish,
    Swish,
)
from torch import Tensor, nn

import torchquant as tq
from torchquant.errors import ConfigError, NameClashError, UnobservedRangeError, UnsupportedPatternError
from torchquant.qmodule import ActivationPattern, LayerPattern
from torchquant.quantizers import Quantizer

S = tq.QModuleState
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class Same(Quantizer):
    """Returns a copy: takes the quantizing path and changes nothing."""

    def quantize(self, x: Tensor) -> Tensor:
        return x.clone()


def conv_cases() -> list:
    cases = []
    for rank in (1, 2, 3):
        for mode, settings in itertools.product(
            ("zeros", "reflect", "replicate", "circular"),
            (
                {},
                {"dilation": 2, "padding": 2},
                {"groups": 2, "stride": 2, "padding": 1},
                {"bias": False, "padding": "same"},
            ),
        ):
            cases.append(
                pytest.param(lambda r=rank, m=mode, s=settings: CONVS[r](4, 6, 3, padding_mode=m, **s), rank, 4)
            )
        for settings in (
            {},
            {"stride": 2, "output_padding": 1, "padding": 1},
            {"groups": 2, "dilation": 2},
            {"bias": False, "stride": 3},
        ):
            cases.append(pytest.param(lambda r=rank, s=settings: TRANSPOSED[r](4, 6, 3, **s), rank, 4))
    for kind, settings in itertools.product(
        (Conv2dDynamicSamePadding, Conv2dStaticSamePadding),
        ({}, {"stride": 2}, {"groups": 2, "dilation": 2, "bias": False}),
    ):
        image = {"image_size": 9} if kind is Conv2dStaticSamePadding else {}
        cases.append(pytest.param(lambda k=kind, s={**settings, **image}: k(4, 6, 3, **s), 2, 4))
    cases.append(pytest.param(lambda: nn.Linear(4, 6), 0, 4))
    cases.append(pytest.param(lambda: nn.Linear(4, 6, bias=False), 0, 4))
    return cases


@pytest.mark.parametrize(("make", "rank", "channels"), conv_cases())
def test_every_geometry_is_that_of_the_plain_layer(make: object, rank: int, channels: int) -> None:
    layer = make()
    x = torch.randn(2, channels, *[9] * rank)
    wrapper = tq.QWrapper(copy.deepcopy(layer), Same(), Same())
    for state in (S.BYPASSED, S.QUANT_AWARE_TRAIN, S.QUANT_EVAL):
        with tq.qmodule_state(wrapper, state):
            assert torch.equal(wrapper(x), layer(x))
    if rank:
        with_bn = tq.QWrapper([copy.deepcopy(layer), NORMS[rank](6)], Same(), Same(), fold_bn=True).eval()
        with_bn.bn.running_mean.fill_(0.5)
        plain = nn.Sequential(layer, with_bn.bn)
        with tq.qmodule_state(with_bn, S.QUANT_EVAL):
            assert torch.allclose(with_bn(x), plain(x), atol=1e-5)


def test_weight_quantizers_see_the_output_channel_first() -> None:
    seen = []

    class Spy(Same):
        def pre_observe(self, x: Tensor) -> None:
            seen.append(tuple(x.shape))

    for layer in (nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose2d(4, 6, 3), nn.ConvTranspose2d(4, 6, 3, groups=2)):
        with tq.qmodule_state(tq.QWrapper(layer, Spy(), None), S.CALIBRATION) as wrapper:
            wrapper(torch.randn(1, 4, 5, 5))
    assert seen == [(6, 2, 3, 3), (6, 4, 3, 3), (6, 2, 3, 3)]


def test_transposed_groups_have_a_scale_for_each_true_output_channel() -> None:
    layer = nn.ConvTranspose2d(4, 6, 3, groups=2)
    gains = torch.tensor([1.0, 10.0, 100.0, 1e3, 1e4, 1e5])
    wrapper = tq.QWrapper(layer, tq.AffineQuantizer(8, tq.BatchMinMax(axis=0), "narrow"), None)
    with torch.no_grad():
        weight = layer.weight.view(2, 2, 3, 3, 3)
        weight *= gains.view(2, 1, 3, 1, 1)
    with tq.qmodule_state(wrapper, S.CALIBRATION):
        wrapper(torch.randn(1, 4, 5, 5))
    absmax = layer.weight.view(2, 2, 3, 3, 3).abs().amax((1, 3, 4)).flatten()
    assert torch.allclose(wrapper.weight_quantizer.affine_params().delta, absmax / 127)


class Counting(tq.AffineQuantizer):
    """Counts how often it is shown a tensor."""

    seen = 0

    def pre_observe(self, x: Tensor) -> None:
        super().pre_observe(x)
        self.seen += 1


@pytest.mark.parametrize("fold_bn", [False, True])
def test_calibration_observes_a_weight_once_and_again_when_it_changed(fold_bn: bool) -> None:
    quantizer = Counting(8, tq.BatchMinMax(axis=0))
    wrapper = tq.QWrapper([nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)], quantizer, None, fold_bn=fold_bn).eval()
    x = torch.randn(2, 2, 4, 4)

    def seen_by(*changes: object) -> int:
        before = quantizer.seen
        wrapper(x)
        return quantizer.seen - before

    tq.set_qmodule_state(wrapper, S.CALIBRATION)
    assert [seen_by(), seen_by(), seen_by()] == [1, 0, 0]
    assert seen_by(wrapper.layer.weight.detach().mul_(2.0)) == 1
    assert torch.equal(quantizer.observer.range_max, wrapper.float_weight().amax((1, 2, 3)))
    assert seen_by(wrapper.bn.running_var.mul_(4.0)) == int(fold_bn)
    assert torch.equal(quantizer.observer.range_max, wrapper.float_weight().amax((1, 2, 3)))
    assert seen_by(wrapper.load_state_dict(wrapper.state_dict())) == 1
    assert seen_by(quantizer.observer.reset()) == 1
    assert seen_by(setattr(wrapper.layer, "weight", nn.Parameter(wrapper.layer.weight.detach().clone()))) == 1
    wrapper.layer.weight.data.mul_(3.0)  # unseen by the version counter, seen when the state is entered
    assert seen_by(tq.set_qmodule_state(wrapper, S.CALIBRATION)) == 1
    assert copy.deepcopy(wrapper)(x).shape == x.shape[:1] + (3, 4, 4)
    tq.set_qmodule_state(wrapper, S.QUANT_AWARE_TRAIN)
    assert [seen_by(), seen_by()] == [1, 1]


def test_calibration_shows_every_batch_to_a_weight_quantizer_with_memory() -> None:
    quantizer = Counting(8, tq.ExpAvgMinMax())
    with tq.qmodule_state(tq.QWrapper(nn.Linear(2, 3), quantizer, None), S.CALIBRATION) as wrapper:
        wrapper(torch.randn(4, 2))
        wrapper(torch.randn(4, 2))
    assert quantizer.seen == 2


ACTIVATIONS = [nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.GELU, nn.Sigmoid, nn.LeakyReLU, nn.PReLU]
ACTIVATIONS += [MemoryEfficientSwish, Swish]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", [False, True])
def test_every_pattern_in_every_state(activation: type[nn.Module], norm: bool) -> None:
    layers = [nn.Conv2d(3, 4, 3), *([nn.BatchNorm2d(4)] if norm else []), activation()]
    plain = nn.Sequential(*copy.deepcopy(layers))
    wrapper = tq.QWrapper(
        layers, tq.AffineQuantizer(8, tq.BatchMinMax(0), "narrow", True), tq.AffineQuantizer(8, tq.ExpAvgMinMax())
    )
    x = torch.randn(4, 3, 6, 6)
    assert torch.equal(wrapper(x), plain(x))
    with tq.qmodule_state(wrapper, S.CALIBRATION):
        assert torch.equal(wrapper(x), plain(x))
    for state in S:
        with tq.qmodule_state(wrapper, state):
            y = wrapper(x)
        y.sum().backward()
        assert all(bool(p.grad.isfinite().all()) for p in wrapper.parameters())
        if state.is_act_quantized:
            assert y.unique().numel() <= 256


@pytest.mark.parametrize("state", list(S))
def test_the_state_decides_who_is_called(state: S) -> None:
    calls: list[str] = []

    class Spy(Same):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def pre_observe(self, x: Tensor) -> None:
            calls.append(f"{self.name} pre")

        def quantize(self, x: Tensor) -> Tensor:
            calls.append(f"{self.name} quantize")
            return x

        def post_observe(self, x: Tensor) -> None:
            calls.append(f"{self.name} post")

    wrapper = tq.QWrapper(nn.Linear(2, 2), Spy("w"), Spy("a"), input_quantizer=Spy("i"))
    with tq.qmodule_state(wrapper, state):
        wrapper(torch.ones(1, 2))
    expected = []
    for name, observes, quantizes in (
        ("i", state.is_act_observed, state.is_act_quantized),
        ("w", state.is_weight_observed, state.is_weight_quantized),
        ("a", state.is_act_observed, state.is_act_quantized),
    ):
        expected += [f"{name} pre"] * observes + [f"{name} quantize", f"{name} post"] * quantizes
    assert calls == expected


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6])
@pytest.mark.parametrize("clip", [False, True])
def test_an_absorbed_activation_gives_the_same_values_ranges_and_gradients(
    activation: type[nn.Module], clip: bool
) -> None:
    class Separate(tq.AffineQuantizer):
        def quantize(self, x: Tensor) -> Tensor:  # overriding switches the fused pass off
            return super().quantize(x)

    assert tq.AffineQuantizer.fuses_clamp
    assert not Separate.fuses_clamp
    layers = [nn.Linear(5, 7), activation()]
    x = 3 * torch.randn(64, 5)
    results = []
    for kind in (tq.AffineQuantizer, Separate):
        wrapper = tq.QWrapper(copy.deepcopy(layers), None, kind(4, tq.ExpAvgMinMax(), gradient_clip=clip))
        with tq.qmodule_state(wrapper, S.QUANT_AWARE_TRAIN):
            for factor in (1.0, 3.0):
                y = wrapper(factor * x)
        y.backward(torch.ones_like(y))
        results.append((y, *wrapper.acts_quantizer.observer.get_ranges(), wrapper.layer.weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_qop_runs_any_operator() -> None:
    op = tq.QOp(operator.add, tq.AffineQuantizer(4, tq.BatchMinMax()), activation=nn.ReLU())
    a, b = torch.randn(50), torch.randn(50)
    assert torch.equal(op(a, b), (a + b).relu())
    with tq.qmodule_state(op, S.QUANT_AWARE_TRAIN):
        y = op(a, b)
    assert y.unique().numel() <= 16
    assert float((y - (a + b).relu()).abs().max()) < 0.2
    pool = tq.QOp(nn.AdaptiveAvgPool2d(1), None)
    assert pool(torch.ones(1, 2, 4, 4)).shape == (1, 2, 1, 1)


def test_patterns_are_extended_with_one_call() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3))

        def forward(self, x: Tensor) -> Tensor:
            return 2 * nn.functional.linear(x, self.weight)

    class Sine(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sin()

    with pytest.raises(
        UnsupportedPatternError, match=r"cannot wrap \[Scaled, Sine\].*Layers: Linear \[\+ BatchNorm1d\]"
    ):
        tq.QWrapper([Scaled(), Sine()], None, None)
    tq.register_pattern(Scaled, LayerPattern())
    tq.register_pattern(Sine, ActivationPattern())
    layers = nn.Sequential(Scaled(), Sine())
    wrapper = tq.QWrapper(copy.deepcopy(layers), Same(), None)
    x = torch.randn(2, 3)
    with tq.qmodule_state(wrapper, S.QUANT_EVAL):
        assert torch.equal(wrapper(x), layers(x))
    with pytest.raises(NameClashError, match="already has the row"):
        tq.register_pattern(Scaled, ActivationPattern())


@pytest.mark.parametrize(
    "layers",
    [
        [],
        [nn.ReLU()],
        [nn.Conv2d(1, 1, 1), nn.BatchNorm1d(1)],
        [nn.Conv2d(1, 1, 1), nn.ReLU(), nn.BatchNorm2d(1)],
        [nn.Linear(1, 1), nn.ReLU(), nn.ReLU()],
        [nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)],
        nn.LayerNorm(3),
    ],
)
def test_unsupported_patterns_list_what_is_supported(layers: object) -> None:
    with pytest.raises(
        UnsupportedPatternError, match=r"QWrapper cannot wrap \[.*ConvTranspose3d.*Activations: .*ReLU6"
    ):
        tq.QWrapper(layers, None, None)


def test_one_quantizer_for_two_sites_is_refused() -> None:
    quantizer = tq.AffineQuantizer(8, tq.BatchMinMax())
    with pytest.raises(ConfigError, match="a quantizer of its own"):
        tq.QWrapper(nn.Linear(1, 1), quantizer, quantizer)


@pytest.mark.parametrize("state", [S.QUANT_EVAL, S.QUANT_EVAL_WEIGHT_ONLY, S.QUANT_EVAL_ACT_ONLY])
def test_quantizing_before_any_data_names_the_module_and_the_ways_out(state: S) -> None:
    model = nn.Sequential(nn.Sequential(tq.QWrapper(nn.Linear(2, 2), tq.TernaryQuantizer(), tq.ESBQuantizer(4, 1))))
    tq.set_qmodule_state(model, state)
    site = "output" if state is S.QUANT_EVAL_ACT_ONLY else "weight"
    with pytest.raises(UnobservedRangeError, match=rf"0\.0: the {site} quantizer .*CALIBRATION.*force_ranges"):
        model(torch.ones(1, 2))


def test_observing_weights_needs_no_data() -> None:
    model = nn.Sequential(
        tq.QWrapper([nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)], tq.TernaryQuantizer(axis=0), None, fold_bn=True),
        tq.QOp(nn.Flatten(), None),
    ).eval()
    tq.observe_weights(model)
    with tq.qmodule_state(model, S.QUANT_EVAL):
        assert model(torch.randn(1, 1, 5, 5)).isfinite().all()
    expected = model[0].bn.weight / torch.sqrt(model[0].bn.running_var + model[0].bn.eps)
    folded = model[0].layer.weight * expected.view(-1, 1, 1, 1)
    assert torch.equal(model[0].float_weight(), folded)


def test_a_shared_wrapper_exports() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = tq.QWrapper([nn.Linear(3, 3), nn.ReLU()], tq.TernaryQuantizer(axis=0), Same())
            self.b = self.a

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    model = Twice()
    tq.observe_weights(model)
    tq.set_qmodule_state(model, S.QUANT_EVAL)
    x = torch.randn(2, 3)
    assert torch.equal(torch.export.export(model, (x,)).module()(x), model(x))
