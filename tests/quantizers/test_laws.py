"""The laws over every registered scheme, and proof that each law can fail."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

import torchquant as tq
from torchquant.errors import LawViolation
from torchquant.quantizers import LAWS, QUANTIZERS, LearnedQuantizer, Quantizer

FURTHER_AXES = (1, -1)
"""On which the first example of each scheme goes each day, the others in the slow tests."""
CASES = [
    pytest.param(
        *(name, axis, i),
        id=f"{name}-{i}-{'tensor' if axis is None else f'axis{axis}'}",
        marks=pytest.mark.slow if axis in FURTHER_AXES and i else (),
    )
    for name in QUANTIZERS
    for axis in (None, 0, *FURTHER_AXES)
    for i in range(len(QUANTIZERS[name].examples(axis)))
]
BLOCKS = ("mx", "nvfp4")
UNITLESS = ("dorefa", "irnet", "qil", "rsign")  # the levels do not grow with the weight
PER_CHANNEL = [name for name in QUANTIZERS if name not in BLOCKS]
FAST = tuple(law for law in LAWS if law not in ("compiles", "keeps_device"))


@pytest.mark.parametrize(("name", "axis", "i"), CASES)
def test_every_scheme_keeps_the_laws(name: str, axis: int | None, i: int) -> None:
    report = tq.check_quantizer(QUANTIZERS[name].examples(axis)[i], laws=FAST)
    assert set(report.passed) | set(report.skipped) == set(FAST)
    quantizer = QUANTIZERS[name].examples(axis)[i]
    expected = {"per_channel": axis is None, "levels_used": name in BLOCKS, "idempotent": not quantizer.is_idempotent}
    expected["neighbours"] = not quantizer.is_idempotent
    assert set(report.skipped) == {law for law, is_skipped in expected.items() if is_skipped}


COMPILED_ALWAYS = {
    ("affine", None),
    ("lsq", 0),
    ("codebook", None),
    ("mx", None),
}


@pytest.mark.parametrize(
    ("name", "axis"),
    [
        pytest.param(n, axis, marks=() if (n, axis) in COMPILED_ALWAYS else pytest.mark.slow)
        for n, axis in [(n, None) for n in QUANTIZERS] + [(n, 0) for n in PER_CHANNEL]
    ],
)
def test_every_scheme_compiles_and_exports(name: str, axis: int | None) -> None:
    quantizer = QUANTIZERS[name].examples(axis)[0]
    assert tq.check_quantizer(quantizer, laws=("compiles",)).passed == ("compiles",)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "axis", "i"), CASES)
def test_every_example_compiles_and_exports(name: str, axis: int | None, i: int) -> None:
    quantizer = QUANTIZERS[name].examples(axis)[i]
    assert tq.check_quantizer(quantizer, laws=("compiles",)).passed == ("compiles",)


@pytest.mark.parametrize("name", PER_CHANNEL)
def test_per_channel_equals_a_loop_of_per_tensor_bit_for_bit(name: str) -> None:
    x = torch.randn(5, 7, 3) * torch.tensor([1.0, 10.0, 0.01, 3.0, 0.0]).view(5, 1, 1)
    for per_channel, *per_tensor in zip(
        QUANTIZERS[name].examples(0), *[QUANTIZERS[name].examples(None) for _ in range(5)], strict=True
    ):
        per_channel.pre_observe(x)
        together = per_channel(x)
        for i, quantizer in enumerate(per_tensor):
            quantizer.pre_observe(x[i])
            assert torch.equal(together[i], quantizer(x[i]))
            assert torch.equal(per_channel.levels()[i], quantizer.levels())
            assert torch.equal(per_channel.encode(x)[i], quantizer.encode(x[i]))


@pytest.mark.parametrize("name", QUANTIZERS)
@settings(max_examples=25, deadline=None)
@given(
    array=hnp.arrays("float32", hnp.array_shapes(min_dims=1, max_dims=3, max_side=6), elements=st.floats(width=32)),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
)
def test_any_tensor_at_all(name: str, array: object, dtype: torch.dtype) -> None:
    """NaN passes, Inf saturates, everything else lands on the grid; statistics of any finite data are usable."""
    x = torch.from_numpy(array.copy()).to(dtype)
    finite = torch.where(torch.isfinite(x), x, torch.zeros_like(x))
    for quantizer in QUANTIZERS[name].examples(None):
        quantizer.pre_observe(finite)
        y = quantizer(x)
        assert torch.equal(y.isnan(), x.isnan())
        assert y[~x.isnan()].isfinite().all()
        assert all(part[~part.isnan()].unique().numel() <= 2**quantizer.n_bits for part in quantizer.parts(y))
        assert torch.equal(quantizer.decode(quantizer.encode(finite), dtype), quantizer(finite))


def test_a_threshold_whose_step_float32_does_not_have() -> None:
    quantizer, x = QUANTIZERS["tqt"].examples(None)[1], torch.tensor([4.3857463e-37], dtype=torch.float64)
    quantizer.pre_observe(x)
    assert torch.equal(quantizer.decode(quantizer.encode(x), x.dtype), quantizer(x))


@pytest.mark.parametrize(("name", "axis", "i"), CASES)
def test_every_code_comes_back(name: str, axis: int | None, i: int) -> None:
    """`encode(decode(code))` is the code, for all codes of every format of up to 8 bits."""
    quantizer = QUANTIZERS[name].examples(axis)[i]
    if name in BLOCKS or not quantizer.is_idempotent or quantizer.n_bits > 8:
        return
    x = torch.randn(3, 20, 20).movedim(0, axis or 0).contiguous()
    quantizer.pre_observe(x.abs() if quantizer.signed is False else x)
    codes = torch.arange(quantizer.code_range[0], quantizer.code_range[1] + 1, dtype=torch.int32)
    along = codes.expand(3, 1, -1).movedim(0, axis or 0)
    assert torch.equal(quantizer.encode(quantizer.decode(along)), along)


@pytest.mark.parametrize(
    "text",
    [
        "esb:4,k=1/group=5",
        *(pytest.param(s, marks=pytest.mark.slow) for s in ("affine:4,symmetric=narrow/group=16", "nf4/group=64")),
    ],
)
def test_groups_keep_the_laws(text: str) -> None:
    report = tq.check_quantizer(tq.make_quantizer(text), torch.randn(4, 40))
    assert set(report.skipped) == {"per_channel", "levels_used"}


@pytest.mark.parametrize("name", [name for name in QUANTIZERS if name not in UNITLESS])
def test_scaling_by_a_power_of_two_scales_the_output_exactly(name: str) -> None:
    x = torch.randn(300)
    for a, b in zip(QUANTIZERS[name].examples(None), QUANTIZERS[name].examples(None), strict=True):
        a.pre_observe(x)
        b.pre_observe(x * 8)
        assert torch.equal(b(x * 8), a(x) * 8)


class Rounding(Quantizer):
    """A correct quantizer written against the published contract only: no observer, no codes."""

    n_bits = 3
    scale = 0.3

    def quantize(self, x: Tensor) -> Tensor:
        on_grid = self.scale * (x / self.scale).round().clamp(-4, 3)
        return x + (on_grid - x).detach()

    def __init__(self, break_law: str = "") -> None:
        super().__init__()
        self.break_law = break_law


class Exact(Rounding):
    def quantize(self, x: Tensor) -> Tensor:
        x_hat = x.round().clamp(-4, 3).detach()
        if self.break_law == "monotone":
            x_hat = torch.where(x_hat == 2, -x_hat, x_hat)
        if self.break_law == "idempotent":
            x_hat = (x_hat + 1).clamp(-4, 3)
        if self.break_law == "keeps_form":
            x_hat = x_hat.float()
        if self.break_law == "gradient":
            return x_hat
        if self.break_law == "edge_cases":
            x_hat = x_hat / x.detach().abs().max() * x.detach().abs().max()
        if self.break_law == "levels_used":
            x_hat = x_hat.clamp(-1, 1)
        if self.break_law == "nonfinite":
            x_hat = x_hat.nan_to_num()
        if self.break_law == "inf":
            x_hat = torch.where(x.isinf(), torch.zeros_like(x_hat), x_hat)
        if self.break_law in ("double", "minus"):
            factor = 2.0 if self.break_law == "double" else -1.0
            return x_hat + factor * (x - x.detach()).nan_to_num()
        if self.break_law == "compiles" and float(x_hat.sum()) > 1e9:
            return x
        return x_hat + (x - x.detach()).nan_to_num()


class Forgetful(tq.AffineQuantizer):
    """Keeps its range in a plain attribute, so that no checkpoint has it."""

    def pre_observe(self, x: Tensor) -> None:
        super().pre_observe(x)
        self.gain = 2.0

    def quantize(self, x: Tensor) -> Tensor:
        return super().quantize(x) * getattr(self, "gain", 1.0)


class Leaky(tq.AffineQuantizer):
    """Lets one channel's range depend on the others."""

    def pre_observe(self, x: Tensor) -> None:
        super().pre_observe(x + 0 * x.mean())
        self.observer.range_max.fill_(float(self.observer.range_max.max()))


