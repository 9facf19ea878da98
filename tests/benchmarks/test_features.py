"""The table of features says yes where a library does a thing, and no where it raises or does another."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from benchmarks import features


def test_the_table_is_tried(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    small = [case for case in features.cases() if "resnet18" not in case[0]]
    monkeypatch.setattr(features, "cases", lambda: small)
    features.main(["--libraries", "torchquant"])
    assert [line.split(" | ")[-1] for line in capsys.readouterr().out.splitlines()[2:]] == ["yes |", "yes |"]


@pytest.mark.parametrize(
    ("check", "answer"),
    [(features.trains, "no"), (features.reloads, "yes"), (features.takes_float, "no (RuntimeError)")],
)
def test_what_a_library_does_not_do_is_no(check: features.Check, answer: str) -> None:
    _, _, net, x = features.cases()[1]

    def frozen(net: nn.Module, x: Any) -> nn.Module:
        model = nn.Sequential(net, nn.Linear(4, 4)).eval()
        nn.init.ones_(model[1].weight)
        nn.init.zeros_(model[1].bias)
        return model.requires_grad_(False).train() if check is not features.trains else frozen_but_last(model)

    def frozen_but_last(model: nn.Module) -> nn.Module:
        model[0].requires_grad_(False)
        return model

    assert features.tried(check, frozen, net, x) == answer
