"""Numbers at the edges: no share of a batch, one bit, one dimension, saved NaN, wrong types, inference mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import torchquant as tq
from torchquant.errors import ConfigError, NonFiniteError
from torchquant.quantizers import QUANTIZERS, APoTQuantizer, GroupQuantizer, LSQQuantizer
from torchquant.quantizers_functional import affine_quantize
from torchquant.range_observers import OBSERVERS


def shown(text: str, x: torch.Tensor, site: str = "weight") -> tq.Quantizer:
    quantizer = tq.make_quantizer(text, site=site)
    quantizer.pre_observe(x)
    return quantizer


@pytest.mark.parametrize("text", ["lsq:4", "ewgs:4", "lsqplus:4", "tqt:4", "apot:4", "pact:4", "lsq:1"])
@pytest.mark.parametrize("site", ["weight", "output"])
def test_an_empty_batch_after_calibration_has_a_gradient(text: str, site: str) -> None:
    if (text, site) in {("pact:4", "weight"), ("lsq:1", "weight")}:
        return
    quantizer = shown(text, torch.rand(4, 6), site)
    x = torch.randn(0, 6, requires_grad=True)
    quantizer.pre_observe(x)
    quantizer(x).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in quantizer.parameters())


def test_one_bit_without_sign_refuses_what_goes_below_zero() -> None:
    quantizer = tq.make_quantizer("lsq:1", site="output")
    with pytest.raises(ConfigError, match="one bit has no signed codes here, and the first tensor goes down to -2"):
        quantizer.pre_observe(torch.tensor([-2.0, 1.0]))
    assert not quantizer.is_ready
    assert shown("lsq:1", torch.rand(40), "output")(torch.rand(40)).unique().numel() == 2
    assert shown("lsq:12", torch.rand(40), "output")(torch.rand(40)).isfinite().all()


@pytest.mark.parametrize("name", [name for name in QUANTIZERS if QUANTIZERS[name].examples(0)])
def test_codes_of_one_dimension_per_channel_come_back(name: str) -> None:
    for quantizer in QUANTIZERS[name].examples(0):
        x = torch.randn(5).abs() + 0.1
        quantizer.pre_observe(x)
        y = quantizer.decode(quantizer.encode(x))
        assert y.shape == (5,)
        assert torch.equal(y, quantizer(x))
        low, high = quantizer.code_range
        assert quantizer.levels().shape == (5, high - low + 1)


def test_groups_have_the_units_and_the_sign_of_their_scheme() -> None:
    grouped = tq.make_quantizer("dorefa:3/group=8")
    assert grouped.is_idempotent is False
    assert tq.check_quantizer(grouped, torch.randn(4, 40), laws=("idempotent",)).skipped
    assert tq.make_quantizer("affine:4/group=8").is_idempotent
    with pytest.raises(ConfigError, match="quantizer must be a Quantizer, got 'affine'; make_quantizer"):
        GroupQuantizer("affine", 8)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["lsq:4/group=8", "apot:4/group=8", "tqt:4/group=8", "ttq/group=8"])
@pytest.mark.parametrize("length", [32, 5])
def test_every_learned_number_of_groups_has_a_gradient(text: str, length: int) -> None:
    quantizer = shown(text, torch.randn(4, length))
    quantizer(torch.randn(4, length, requires_grad=True)).sum().backward()
    assert {name.split(".")[0] for name, _ in quantizer.named_parameters()} == {"whole", "last"}
    assert all(p.grad is not None for p in quantizer.parameters())


@pytest.mark.parametrize(
    ("n_bits", "dtype"),
    [(n, torch.float32) for n in range(1, 13)] + [(n, torch.bfloat16) for n in range(1, 8)] + [(8, torch.float16)],
)
def test_vecq_is_idempotent_on_heavy_tails(n_bits: int, dtype: torch.dtype) -> None:
    x = (torch.randn(4000) ** 5).clamp(-6e4, 6e4).to(dtype)
    quantizer = shown(f"vecq:{n_bits}", x)
    assert torch.equal(quantizer(quantizer(x)), quantizer(x))


@pytest.mark.parametrize("symmetric", ["false", "true", "full", "torch"])
def test_one_bit_of_the_largest_bfloat16_is_finite(symmetric: str) -> None:
    largest = torch.finfo(torch.bfloat16).max
    for ends in ((-largest, largest), (0.0, largest), (-largest, 0.0)):
        x = torch.tensor([*ends, 1.0], dtype=torch.bfloat16)
        assert shown(f"affine:1,symmetric={symmetric}", x)(x).isfinite().all()


def test_what_float32_does_not_hold_is_not_called_inf() -> None:
    x = torch.tensor([1e300, -1.0], dtype=torch.float64)
    with pytest.raises(
        NonFiniteError, match=r"numbers up to 1e\+300, .* in torch.float32, .*call .to\(torch.float64\)"
    ):
        shown("affine:4", x)
    wide = tq.make_quantizer("affine:4").double()
    wide.pre_observe(x)
    assert wide(x).isfinite().all()


@pytest.mark.parametrize(
    ("text", "key"), [("affine:4", "observer.range_max"), ("lsq:4", "step"), ("esb:4,k=1", "alpha")]
)
def test_saved_nan_is_refused_with_its_key(text: str, key: str) -> None:
    model = nn.Sequential(tq.QWrapper(nn.Linear(3, 2), shown(text, torch.randn(9)), None))
    state = model.state_dict()
    state[f"0.weight_quantizer.{key}"].fill_(torch.nan)
    with pytest.raises(NonFiniteError, match=f"0.weight_quantizer.{key} of the state_dict holds NaN or Inf"):
        model.load_state_dict(state)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_codes_outside_of_the_range_are_refused(name: str) -> None:
    quantizer = QUANTIZERS[name].examples(None)[0]
    quantizer.pre_observe(torch.rand(4, 8))
    low, high = quantizer.code_range
    for wrong in (low - 1, high + 1):
        with pytest.raises(ConfigError, match=f"codes of .* are {low}..{high}, got"):
            quantizer.decode(torch.tensor([[low, wrong]]))
    assert quantizer.decode(torch.zeros(0, 3, dtype=torch.int32)).shape == (0, 3)


@pytest.mark.parametrize("delta", [0.0, -1.0, float("nan"), torch.tensor([1.0, 0.0])])
def test_a_step_must_be_above_zero(delta: Any) -> None:
    x = torch.ones(2)
    with pytest.raises(ConfigError, match="delta must be (above 0|a tensor or a number), got"):
        affine_quantize(x, delta, 0, 4)
    step = torch.tensor(0.5)
    compiled = torch.compile(lambda x, step: affine_quantize(x, step, 0, 4), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, step), affine_quantize(x, step, 0, 4))


@pytest.mark.parametrize("given", [abs, None, b"affine:8", 8, ["affine:8"], tq.make_quantizer("affine:8")])
def test_a_spec_of_a_wrong_type_is_refused_in_short(given: Any) -> None:
    with pytest.raises(ConfigError, match="a spec must be a string scheme") as caught:
        tq.make_quantizer(given)
    assert len(str(caught.value)) < 200


def test_a_spec_of_thousands_of_digits_is_refused_in_short() -> None:
    for text in (
        "affine:" + "1" * 5000,
        "affine:8,observer=ema,momentum=0." + "1" * 5000,
        "affine:4/group=" + "9" * 5000,
    ):
        with pytest.raises(ConfigError, match="a spec has at most 200 characters, got 5") as caught:
            tq.make_quantizer(text)
        assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: LSQQuantizer(4, signed="yes"), "LSQQuantizer: signed must be True or False or None, got 'yes'"),
        (lambda: APoTQuantizer(4, signed=1), "APoTQuantizer: signed must be True or False or None, got 1"),
        (lambda: tq.ESBQuantizer(4, 1, momentum="x"), "ESBQuantizer: momentum must be a number, got 'x'"),
        (lambda: LSQQuantizer(4, per_sample="x"), "LSQQuantizer: per_sample must be True or False, got 'x'"),
        (lambda: OBSERVERS["histogram"]("99"), "HistogramObserver: percentile must be a number, got '99'"),
        (lambda: OBSERVERS["aciq"]("4"), "ACIQObserver: n_bits must be a whole number, got '4'"),
        (
            lambda: tq.AffineQuantizer(True, tq.BatchMinMax()),
            "AffineQuantizer: n_bits must be a whole number, got True",
        ),
    ],
)
def test_arguments_of_a_wrong_type_are_refused_as_the_quantizer_is_made(make: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make()


def _inference_cases() -> list[tuple[str, str]]:
    schemes = [
        "affine:4/channel",
        "affine:4/group=16",
        "qfmt:4,signed,rule=mse/channel",
        "codebook:2,learn=true/group=7",
    ]
    schemes += [f"{name}/group=16" for name in ("lsq:4", "apot:4", "tqt:4", "ttq", "twn", "esb:4,k=1")]
    return [(text, "weight") for text in schemes] + [
        (f"affine:8,observer={name}" + ("" if name == "entropy" else "/channel"), "output")  # entropy searches long
        for name in OBSERVERS
    ]


@pytest.mark.parametrize(("text", "site"), _inference_cases())
def test_what_was_calibrated_in_inference_mode_trains(text: str, site: str) -> None:
    quantizer, x = tq.make_quantizer(text, site=site), torch.randn(4, 40)
    with torch.inference_mode():
        for factor in (1.0, 2.0):
            quantizer.pre_observe(x * factor)
    real = x.clone().requires_grad_()
    quantizer.pre_observe(x)
    quantizer(real).square().sum().backward()
    assert real.grad is not None
    assert not any(tensor.is_inference() for tensor in (*quantizer.buffers(), *quantizer.parameters()))