class Widening(tq.AffineQuantizer):
    """Takes a wider range each time it sees a tensor, although its observer remembers the last one only."""

    def pre_observe(self, x: Tensor) -> None:
        low, high = self.observer.get_ranges() if self.is_ready else (-1.0, 1.0)
        self.observer.force_ranges(low * 2, high * 2)


class Apart(LearnedQuantizer):
    """Levels on one trained number and thresholds on another: equal at the start, and only there in the units of x."""

    n_bits, code_range = 4, (-7, 7)
    learned = ("step", "clip")
    statistics = ("initial_step", "initial_clip")

    def measure(self, x: Tensor) -> tuple[Tensor, ...]:
        largest = x.abs().amax()
        return largest / 7, largest

    def grid(self) -> tuple[Tensor | int, ...]:
        return self.bounded("step"), self.bounded("clip")

    def codes(self, x: Tensor, step: Tensor, clip: Tensor) -> Tensor:
        return (x / clip * 7).round().clamp(-7, 7)

    def values(self, codes: Tensor, dtype: torch.dtype, step: Tensor, clip: Tensor) -> Tensor:
        return codes.to(dtype) * step.to(dtype)


def test_a_law_that_holds_before_training_only_is_caught() -> None:
    assert "idempotent" in tq.check_quantizer(Apart(), laws=("idempotent", "neighbours")).passed
    with pytest.raises(LawViolation, match="idempotent fails where training has moved the numbers: quantize"):
        tq.check_quantizer(Apart(), laws=("trained",))
    admitted = Apart()
    admitted.is_idempotent = False
    assert tq.check_quantizer(admitted, laws=("trained",)).passed


