"""AutoQNN's quantizers as classes: all arguments of the base, subclasses of the user, widths that are learned."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchquant as tq
from torchquant.compat import autoqnn
from torchquant.compat.autoqnn.core import convert, freeze_bitwidths, precision_loss
from torchquant.compat.autoqnn.quantizers import PWL, PWL_C, STE, Quantization, get_diff_func
from torchquant.compat.autoqnn.quantizers.quantization import bitloss, round_clip
from torchquant.errors import ConfigError

SHIPPED = [name for name in autoqnn.quantizers.__all__ if name != "Quantization"]
BITS = {"Ternary": 2, "Binary": 1}
BASE = {
    "gradient_ratio": 0.25,
    "freeze_bitwidth": True,
    "target_bitwidth": 3,
    "max_bitwidth": 6,
    "backward_type": "pwl",
    "per_channel": True,
    "channel_axis": 1,
    "channel_size": 5,
}


class MaxScaled(Quantization):
    """A quantizer as AutoQNN's page tells its users to write one."""

    __constants__ = [*Quantization.__constants__, "floor"]

    def __init__(self, floor: float = 1e-8, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.extra_args.append("floor")
        self.floor = floor
        self.register_buffer("alpha", torch.tensor(1.0))

    def forward(self, input: Tensor) -> Tensor:
        with torch.no_grad():
            most = 2 ** (self.bitwidth - 1) - 1
            self.alpha = input.abs().max() / most + self.floor
            output = round_clip(input / self.alpha, -most, most) * self.alpha
        return self.diff_func(input, output, self.gradient_ratio)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))


def images() -> Tensor:
    return torch.randn(4, 3, 8, 8)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_class_takes_all_arguments_of_the_base_and_momentum(name: str) -> None:
    bits = BITS.get(name.removesuffix("Act"), 4)
    quantizer = getattr(autoqnn.quantizers, name)(bitwidth=bits, momentum=0.75, **BASE)
    assert isinstance(quantizer, Quantization)
    assert {key: getattr(quantizer, key) for key in BASE} == BASE
    assert (quantizer.n_bits, quantizer.bitwidth, quantizer.axis) == (bits, bits, 1)
    assert (float(quantizer.float_bitwidth), float(quantizer.shadow_bitwidth)) == (bits, bits)
    assert any(getattr(part, "momentum", None) == 0.75 for part in quantizer.modules())
    x = torch.randn(6, 5)
    quantizer.pre_observe(x)
    for other in (copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer))):
        assert torch.equal(other.eval()(x), quantizer.eval()(x))
    assert torch.equal(quantizer.decode(quantizer.encode(x)), quantizer(x))
    assert not quantizer.clone_quantizer().is_ready


@pytest.mark.parametrize("name", SHIPPED)
def test_a_class_without_arguments_has_the_published_width(name: str) -> None:
    published = {"Ternary": 2, "Binary": 1, "PotQ": 4}
    assert getattr(autoqnn.quantizers, name)().n_bits == published.get(name.removesuffix("Act"), 8)


@pytest.mark.parametrize(("name", "asked", "kept"), [("Ternary", 4, 2), ("BinaryAct", 8, 1), ("PotQAct", 8, 4)])
def test_a_width_that_a_scheme_does_not_have_is_said(name: str, asked: int, kept: int) -> None:
    with pytest.warns(UserWarning, match=f"{name} has {kept} bits, as in AutoQNN; bitwidth={asked} has no effect"):
        assert getattr(autoqnn.quantizers, name)(bitwidth=asked).n_bits == kept


def test_exponents_of_esb_have_at_most_four_bits_as_published() -> None:
    forms = [(4, 1, 1), (8, 1, 3), (8, 4, 4), (4, 4, 2)]
    assert [autoqnn.quantizers.ESB_PerChannel(b, k).significant_bits for b, k, _ in forms] == [k for *_, k in forms]


@pytest.mark.parametrize("name", ["VecQ", "uL2Q"])
def test_steps_of_your_own(name: str) -> None:
    quantizer = getattr(autoqnn.quantizers, name)(bitwidth=2, lambdas=[1.0, 0.5])
    w = torch.randn(2000)
    quantizer.pre_observe(w)
    first = "threshold_step" if name == "VecQ" else "step"
    assert float(quantizer.numbers()[first]) == pytest.approx(0.5 * float(w.std()), rel=1e-2)


