"""`quantize` looks for the sites of a model once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import torchquant as tq
from torchquant.plan import quant_plan, quantize_model

X = torch.randn(2, 4)


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options of every capture from here on."""
    found: list[dict[str, Any]] = []
    for module in (quantize_model, quant_plan):
        plain = module.capture

        def call(*args: Any, _plain: Any = plain, **options: Any) -> Any:
            found.append(options)
            return _plain(*args, **options)

        monkeypatch.setattr(module, "capture", call)
    return found


@pytest.mark.parametrize("example", [X, None], ids=["example", "no example"])
@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
def test_rules_are_carried_out_on_what_they_were_made_for(
    captures: list[dict[str, Any]], example: torch.Tensor | None, inplace: bool
) -> None:
    tq.quantize(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), "w8a8", example, inplace=inplace)
    assert len(captures) == 1


def test_a_plan_is_carried_out_on_one_capture(captures: list[dict[str, Any]]) -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    plan = tq.QuantPlan.from_rules("w8a8", net, X)
    captures.clear()
    tq.quantize(net, plan)
    assert len(captures) == 1
