"""A plan made for calls with optional arguments says in its file how the model is called."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchquant as tq
from torchquant.errors import ConfigError
from torchquant.graph.calls import TENSOR


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor, masks: Any = (), scale: float = 2.0) -> Tensor:
        for mask in masks:
            x = x * mask
        return self.out(x) * scale


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.head = Head()

    def forward(
        self, x: Tensor, gate: Tensor | None = None, mode: str = "plain", other: Any = None, **more: Any
    ) -> Tensor:
        y = self.first(x)
        if gate is not None:
            y = y * gate
        if mode == "skip":
            y = y + x
        return self.head(y, list(more.values()), scale=1.0)


X = torch.rand(2, 8)
EXAMPLE = {"x": X, "gate": X, "mode": "skip", "a": X, "b": X}


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def test_a_loaded_plan_applies_as_the_plan_itself(tmp_path: Path) -> None:
    plan = tq.quantize(net(), "w8a8", EXAMPLE).plan
    assert {"mul", "add"} <= {site.path for site in plan.sites}
    loaded = tq.QuantPlan.load(plan.save(tmp_path / "plan.yaml"))
    assert loaded == plan
    assert loaded.patterns == plan.patterns
    models = [each.apply(net()) for each in (plan, loaded, pickle.loads(pickle.dumps(plan)))]
    for model in models:
        with tq.qmodule_state(model, tq.QModuleState.CALIBRATION):
            model(**EXAMPLE)
        tq.set_qmodule_state(model, tq.QModuleState.QUANT_EVAL)
    outputs = [model(**EXAMPLE) for model in models]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_what_the_defaults_tell_is_not_written() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    for example in (None, X):
        assert "calls" not in tq.quantize(model, "w8a8", example).plan.to_dict()
    calls = tq.quantize(net(), "w8a8", EXAMPLE).plan.to_dict()["calls"]
    tensor = {"tensor": True}
    rest = [{"tuple": []}, {"dict": {"a": tensor, "b": tensor}}]
    assert calls[""] == {"tuple": [tensor, tensor, "skip", None, *rest]}
    assert list(calls)[0] == ""


def test_an_argument_without_text_is_told_of_when_it_is_missed() -> None:
    plan = tq.quantize(net(), "w8a8", {**EXAMPLE, "other": object()}).plan
    plan.apply(net())
    with pytest.raises(ConfigError, match="or for calls with arguments that are not in the plan"):
        tq.QuantPlan.from_dict(plan.to_dict()).apply(net())


@pytest.mark.parametrize(
    ("calls", "said"),
    [
        ([1], r"calls must be a mapping of paths to calls, got \[1\]"),
        ({"": {"tensor": False}}, "calls, '': expected {tensor: true}"),
        ({"": {"tuple": 3}}, "expected {tensor: true}, {tuple: "),
        ({"head": {"tuple": [1, 2]}}, "calls, 'head': a call must be a tuple of every argument"),
        ({"head": "x"}, "calls, 'head': a call must be"),
    ],
)
def test_wrong_calls_of_a_file_are_refused(calls: Any, said: str) -> None:
    data = tq.quantize(net(), "w8a8", EXAMPLE).plan.to_dict()
    with pytest.raises(ConfigError, match=said):
        tq.QuantPlan.from_dict({**data, "calls": calls})


def test_the_kinds_of_values_come_back_as_they_were() -> None:
    plan = tq.quantize(net(), "w8a8", EXAMPLE).plan
    call = (TENSOR, [TENSOR, 1, True, 1.0], ((), None), {"k": {"tensor": "text"}}, (), {})
    data = tq.QuantPlan(plan.sites, patterns={"": call}).to_dict()
    found = tq.QuantPlan.from_dict(data).patterns[""]
    assert repr(found) == repr(call)
