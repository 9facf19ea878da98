"""Experts: stacks of matrices, of which each token goes to a few, and lists of layers called for some tokens only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchquant as tq
from torchquant import ptq
from torchquant.ptq.reads import paired_rows, rows_read
from torchquant.qmodule import QWeights, WeightsPattern
from torchquant.qmodule.weighted import WEIGHTED
from torchquant.utils import weight_slots

W = "affine:3,symmetric=narrow/channel"


class Experts(nn.Module):
    """Four experts of two layers, as transformers stores them."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 6, 8) / 3)
        self.down = nn.Parameter(torch.randn(4, 8, 6) / 3)

    def forward(self, x: Tensor, choice: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for i in choice.unique():
            own = choice == i
            y[own] = F.linear(torch.relu(F.linear(x[own], self.up[i])), self.down[i])
        return y


class Net(nn.Module):
    """A router that never chooses the last expert, and the third only for large tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.experts = nn.Linear(8, 8), Experts()

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        y = self.first(x).flatten(0, 1)
        choice = (y[:, 0] > 0).long()
        choice[x.flatten(0, 1).amax(1) > 4] = 2
        return self.experts(y, choice).view_as(x)


@pytest.fixture(autouse=True)
def pattern() -> Any:
    stacks = ("up", "down")
    tq.register_pattern(Experts, WeightsPattern(weights=stacks, values=("x",), stacks=stacks))
    yield
    del WEIGHTED[Experts]


def model_and_data() -> tuple[nn.Module, nn.Module, list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    net = Net().eval()
    batches = []
    for _ in range(2):
        x, mask = torch.randn(8, 10, 8), torch.ones(8, 10, dtype=torch.long)
        mask[:, 7:] = 0
        x[:, 7:] *= 100
        batches.append({"x": x, "attention_mask": mask})
    batches[0]["x"][0, 0] = 5.0
    return net, tq.quantize(net, [{"types": ["Linear", "Experts"], "weight": W}], batches[0]), batches


def test_each_row_of_each_matrix_is_a_channel() -> None:
    net, model, batches = model_and_data()
    slots = {slot.label: slot for slot in weight_slots(model)}
    slot = slots["experts.up"]
    assert (slot.seen().shape, slot.rows().shape) == ((24, 8), (4, 6, 8))
    tq.observe_weights(model)
    assert slot.quantizer is not None
    assert slot.quantizer.numbers()["range_max"].shape == (24,)
    tq.set_qmodule_state(model, tq.QModuleState.QUANT_EVAL)
    with torch.no_grad():
        for weight in slots.values():
            assert weight.quantizer is not None
            stored = net.get_submodule(weight.path).get_parameter(weight.name)
            stored.copy_(weight.quantizer(weight.seen()).view_as(stored))
        assert torch.equal(model(**batches[0]), net(**batches[0]))
    slot.set_weight(torch.zeros(24, 8), where=torch.arange(24)[:, None].lt(6).expand(24, 8))
    assert not slot.weight[0].any()
    assert slot.weight[1].any()


def test_what_experts_read() -> None:
    torch.manual_seed(0)
    layer, x = Experts(), torch.randn(6, 8)
    module, choice = QWeights(layer), torch.tensor([0, 1, 0, 2, 2, 0])
    up, down = module.weight_slots()
    (blocks,) = rows_read(up, ((x, choice), {}))
    assert [block.shape[1] for block in blocks] == [3, 1, 2, 0]
    assert torch.equal(blocks[0][0], x[[0, 2, 5]])
    (blocks,) = rows_read(down, ((x, choice), {}))
    torch.testing.assert_close(blocks[2][0], torch.relu(x[3:5] @ layer.up[2].T))
    ((_, floats),) = paired_rows(up, ((x, choice), {}), up, ((2 * x, choice.flip(0)), {}))
    assert floats is not None
    assert torch.equal(floats[0][0], 2 * x[[0, 2, 5]])
    (blocks,) = rows_read(up, ((x, choice), {}), torch.tensor([[1, 0, 1], [0, 1, 1]]).bool())
    assert [block.shape[1] for block in blocks] == [3, 0, 1, 0]


def test_experts_are_rounded_by_their_tokens_and_the_others_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchquant.ptq.layer.FEWEST", 4)
    net, model, batches = model_and_data()
    report = ptq.run(model, ["gptq", "bias_correction"], batches)
    said = {(step.stage, step.path): step for step in report.steps}
    step = said["gptq", "experts.up"]
    assert step.note == "of its 4 groups these had few rows and stay nearest: 2 (1 rows), 3 (0 rows); give more batches"
    assert step.error < step.nearest_error  # type: ignore[operator]
    assert step.rows < 112  # no padding
    slots = {slot.label: slot for slot in weight_slots(model)}
    assert slots["experts.up"].quantizer is not None
    nearest = slots["experts.up"].quantizer(net.experts.up.flatten(0, 1)).view(4, 6, 8)
    same = slots["experts.up"].rows().eq(nearest).flatten(1).all(1)
    assert same.tolist() == [False, False, True, True]
    plain = model_and_data()[1]
    ptq.run(plain, ["nearest"], batches)
    x = torch.randn(8, 10, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        errors = [(m(x) - net(x)).square().mean() for m in (model, plain)]
    assert errors[0] < errors[1]


class Listed(nn.Module):
    """Experts as a list of layers, each called for its tokens, if it has any."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.first, self.shift = nn.Linear(8, 8), shift
        self.experts, self.last = nn.ModuleList(nn.Linear(8, 8) for _ in range(4)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        choice = (y[:, 0] * 3 + self.shift).long().clamp(0, 3)
        out = torch.zeros_like(y)
        for i, expert in enumerate(self.experts):
            own = choice == i
            if own.any():
                out[own] = expert(y[own])
        return self.last(torch.relu(out))


@pytest.mark.parametrize("shift", [0.0, *(pytest.param(s, marks=pytest.mark.slow) for s in (2.0, -1.0))])
def test_other_routes_of_the_float_model_do_not_stop_a_run(shift: float) -> None:
    torch.manual_seed(1)
    net, batches = Listed(shift).eval(), list(torch.randn(40, 8).split(4))
    model = tq.quantize(net, [{"types": ["Linear"], "weight": "affine:2/channel"}], batches[0])
    steps = {step.path: step for step in ptq.run(model, ["gptq"], batches).steps}
    assert any(
        "other tokens reach it in the float model, where its own output is matched" in s.note for s in steps.values()
    )
    assert steps["last"].error < steps["last"].nearest_error  # type: ignore[operator]
    assert all(slot.quantizer.is_pinned for slot in weight_slots(model))  # type: ignore[union-attr]
    again = tq.quantize(net, [{"types": ["Linear"], "weight": "affine:2/channel"}], batches[0])
    assert {s.path: s.error for s in ptq.run(again, ["gptq"], batches).steps} == {p: s.error for p, s in steps.items()}
