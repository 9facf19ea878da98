"""Observing and quantizing in one call gives what the two give one after the other, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.kernels.conftest import Kernels
from tests.kernels.tensors import hard, is_same, shifted
from torchquant import QModuleState, QWrapper, kernels
from torchquant.errors import NonFiniteError
from torchquant.quantizers import AffineQuantizer, make_quantizer
from torchquant.quantizers_functional import KERNELS, UniformGrid
from torchquant.range_observers import BatchMinMax, ExpAvgMinMax, RangeObserver, RunningMinMax

CLAMPS = (None, (0.0, None), (0.0, 6.0), (None, 0.5), (-0.3, 0.7))
SYMMETRIES = (False, True, "narrow", "torch", "asymmetric-narrow")


def observers(axis: int | None) -> list[RangeObserver]:
    return [
        BatchMinMax(axis),
        RunningMinMax(axis),
        ExpAvgMinMax(0.9, axis),
        ExpAvgMinMax(0.99, axis, init="first"),
    ]


def steps_of(quantizer: AffineQuantizer, batches: list[Tensor], clamp: Any, at_once: bool) -> list[Tensor]:
    """Return values, gradients and statistics after each batch."""
    found = []
    for i, batch in enumerate(batches):
        x = batch.clone(memory_format=torch.preserve_format).requires_grad_(i % 3 < 2)
        if at_once:
            value = quantizer.observe_and_quantize(x, clamp)
            assert value is not None
        else:
            quantizer.pre_observe(x, clamp)
            value = quantizer.quantize(x, clamp)
        assert value.requires_grad == x.requires_grad
        if x.requires_grad:
            value.backward(torch.linspace(-1.0, 1.0, x.numel(), dtype=x.dtype).view(x.shape))
            found.append(x.grad)
        found += [value.detach(), *(buffer.clone() for buffer in quantizer.buffers())]
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("shape", "axis"), [((777,), None), ((3, 5, 4, 7), 0), ((3, 5, 4, 7), -3), ((1, 9), 0)])
def test_one_call_equals_two(
    shape: tuple[int, ...], axis: int | None, dtype: torch.dtype, cpu_kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_BY_DEVICE", {"cpu": cpu_kernels})
    batches = [hard(shape, dtype=dtype).nan_to_num(0.3, 9.0, -9.0).mul(scale) for scale in (1.0, -0.1, 2.0)]
    batches += [torch.full(shape, -0.0, dtype=dtype), shifted(batches[0]), batches[0] * 1e-3]
    batches += [x.contiguous(memory_format=torch.channels_last) for x in batches[:1] if x.ndim == 4]
    cases = [(clamp, SYMMETRIES[i % 5], n_bits) for i, clamp in enumerate(CLAMPS) for n_bits in (8, 3)]
    cases += [(None, symmetric, 4) for symmetric in SYMMETRIES]
    for clamp, symmetric, n_bits in cases:
        for clip in (False, True):
            for i in range(4):
                one, two = (AffineQuantizer(n_bits, observers(axis)[i], symmetric, clip).to(dtype) for _ in range(2))
                found, expected = steps_of(one, batches, clamp, True), steps_of(two, batches, clamp, False)
                assert all(map(is_same, found, expected))


def test_a_batch_that_is_not_finite_changes_nothing(cpu_kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_BY_DEVICE", {"cpu": cpu_kernels})
    quantizer = AffineQuantizer(8, ExpAvgMinMax())
    assert quantizer.observe_and_quantize(torch.tensor([-1.0, 2.0])) is not None
    assert quantizer.is_ready
    before = [buffer.clone() for buffer in quantizer.buffers()]
    for x in (torch.tensor([torch.nan, 1.0]), torch.tensor([torch.inf, 1.0])):
        assert quantizer.observe_and_quantize(x) is None
        assert all(map(torch.equal, before, quantizer.buffers()))
    assert quantizer.observe_and_quantize(torch.tensor([torch.inf, 1.0]), (0.0, 6.0)) is not None


class Doubled(AffineQuantizer):
    def quantize(self, x: Tensor, clamp: Any = None) -> Tensor:
        return super().quantize(x, clamp) * 2


class Wider(ExpAvgMinMax):
    def observe_batch(self, x: Tensor) -> None:
        super().observe_batch(x * 2)


def hooked(quantizer: AffineQuantizer) -> None:
    quantizer.register_forward_hook(lambda *_: None)


def shadowed(quantizer: AffineQuantizer) -> None:
    quantizer.__dict__["pre_observe"] = lambda x, clamp=None: None


def twice(quantizer: AffineQuantizer) -> None:
    quantizer.observer.n_calls = 2


@pytest.mark.parametrize("change", [hooked, shadowed, twice, lambda q: q.set_gradient("ewgs")])
def test_what_has_something_to_do_between_the_two_takes_both(change: Callable[[AffineQuantizer], None]) -> None:
    x = torch.randn(50)
    quantizer = AffineQuantizer(8, ExpAvgMinMax())
    assert copy.deepcopy(quantizer).observe_and_quantize(x) is not None
    change(quantizer)
    assert quantizer.observe_and_quantize(x) is None
    assert not quantizer.is_ready


def test_other_classes_kernels_and_pins_take_both() -> None:
    x = torch.randn(50)
    for quantizer in (
        Doubled(8, ExpAvgMinMax()),
        AffineQuantizer(8, Wider()),
        AffineQuantizer(8, ExpAvgMinMax(nonfinite="ignore")),
        AffineQuantizer(8, ExpAvgMinMax(), symmetric="full"),
        make_quantizer("affine:8,observer=histogram"),
        make_quantizer("lsq:8"),
    ):
        assert quantizer.observe_and_quantize(x) is None
    quantizer = AffineQuantizer(8, ExpAvgMinMax())
    KERNELS.register(UniformGrid, "cpu")(lambda grid, x, want_inside, clamp: (x * 0.0, None))
    try:
        assert quantizer.observe_and_quantize(x) is None
    finally:
        KERNELS.unregister(UniformGrid, "cpu")
    quantizer.pin(x)
    assert quantizer.observe_and_quantize(x * 2) is None
    quantizer.unpin()
    assert quantizer.observe_and_quantize(x.half()) is None
    assert quantizer.observe_and_quantize(x[::2]) is None
    assert quantizer.observe_and_quantize(x[:0]) is None


def test_a_layer_refuses_what_is_not_finite_and_says_which_slot_saw_nothing() -> None:
    wrapper = QWrapper(nn.Linear(4, 2), acts_quantizer=AffineQuantizer(8, ExpAvgMinMax()))
    wrapper.state = QModuleState.QUANT_AWARE_TRAIN
    with pytest.raises(NonFiniteError, match="NaN or Inf"):
        wrapper(torch.full((3, 4), torch.nan))
    assert not wrapper.acts_quantizer.is_ready