def test_addresses_of_the_published_package() -> None:
    from torchquant.compat.autoqnn.core.module_convert import convert as at_its_file
    from torchquant.compat.autoqnn.core.train_evaluate import AverageMeter, top1
    from torchquant.compat.autoqnn.modules.conv import Conv2d
    from torchquant.compat.autoqnn.quantizers.binary import Binary
    from torchquant.compat.autoqnn.quantizers.esb import ESB_PerChannel
    from torchquant.compat.autoqnn.quantizers.fixedq import FixedQuant

    assert at_its_file is convert
    assert Conv2d is autoqnn.modules.Conv2d
    named = autoqnn.quantizers
    assert (Binary, ESB_PerChannel, FixedQuant) == (named.Binary, named.ESB_PerChannel, named.FixedQuant)
    assert (top1, AverageMeter) == (autoqnn.core.top1, autoqnn.core.AverageMeter)


def test_differentiable_tricks() -> None:
    x = torch.tensor([-2.0, 0.3, 0.9], requires_grad=True)
    fixed = torch.tensor([-1.0, 0.5, 1.0])
    for function, value, gradient in (
        (STE, fixed, [1.0, 1.0, 1.0]),
        (PWL, fixed + 0.25 * (x.detach() - fixed), [1.0, 1.0, 1.0]),
        (PWL_C, torch.tensor([-1.0, 0.45, 0.975]), [0.0, 1.0, 1.0]),
    ):
        y = function(x, fixed, 0.25)
        torch.testing.assert_close(y, value)
        assert torch.autograd.grad(y.sum(), x)[0].tolist() == gradient
    assert torch.equal(STE(x, fixed), fixed)
    with pytest.raises(ConfigError, match="backward_type must be one of ste, pwl, pwl-c, got 'tanh'"):
        get_diff_func("tanh")


def test_a_quantizer_of_the_user_is_converted_and_trains() -> None:
    given = {"weight_quant": MaxScaled(bitwidth=3, floor=1e-6), "act_quant": MaxScaled(bitwidth=8)}
    model = convert(net(), quantize_config_dict=given)
    model(images()).square().mean().backward()
    conv = model[0]
    assert type(conv.weight_quant) is MaxScaled
    assert conv.weight_quant is not given["weight_quant"]
    assert conv.weight_quant.floor == 1e-6
    assert conv.layer.weight.grad.abs().sum() > 0
    assert len(conv.weight_quant(conv.layer.weight).unique()) <= 7
    most = conv.layer.weight.abs().max() / 3
    codes = conv.weight_quant(conv.layer.weight) / most
    torch.testing.assert_close(codes, codes.round(), atol=1e-4, rtol=0)
    fresh = convert(net(), quantize_config_dict=given).eval()
    fresh.load_state_dict(model.state_dict(), strict=True)
    x = images()
    assert torch.equal(fresh(x), model.eval()(x))


def test_the_base_and_super_quantize_nothing() -> None:
    class Halved(Quantization):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) / 2

    x = torch.randn(3)
    assert torch.equal(Quantization()(x), x)
    assert torch.equal(Halved()(x), x / 2)
    given = {"weight_quant": autoqnn.quantizers.VecQ(4), "bias_quant": Quantization()}
    assert convert(net(), quantize_config_dict=given)[0].bias_quant is None


def learning(make: Any, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    given = {"weight_quant": make(freeze_bitwidth=False, **options)}
    model = convert(nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 5)), quantize_config_dict=given)
    return model, torch.optim.SGD(model.parameters(), 0.1)


