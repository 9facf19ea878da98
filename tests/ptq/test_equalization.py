"""Changes that need the graph: the float function stays, and per-tensor weights gain."""

import copy
import re

import pytest
import torch
from torch import Tensor, nn

import torchquant as tq
from torchquant.ptq.algorithms.cle import CrossLayerEqualization
from torchquant.ptq.ends import column_ranges, row_ranges
from torchquant.ptq.paths import channel_sets


def bypassed(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad(), tq.qmodule_state(model, tq.QModuleState.BYPASSED):
        return model.eval()(x)


def quantized(net: nn.Module, x: Tensor, rules="w8a8") -> nn.Module:
    return tq.quantize(net.eval(), rules, x)


class Block(nn.Module):
    """An inverted residual block, as in MobileNetV2."""

    def __init__(self, act: type[nn.Module] = nn.ReLU):
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(8, 24, 1, bias=False), nn.BatchNorm2d(24), act()),
            *(nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False), nn.BatchNorm2d(24), act()),
            *(nn.Conv2d(24, 8, 1, bias=False), nn.BatchNorm2d(8)),
        )

    def forward(self, x):
        return x + self.body(x)


def mobile(act: type[nn.Module] = nn.ReLU, spread: float = 3.0) -> nn.Sequential:
    """Make a small network with residual additions, whose channels have very different scales."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), act(), Block(act), Block(act)),
        *(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), act()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)),
    )
    generator = torch.Generator().manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(0, 0.3, generator=generator)
    for one in channel_sets(net.eval(), torch.randn(1, 3, 8, 8)).sets if act is nn.ReLU else ():
        one.scale(torch.exp(spread * (torch.rand(one.n, generator=generator) - 0.5) * 2))
    return net


X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_cle_leaves_the_float_function(dtype, tolerance):
    net, x = mobile().to(dtype), X.to(dtype)
    model = quantized(net, x)
    report = tq.ptq.run(model, ["cle"], [x])
    error = (bypassed(model, x) - net(x)).abs().max() / net(x).abs().max()
    assert error <= tolerance
    assert re.match(
        r"6 sets of layers equalized in \d+ sweeps; left as they are, because it is an output", report.steps[0].note
    )


def test_cle_makes_the_ranges_of_a_pair_equal_in_one_sweep():
    torch.manual_seed(0)
    model = quantized(nn.Sequential(nn.Linear(6, 5, bias=False), nn.ReLU(), nn.Linear(5, 4)), torch.randn(4, 6))
    tq.ptq.run(model, ["cle:sweeps=1"], [torch.randn(4, 6)])
    (one,) = channel_sets(model, torch.randn(4, 6)).sets
    torch.testing.assert_close(row_ranges(one.producers[0].slot), column_ranges(one.readers[0]))


def test_cle_twice_is_cle_once():
    model = quantized(mobile(), X)
    tq.ptq.run(model, ["cle:sweeps=60"], [X])
    before = {k: v.clone() for k, v in model.state_dict().items() if k.endswith("weight")}
    CrossLayerEqualization().run(model, [X])
    for name, value in before.items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=2e-3, atol=1e-6)


def sqnr(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float(10 * torch.log10(y.square().mean() / (model(x) - y).square().mean()))


PER_TENSOR = [
    {"types": ["Conv2d", "Linear"], "weight": "affine:8,symmetric=narrow", "output": "affine:8", "fold_bn": True},
    {"types": ["add", "adaptive_avg_pool"], "output": "affine:8"},
]


def test_cle_gains_where_channels_are_badly_scaled():
    net = mobile()
    y = net(X).detach()
    plain, equal = quantized(net, X, PER_TENSOR), quantized(net, X, PER_TENSOR)
    tq.ptq.run(plain, ["calibrate", "nearest"], [X])
    tq.ptq.run(equal, ["cle", "calibrate", "nearest"], [X])
    assert sqnr(equal, X, y) > sqnr(plain, X, y) + 8.0


def test_ranges_must_be_calibrated_again():
    model = quantized(mobile(), X)
    tq.calibrate(model, [X])
    with pytest.raises(tq.errors.UnobservedRangeError):
        tq.ptq.run(model, ["cle", "gptq"], [X])


def test_cle_without_data_runs_on_noise_of_the_shape_of_the_example():
    model, other = quantized(mobile(), X), quantized(mobile(), X)
    tq.ptq.run(model, ["cle"], [X])
    tq.ptq.run(copy.deepcopy(other), ["cle"])
    tq.ptq.run(other, ["cle"])
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_cle_without_data_or_example_says_what_is_missing():
    model = tq.quantize(mobile(), "w8a8")
    with pytest.raises(tq.errors.ConfigError, match="give a batch, or quantize it with example_inputs"):
        tq.ptq.run(model, ["cle"])


def test_relu6_is_kept_and_named_or_replaced():
    net = mobile(nn.ReLU6)
    model, replaced = quantized(net, X), quantized(net, X)
    kept = tq.ptq.run(model, ["cle"], [X]).steps[0].note
    assert kept.startswith("0 sets of layers equalized")
    assert "because their values end at a bound that a factor would move: 0, 3.body.6, 4.body.6, 3.body.0" in kept
    torch.testing.assert_close(bypassed(model, X), net(X))
    note = tq.ptq.run(replaced, ["cle:relu6=replace"], [X]).steps[0].note
    assert note.startswith("6 sets of layers equalized")
    assert "6 ReLU6 became ReLU" in note
    open_ended = copy.deepcopy(net)
    for module in open_ended.modules():
        if type(module) is nn.ReLU6:
            module.__class__ = nn.ReLU
    torch.testing.assert_close(bypassed(replaced, X), open_ended(X), rtol=1e-5, atol=1e-5)
    bypassed(replaced.train(), X)
    twin = copy.deepcopy(replaced)
    reverted = twin.plan.revert(twin)
    torch.testing.assert_close(reverted.eval()(X), open_ended(X), rtol=1e-5, atol=1e-5)
    tq.ptq.run(replaced, ["calibrate", "nearest"], [X])
    assert sqnr(replaced, X, open_ended(X).detach()) > 20
    replaced.train()(X)  # a way of the forward that was not traced before


def test_a_large_bias_does_not_blow_up_activations():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    net[0].weight.data[0] *= 1e-4
    net[0].bias.data[0] = 3.0
    x = torch.randn(8, 4)
    heard, deaf = quantized(net, x), quantized(net, x)
    tq.ptq.run(heard, ["cle"], [x])
    tq.ptq.run(deaf, ["cle:bias_weight=0"], [x])
    assert bypassed(heard[0], x).abs().max() < 10 < bypassed(deaf[0], x).abs().max()


def test_activations_take_a_share_of_the_range():
    net = mobile()
    model = quantized(net, X)
    tq.ptq.run(model, ["cle:activations=1.0,alpha=0.75"], [X])
    torch.testing.assert_close(bypassed(model, X), net(X), rtol=1e-4, atol=1e-5)
    with pytest.raises(tq.errors.ConfigError, match="needs batches"):
        tq.ptq.run(quantized(net, X), ["cle:activations=1.0"])


def test_a_change_of_the_function_is_undone(monkeypatch):
    net = mobile()
    model = quantized(net, X)
    from torchquant.ptq.ends import Columns

    monkeypatch.setattr(Columns, "multiply", lambda self, factors: None)
    with pytest.raises(tq.errors.ConfigError, match="it was undone"):
        tq.ptq.run(model, ["cle"], [X])
    monkeypatch.undo()
    torch.testing.assert_close(bypassed(model, X), net(X), rtol=1e-5, atol=1e-5)


class Encoder(nn.Module):
    """A pre-norm block with attention and a gated product."""

    def __init__(self):
        super().__init__()
        self.before, self.middle, self.last = nn.LayerNorm(8), nn.RMSNorm(8), nn.LayerNorm(8)
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.gate, self.up, self.down = nn.Linear(8, 12, bias=False), nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        h = self.before(x)
        q, k, v = (f(h).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.o(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        h = self.middle(x)
        x = x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))
        return self.head(self.last(x)) + self.last(x).mean()


def test_norms_are_folded_into_their_readers():
    torch.manual_seed(0)
    net, x = Encoder().double().eval(), torch.randn(2, 5, 8).double()
    for norm in (net.before, net.middle, net.last):
        norm.weight.data.normal_()
        if getattr(norm, "bias", None) is not None:
            norm.bias.data.normal_()
    model = quantized(net, x)
    note = tq.ptq.run(model, ["fold_norm"], [x]).steps[-1].note
    torch.testing.assert_close(bypassed(model, x), net(x), rtol=1e-12, atol=1e-12)
    assert note == "2 norms; last is left: read by mean in the model"
    for norm in (model.before, model.middle):
        assert torch.equal(norm.weight, torch.ones_like(norm.weight))
    assert not model.before.bias.any()
    assert model.last.bias.any()


def test_values_and_gated_products_are_equalized():
    torch.manual_seed(0)
    net, x = Encoder().double().eval(), torch.randn(2, 5, 8).double()
    model = quantized(net, x)
    tq.ptq.run(model, ["cle"], [x])
    torch.testing.assert_close(bypassed(model, x), net(x), rtol=1e-12, atol=1e-12)
    assert [one.name for one in channel_sets(model, x).sets] == [
        *("before -> q, k, v", "v -> o", "middle -> gate, up", "up -> down")
    ]
