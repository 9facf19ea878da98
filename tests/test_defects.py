"""Defects of the published codes this one grows out of: each was real, none may come back."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import torchquant as tq
from tests.oracles import GOLDEN
from torchquant.errors import UnobservedRangeError
from torchquant.quantizers_functional.esb import ESB_ALPHA

S = tq.QModuleState


def observed(quantizer: tq.Quantizer, x: torch.Tensor) -> tq.Quantizer:
    quantizer.pre_observe(x)
    return quantizer


def test_qfmt_clamps_codes_not_values() -> None:
    """Published: codes were clamped to +-2**int_bits; 8 bits on [-1, 1] collapsed to +-1/32."""
    defect = GOLDEN["golden"]["qfmt_published_defect"]
    x = torch.tensor(defect["x"])
    y = observed(tq.QfmtQuantizer(8, True, tq.BatchMinMax()), x)(x)
    assert y.tolist() == defect["x"]
    assert y.tolist() != defect["dequant"]
    ramp = torch.linspace(-0.9, 0.9, 2001)
    q = observed(tq.QfmtQuantizer(8, True, tq.BatchMinMax()), ramp)
    assert float((q(ramp) - ramp).abs().max()) <= float(q.affine_params().delta) / 2


def test_qfmt_exact_power_of_two_and_zeros() -> None:
    """Published: floor(log2)+1 for both ends lost a bit at lo = -2**k; zeros gave log2(0)."""
    assert observed(tq.QfmtQuantizer(8, True, tq.BatchMinMax()), torch.tensor([-1.0, 0.5]))(
        torch.tensor([-1.0])
    ).tolist() == [-1.0]
    zeros = torch.zeros(4)
    assert observed(tq.QfmtQuantizer(8, True, tq.BatchMinMax()), zeros)(zeros).tolist() == [0.0] * 4


def test_the_gradient_mask_is_computed_on_the_input() -> None:
    """Published: masked on the quantized value against the observed range: -10 -> -10.32 lost its gradient,
    and x = -5 outside [-1, 1] kept it."""
    q = observed(tq.AffineQuantizer(4, tq.BatchMinMax(), gradient_clip=True), torch.tensor([3.9, 7.2, -10.0]))
    x = torch.tensor([3.9, 7.2, -10.0], requires_grad=True)
    q(x).sum().backward()
    assert x.grad.tolist() == [1.0, 1.0, 1.0]
    q.observer.force_ranges(-1.0, 1.0)
    x = torch.tensor([-5.0, 0.3], requires_grad=True)
    q(x).sum().backward()
    assert x.grad.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("symmetric", [False, True, "narrow", "full"])
def test_one_sided_and_empty_ranges(symmetric: bool | str) -> None:
    """Published: symmetric with positive data raised AttributeError, a zero range gave NaN."""
    for x in (torch.rand(9) + 1, -torch.rand(9) - 1, torch.zeros(9)):
        y = observed(tq.AffineQuantizer(4, tq.BatchMinMax(), symmetric), x)(x)
        assert y.isfinite().all()
        assert float((y - x).abs().max()) <= 0.3


def test_the_published_symmetric_grid_and_the_ones_that_reach_the_maximum() -> None:
    """Published symmetric grid: +-1 at 4 bits becomes +-0.933; kept under True, mended under narrow and full."""
    x = torch.tensor([-1.0, 1.0])
    grids = {s: observed(tq.AffineQuantizer(4, tq.BatchMinMax(), s), x)(x).tolist() for s in (True, "narrow", "full")}
    assert grids[True] == pytest.approx([-14 / 15, 14 / 15])
    assert observed(tq.AffineQuantizer(4, tq.BatchMinMax(), True), x).affine_params().delta == 2 / 15
    assert grids["narrow"] == [-1.0, 1.0]
    assert grids["full"] == [-1.0, 1.0]


def test_forced_ranges_are_returned_and_reload() -> None:
    """Published: get_ranges divided by 1 - momentum**0 after force_ranges; None buffers did not load."""
    observer = tq.ExpAvgMinMax()
    observer.force_ranges(-1.0, 3.0)
    assert observer.get_ranges() == (-1.0, 3.0)
    other = tq.ExpAvgMinMax()
    other.load_state_dict(observer.state_dict(), strict=True)
    assert other.get_ranges() == (-1.0, 3.0)


def test_dilation_and_padding_mode_are_kept() -> None:
    """Published: F.conv2d was called without them; 7x7 came out where the layer gives 5x5."""
    layer = nn.Conv2d(1, 1, 3, dilation=2, padding=1, padding_mode="circular")
    wrapper = tq.QWrapper(layer, tq.AffineQuantizer(16, tq.BatchMinMax()), None)
    x = torch.randn(1, 1, 9, 9)
    with tq.qmodule_state(wrapper, S.QUANT_AWARE_TRAIN):
        assert torch.allclose(wrapper(x), layer(x), atol=1e-3)


def test_fold_bn_is_not_ignored() -> None:
    """Published: fold_bn=True did nothing."""
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)]
    layers[1].weight.data = torch.tensor([0.01, 1.0, 3.0, 10.0])
    shapes = {}
    for fold in (False, True):
        wrapper = tq.QWrapper(layers, tq.AffineQuantizer(8, tq.BatchMinMax(0), "narrow"), None, fold_bn=fold).eval()
        tq.observe_weights(wrapper)
        shapes[fold] = wrapper.weight_quantizer.affine_params().delta
    factor = layers[1].weight / torch.sqrt(layers[1].running_var + layers[1].eps)
    assert torch.allclose(shapes[True], shapes[False] * factor)


def test_asking_too_early_says_what_to_do() -> None:
    """Published: AttributeError('') with no message."""
    with pytest.raises(UnobservedRangeError, match="has seen no data"):
        tq.AffineQuantizer(8, tq.BatchMinMax())(torch.ones(1))


def test_state_context_is_reentrant() -> None:
    """Published: the list of former modes grew with every use and gave back the wrong ones."""
    op = tq.QOp(abs, None)
    context = tq.qmodule_state(op, S.QUANT_EVAL)
    with context, context:
        pass
    assert op.state is S.BYPASSED


def test_no_activation_is_kept_after_forward() -> None:
    """Published: forward stored its last activation on the module."""
    wrapper = tq.QWrapper([nn.Linear(3, 3), nn.ReLU()], None, tq.AffineQuantizer(8, tq.ExpAvgMinMax()))
    with tq.qmodule_state(wrapper, S.QUANT_AWARE_TRAIN):
        wrapper(torch.randn(2, 3))
    held = [v for m in wrapper.modules() for v in vars(m).values() if isinstance(v, torch.Tensor)]
    assert held == []


def test_esb_has_a_gradient() -> None:
    """AutoQNN: the returned tensor had requires_grad=False, so weights never trained."""
    x = torch.randn(20, requires_grad=True)
    observed(tq.ESBQuantizer(4, 1), x)(x).sum().backward()
    assert x.grad.tolist() == [1.0] * 20


def test_esb_constants_are_the_global_optima() -> None:
    """AutoQNN: (9,7) was a copy of (8,6), (4,0) and (5,1) local optima, e=4 missing; e=1 used another grid."""
    for pair, alpha in ESB_ALPHA.items():
        assert alpha == pytest.approx(GOLDEN["esb"]["N(0,1)"][f"{pair[0]},{pair[1]}"]["alpha"], rel=1e-8)
    q = tq.ESBQuantizer(4, 2)
    q.force(1.0)
    assert q.levels().diff().unique().tolist() == [0.25]


def test_esb_per_channel_clones_right() -> None:
    """AutoQNN: cloning a per-channel ESB crashed."""
    import copy

    x = torch.randn(3, 5)
    q = observed(tq.ESBQuantizer(4, 1, axis=0), x)
    assert torch.equal(copy.deepcopy(q)(x), q(x))


@pytest.mark.parametrize("make", [tq.TernaryQuantizer, lambda: tq.ESBQuantizer(4, 1)])
def test_zeros_give_zeros_without_a_warning(make: object) -> None:
    """AutoQNN: ternary (and others) gave NaN on an all-zero tensor."""
    x = torch.zeros(6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert observed(make(), x)(x).tolist() == [0.0] * 6


@pytest.mark.parametrize("name", tq.QUANTIZERS)
def test_no_more_than_two_to_the_bits_values(name: str) -> None:
    """AutoQNN: `x + (q - x)` gave 17 to 25 distinct values at 4 bits; FixedQuant did not clamp."""
    x = 0.1 * torch.randn(5000)
    for q in tq.QUANTIZERS[name].examples():
        assert observed(q, x)(8 * x.requires_grad_()).unique().numel() <= 2**q.n_bits


def test_the_average_is_not_pulled_to_its_start() -> None:
    """AutoQNN: an average that starts at 0 or 1 without correction gave 0.029 after one N(0, 1) batch."""
    observer = tq.ExpAvgMinMax(momentum=0.99)
    observer.observe_batch(torch.tensor([-3.0, 3.0]))
    assert observer.get_ranges() == (-3.0, 3.0)


def test_running_statistics_under_folding_are_those_of_the_float_layer() -> None:
    """NNI 2.x: from step 1 the statistics came from the folded, quantized convolution."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)]
    for mode in ("running", "batch", "corrected"):
        wrapper = tq.QWrapper(
            [nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)], tq.TernaryQuantizer(), None, fold_bn=mode
        ).train()
        plain = nn.Sequential(*[type(m)(*a) for m, a in zip(layers, [(1, 2, 3), (2,)], strict=True)]).train()
        plain[0].load_state_dict(wrapper.layer.state_dict())
        tq.set_qmodule_state(wrapper, S.QUANT_AWARE_TRAIN)
        for _ in range(3):
            x = torch.randn(4, 1, 6, 6)
            wrapper(x)
            plain(x)
        assert torch.allclose(wrapper.bn.running_mean, plain[1].running_mean)
        assert torch.allclose(wrapper.bn.running_var, plain[1].running_var)


def test_gradients_are_not_edited_in_place() -> None:
    """NNI: grad_output[mask] = 0 changed the gradient of other consumers."""
    q = observed(tq.AffineQuantizer(4, tq.BatchMinMax(), gradient_clip=True), torch.tensor([-1.0, 1.0]))
    x = torch.tensor([-9.0, 0.5], requires_grad=True)
    upstream = torch.ones(2)
    q(x).backward(upstream)
    assert upstream.tolist() == [1.0, 1.0]
    assert x.grad.tolist() == [0.0, 1.0]
