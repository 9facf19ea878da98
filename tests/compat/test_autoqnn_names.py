"""AutoQNN's names construct the quantizers they stand for."""

from __future__ import annotations

import inspect

import pytest
import torch

import torchquant as tq
from torchquant.compat import autoqnn
from torchquant.errors import ConfigError

SPECS = {
    "FixedQuant": "qfmt:4,signed",
    "uL2Q": "ul2q:4",
    "VecQ": "vecq:4",
    "ClipQ": "clipq:4",
    "ZoomQ": "zoomq:4",
    "PotQ": "pot:4",
    "ResQ": "resq:4",
    "Ternary": "twn",
    "Binary": "xnor",
    "ESB_PerChannel": "esb:4,k=1",
}
ACTS = {name: name.replace("_PerChannel", "") + "Act" for name in SPECS}


def built(name: str, **options: object) -> tq.Quantizer:
    make = getattr(autoqnn.quantizers, name)
    wanted = {"bitwidth": {"Ternary": 2, "Binary": 1}.get(name.removesuffix("Act"), 4), "linear_bits": 1}
    known = inspect.signature(make).parameters
    return make(**{key: value for key, value in wanted.items() if key in known}, **options)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("name", SPECS)
def test_a_weight_is_quantized_as_by_our_own_name(name: str, per_channel: bool) -> None:
    theirs = built(name, per_channel=per_channel)
    ours = tq.make_quantizer(SPECS[name] + ("/channel" if per_channel else ""))
    assert repr(theirs) == repr(ours).replace(type(ours).__name__, name)
    assert isinstance(theirs, type(ours))
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    w = torch.randn(6, 40) + 0.3
    for q in (theirs, ours):
        q.pre_observe(w)
    assert torch.equal(theirs(w), ours(w))


@pytest.mark.parametrize("name", ACTS.values())
def test_activations_average_and_train_as_they_evaluate(name: str) -> None:
    quantizer = built(name)
    for scale in (1.0, 2.0):
        quantizer.pre_observe(torch.randn(50) * scale)
    x = torch.randn(50)
    assert torch.equal(quantizer.train()(x), quantizer.eval()(x))
    trackers = [m for m in quantizer.modules() if hasattr(m, "momentum")]
    assert trackers[0].momentum == 0.9


@pytest.mark.parametrize("name", [*SPECS, *ACTS.values()])
def test_backward_types(name: str) -> None:
    for backward, gradient in (("ste", None), ("pwl", "pwl"), ("pwl-c", "pwlc")):
        quantizer = built(name, backward_type=backward, gradient_ratio=0.25)
        if gradient:
            assert quantizer.gradient.name == gradient
            assert quantizer.gradient.rho == 0.25
    with pytest.raises(ConfigError, match="backward_type must be one of ste, pwl, pwl-c, got 'relu'"):
        built(name, backward_type="relu")


def test_mean_shift_moves_the_levels_to_the_mean() -> None:
    w = torch.randn(4000) + 3.0
    plain, shifted = (
        built("ESB_PerChannel", per_channel=False),
        built("ESB_PerChannel", per_channel=False, mean_shift=True),
    )
    errors = []
    for quantizer in (plain, shifted):
        quantizer.pre_observe(w)
        errors.append(float((quantizer(w) - w).square().mean()))
    assert errors[1] < errors[0] / 3
    assert errors[1] == pytest.approx(0.0126849, rel=0.1)  # ESB(4,1) on N(0, 1)
    assert float(shifted(torch.full((1,), 3.0))) == pytest.approx(float(w.mean()), abs=0.05)


def test_defect_8_esb_passes_a_gradient() -> None:
    quantizer = built("ESB_PerChannel", per_channel=True)
    w = torch.randn(4, 30, requires_grad=True)
    quantizer.pre_observe(w)
    y = quantizer(w)
    assert y.requires_grad
    y.sum().backward()
    assert torch.equal(w.grad, torch.ones_like(w))


@pytest.mark.parametrize("name", ["FixedQuant", "Ternary", "ESB_PerChannel", "ResQ", "ZoomQ"])
def test_defects_17_and_18_zeros_give_zeros(name: str) -> None:
    quantizer = built(name)
    quantizer.pre_observe(torch.zeros(3, 9))
    assert torch.equal(quantizer(torch.zeros(3, 9)), torch.zeros(3, 9))


def test_every_name_is_listed() -> None:
    assert {*SPECS, *ACTS.values()} == set(autoqnn.quantizers.__all__) - {"Quantization"}
