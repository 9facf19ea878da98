"""Stacks of matrices, stored with the outputs or with the inputs first, against a layer for each matrix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchquant as tq
from torchquant import ptq
from torchquant.deploy import certify, export_onnx, load_packed, save_packed
from torchquant.qmodule import WeightsPattern
from torchquant.qmodule.weighted import WEIGHTED
from torchquant.utils import weight_slots

RULES = [{"types": ["Linear", "Experts"], "weight": "affine:3/channel", "input": "affine:8"}]


class Apart(nn.Module):
    """Three matrices, each a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x) for layer in self.layers]).prod(0)


class Stack(nn.Module):
    """The matrices of three layers, (3, outputs, inputs)."""

    def __init__(self, apart: Apart) -> None:
        super().__init__()
        self.up = nn.Parameter(self.stored(torch.stack([layer.weight.detach() for layer in apart.layers])))
        self.up_bias = nn.Parameter(torch.stack([layer.bias.detach() for layer in apart.layers]))

    def stored(self, matrices: Tensor) -> Tensor:
        return matrices

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([F.linear(x, self.up[i], self.up_bias[i]) for i in range(3)]).prod(0)


class InputsFirst(Stack):
    """The matrices of three layers, (3, inputs, outputs)."""

    def stored(self, matrices: Tensor) -> Tensor:
        return matrices.mT.contiguous()

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x @ self.up[i] + self.up_bias[i] for i in range(3)]).prod(0)


@pytest.fixture(autouse=True)
def patterns() -> Any:
    names = ("up",)
    for kind, transposed in ((Stack, ()), (InputsFirst, names)):
        tq.register_pattern(kind, WeightsPattern(names, ("x",), {}, names, {"up": ("up_bias", 0)}, transposed))
    yield
    del WEIGHTED[Stack], WEIGHTED[InputsFirst]


def models(kind: type[Stack]) -> tuple[nn.Module, nn.Module, Tensor]:
    """A model of layers, and one with a stack of the same numbers, calibrated on the same inputs."""
    torch.manual_seed(0)
    x, first, apart, last = torch.randn(32, 8), nn.Linear(8, 8), Apart(), nn.Linear(6, 4)
    made = []
    for middle in (apart, kind(apart)):
        model = tq.quantize(nn.Sequential(first, middle, last).eval(), RULES, x)
        tq.calibrate(model, [x])
        made.append(model)
    return made[0], made[1], x


KINDS = pytest.mark.parametrize("kind", [Stack, InputsFirst])


@KINDS
def test_a_stack_is_quantized_as_its_matrices_are(kind: type[Stack]) -> None:
    apart, stack, x = models(kind)
    slot = {slot.label: slot for slot in weight_slots(stack)}["1"]
    layers = [s for s in weight_slots(apart) if s.label.startswith("1.")]
    assert torch.equal(slot.seen(), torch.cat([s.seen() for s in layers]))
    assert torch.equal(slot.rows(), torch.stack([s.seen() for s in layers]))
    for state in (tq.QModuleState.QUANT_AWARE_TRAIN, tq.QModuleState.QUANT_EVAL):
        for model in (apart, stack):
            tq.set_qmodule_state(model, state)
            model(x).square().sum().backward()
        assert slot.quantizer is not None
        assert torch.equal(slot.quantizer(slot.seen()), torch.cat([s.quantizer(s.seen()) for s in layers]))  # type: ignore[misc]
        torch.testing.assert_close(stack(x), apart(x))
        gradient = slot.stored_layout(torch.cat([s.weight.grad for s in layers]))  # type: ignore[misc]
        torch.testing.assert_close(slot.weight.grad, gradient)
    with torch.no_grad():
        levels = slot.quantizer(slot.seen())
        slot.set_weight(levels)
    assert torch.equal(slot.seen(), levels)


@KINDS
@pytest.mark.parametrize("stages", [["gptq:act_order", "bias_correction"], ["gpfq", "refit"]])
def test_a_stack_is_rounded_as_its_matrices_are(kind: type[Stack], stages: list[str]) -> None:
    apart, stack, x = models(kind)
    for model in (apart, stack):
        ptq.run(model, stages, [x])
    slot = {slot.label: slot for slot in weight_slots(stack)}["1"]
    layers = [s for s in weight_slots(apart) if s.label.startswith("1.")]
    assert slot.quantizer is not None
    assert slot.quantizer.is_pinned
    torch.testing.assert_close(slot.seen(), torch.cat([s.seen() for s in layers]), rtol=1e-5, atol=1e-6)
    assert slot.bias is not None
    torch.testing.assert_close(slot.bias, torch.cat([s.bias for s in layers]))  # type: ignore[misc]
    torch.testing.assert_close(stack(x), apart(x))


@pytest.mark.parametrize("kind", [pytest.param(Stack, marks=pytest.mark.slow), InputsFirst])
def test_a_stack_in_files(kind: type[Stack], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    _, model, x = models(kind)
    ptq.run(model, ["nearest"])
    packed = save_packed(model, tmp_path / "model.safetensors")
    assert torch.equal(load_packed(packed, models(kind)[1])(x), model(x))
    file = export_onnx(model, tmp_path / "model.onnx", x)
    assert certify(model, file, x).passed


def test_products_that_are_not_those_of_the_layout_are_named() -> None:
    class Wrong(InputsFirst):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.up[0][:, :6].T) + F.linear(x, self.up[1].T)

    names = ("up",)
    tq.register_pattern(Wrong, WeightsPattern(names, ("x",), stacks=names, transposed=names))
    torch.manual_seed(0)
    model = tq.quantize(nn.Sequential(Wrong(Apart())), [{"types": "Experts", "weight": "affine:3/channel"}])
    report = ptq.run(model, ["gptq"], [torch.randn(8, 8)])
    del WEIGHTED[Wrong]
    assert "where products x @ weight or F.linear(x, weight.T) can be followed" in report.steps[0].note