MAKERS = [autoqnn.quantizers.FixedQuant, autoqnn.quantizers.ESB_PerChannel, MaxScaled]


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_a_width_is_learned(make: Any) -> None:
    options = {"bitwidth": 4, "target_bitwidth": 2, "max_bitwidth": 5, "per_channel": False}
    model, optimizer = learning(make, **options)
    quantizer = model[0].weight_quant
    assert isinstance(quantizer, make)
    assert isinstance(quantizer.float_bitwidth, nn.Parameter)
    batches = [(torch.randn(4, 12), torch.randint(0, 5, (4,))) for _ in range(12)]
    losses = [precision_loss(model).detach()]
    autoqnn.core.train(batches, model, F.cross_entropy, optimizer, print_freq=0)
    losses.append(precision_loss(model).detach())
    assert quantizer.float_bitwidth.grad is not None
    assert losses[0] == pytest.approx(4.0)
    assert losses[1] < 1.0
    assert quantizer.n_bits == int(quantizer.shadow_bitwidth) == round(float(quantizer.float_bitwidth.detach()))
    model.eval()
    x = torch.randn(4, 12)
    y = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), y)
    assert len(quantizer(model[0].layer.weight).unique()) <= 2**quantizer.n_bits
    fresh, _ = learning(make, **options)
    fresh.eval().load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(fresh(x), y)
    bits = freeze_bitwidths(model)
    assert bits == {"0.weight_quantizer": quantizer.n_bits, "2.weight_quantizer": fresh[2].weight_quant.n_bits}
    assert type(model[0].weight_quant) is make
    assert torch.equal(model(x), y)
    assert next(model[0].weight_quant.parameters(), None) is None


def test_the_gradient_of_a_width_is_the_difference_of_its_neighbours() -> None:
    quantizer = autoqnn.quantizers.VecQ(bitwidth=8, freeze_bitwidth=False)
    with torch.no_grad():
        quantizer.float_bitwidth.fill_(3.25)
    w, grad = torch.randn(500, requires_grad=True), torch.randn(500)
    quantizer.pre_observe(w)
    narrow, wide = (tq.make_quantizer(f"vecq:{n}") for n in (3, 4))
    for other in (narrow, wide):
        other.pre_observe(w)
    y = quantizer(w)
    torch.testing.assert_close(y, 0.75 * narrow(w) + 0.25 * wide(w))
    y.backward(grad)
    torch.testing.assert_close(quantizer.float_bitwidth.grad, (grad * (wide(w) - narrow(w))).sum().detach())
    assert torch.equal(quantizer.eval()(w), narrow(w))
    assert torch.equal(quantizer.levels(), narrow.levels())


def test_learned_widths_share_a_budget() -> None:
    given = {
        "weight_quant": autoqnn.quantizers.VecQ(bitwidth=4, freeze_bitwidth=False, target_bitwidth=4),
        "act_quant": autoqnn.quantizers.VecQAct(bitwidth=6, freeze_bitwidth=False, target_bitwidth=4),
    }
    model = convert(nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 30)), quantize_config_dict=given)
    with torch.no_grad():
        model[0].weight_quant.float_bitwidth.fill_(7.0)  # a quarter of the weights
        model[1].weight_quant.float_bitwidth.fill_(3.0)
    assert float(precision_loss(model).detach()) == pytest.approx(float(bitloss(torch.tensor(6.0), 4)))
    assert float(precision_loss(nn.Linear(2, 2))) == 0.0


@pytest.mark.slow
def test_a_learned_width_compiles() -> None:
    given = {"weight_quant": autoqnn.quantizers.FixedQuant(bitwidth=3, freeze_bitwidth=False, max_bitwidth=3)}
    model = convert(nn.Linear(4, 3), quantize_config_dict=given)
    x = torch.randn(2, 4)
    model(x)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    compiled(x).sum().backward()
    assert model.weight_quant.float_bitwidth.grad is not None
    model.eval()
    torch.testing.assert_close(compiled(x), model(x))


def test_what_cannot_learn_a_width_says_so() -> None:
    class Stubborn(Quantization):
        def __init__(self) -> None:
            super().__init__(freeze_bitwidth=False)

    with pytest.raises(ConfigError, match="Stubborn must be constructed with freeze_bitwidth=False to learn its width"):
        Stubborn()
    with pytest.raises(ConfigError, match=r"Ternary has no widths from 2 to max_bitwidth=8 to learn"):
        autoqnn.quantizers.Ternary(freeze_bitwidth=False)
    with pytest.raises(ConfigError, match="a mixture cannot be pinned"):
        autoqnn.quantizers.VecQ(freeze_bitwidth=False).pin(torch.ones(3))