@pytest.mark.parametrize("text", ["affine:4/channel", "lsq:4/channel", "esb:4,k=1,observer=mse/channel"])
def test_laws_begin_with_a_quantizer_that_has_seen_nothing(text: str) -> None:
    quantizer = tq.make_quantizer(text)
    quantizer.pre_observe(torch.randn(7, 10))
    before = quantizer(torch.ones(7, 10))
    assert tq.check_quantizer(quantizer, laws=("on_grid", "settable")).passed
    assert torch.equal(quantizer(torch.ones(7, 10)), before)
    quantizer.pin(torch.randn(7, 10))
    assert tq.check_quantizer(quantizer, laws=("on_grid", "settable")).passed
    assert quantizer.is_pinned


def test_a_quantizer_of_the_published_contract_passes_what_can_be_asked() -> None:
    report = tq.check_quantizer(Exact())
    assert "on_grid" in report.passed
    assert "compiles" in report.passed


def test_the_additive_straight_through_is_caught() -> None:
    with pytest.raises(LawViolation, match="distinct values from 3 bits") as caught:
        tq.check_quantizer(Rounding(), laws=("on_grid", "monotone"))
    assert "on_grid" in caught.value.law


@pytest.mark.parametrize(
    "law", ["monotone", "idempotent", "keeps_form", "gradient", "edge_cases", "levels_used", "nonfinite", "compiles"]
)
def test_a_broken_law_is_named(law: str) -> None:
    with pytest.raises(LawViolation, match=law) as caught:
        tq.check_quantizer(Exact(break_law=law), laws=tuple(LAWS) if law == "compiles" else FAST)
    assert law in caught.value.law.split(", ")


@pytest.mark.parametrize(
    ("broken", "law", "said"),
    [
        ("double", "gradient_size", "gradient of x is (1.9|2.0). of the slope"),
        ("minus", "gradient_size", "gradient of x is -(0.9|1.0). of the slope"),
        ("inf", "nonfinite", "inf did not go to the last level"),
    ],
)
def test_a_gradient_of_another_size_and_an_inf_that_vanishes_are_caught(broken: str, law: str, said: str) -> None:
    with pytest.raises(LawViolation, match=said) as caught:
        tq.check_quantizer(Exact(break_law=broken), laws=FAST)
    assert caught.value.law == law


def test_state_outside_the_checkpoint_is_caught() -> None:
    with pytest.raises(LawViolation, match="survives"):
        tq.check_quantizer(Forgetful(4, tq.BatchMinMax()), laws=("survives",))


def test_channels_that_are_not_independent_are_caught() -> None:
    with pytest.raises(LawViolation, match="slice 0 alone differs"):
        tq.check_quantizer(Leaky(4, tq.BatchMinMax(axis=0)), laws=("per_channel",))


def test_memory_that_is_not_admitted_is_caught() -> None:
    with pytest.raises(LawViolation, match="seen twice changes the output"):
        tq.check_quantizer(Widening(4, tq.BatchMinMax()), laws=("memoryless",))


def test_one_sided_data_can_be_given() -> None:
    quantizer = tq.QfmtQuantizer(8, False, tq.BatchMinMax())
    report = tq.check_quantizer(quantizer, sample=torch.rand(4, 6, 5, 5), laws=("on_grid", "edge_cases", "levels_used"))
    assert report.passed == ("on_grid", "edge_cases", "levels_used")
    assert "holds    on_grid" in str(report)
