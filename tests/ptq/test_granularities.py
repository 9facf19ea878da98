"""Post-training algorithms on weights with numbers for each input channel, or for each block."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import torchquant as tq
from torchquant.ptq.layer import Layer


def quantized(spec: str, width: int = 12) -> tuple[nn.Module, list[torch.Tensor]]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(8, width)).eval()
    batches = [torch.randn(32, 4, 3, 3) for _ in range(2)]
    model = tq.quantize(net, [{"weight": spec}], batches[0])
    tq.calibrate(model, batches)
    return model, batches


@pytest.mark.parametrize("spec", ["affine:3/in_channel", "esb:3,k=1/in_channel", "affine:3/block=4x2"])
@pytest.mark.parametrize("stage", ["gptq:act_order", "descent", "hqq"])
def test_layers_are_rounded_on_their_own_grids(spec: str, stage: str) -> None:
    model, batches = quantized(spec)
    before = {slot.label: slot.quantizer(slot.seen()) for slot in tq.utils.weight_slots(model)}
    report = tq.ptq.run(model, [stage], batches)
    for step in report.steps:
        assert step.error is None or step.error <= step.nearest_error
    if stage != "hqq":
        assert min(step.error / step.nearest_error for step in report.steps) < 0.9
        changed = [
            slot for slot in tq.utils.weight_slots(model) if not slot.quantizer(slot.seen()).equal(before[slot.label])
        ]
        assert changed


@pytest.mark.parametrize("spec", ["affine:4/in_channel", "affine:4/block=4x2"])
@pytest.mark.parametrize("stage", ["clip", "refit", "step_tuning:steps=1"])
def test_what_sets_numbers_by_rows_says_so(spec: str, stage: str) -> None:
    """Of as many inputs as outputs too: numbers of inputs are not taken for those of outputs."""
    model, batches = quantized(spec, 8)
    numbers = [slot.quantizer.numbers() for slot in tq.utils.weight_slots(model)]
    report = tq.ptq.run(model, [stage], batches)
    assert all("give the weight one scale (/tensor) or /channel" in step.note for step in report.steps)
    after = [slot.quantizer.numbers() for slot in tq.utils.weight_slots(model)]
    assert all(
        torch.equal(number, new[name]) for old, new in zip(numbers, after, strict=True) for name, number in old.items()
    )


@pytest.mark.parametrize("spec", ["affine:4/in_channel", "nf4/in_channel", "lsq:4/block=2x2"])
def test_columns_alone_are_as_in_the_whole(spec: str) -> None:
    model, _ = quantized(spec)
    for slot in tq.utils.weight_slots(model):
        slot.quantizer.pin(slot.seen())
        layer = Layer(slot, slot.rows())
        expected, order = layer.quantized(), torch.stack([torch.randperm(layer.weight.shape[2]) for _ in layer.weight])
        for columns in (order, order[:1].expand_as(order), order[:, :1]):
            picked, wanted = (
                t.gather(2, columns[:, None].expand(-1, t.shape[1], -1)) for t in (layer.weight, expected)
            )
            assert torch.equal(layer.nearest(picked, columns), wanted)
