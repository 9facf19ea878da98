"""Random small nets (random_nets.py) keep the laws of a quantized model (random_net_laws.py)."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import pytest
import torch
from torch import nn

from tests.graph import random_net_laws
from tests.graph.random_net_features import FEATURES
from tests.graph.random_net_laws import check
from tests.graph.random_nets import draw, make

N_SEEDS, N_MORE, AT_ONCE = 2, 2002, 20


def require_laws(seed: int) -> None:
    net = make(draw(seed))
    failures = check(net)
    told = "\n".join(f"{f.law} ({f.setting}): {f.message}" for f in failures)
    assert failures == [], f"{told}\n\n{net.source}"


@pytest.mark.parametrize("seed", range(N_SEEDS))
def test_laws(seed: int) -> None:
    require_laws(seed)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(N_SEEDS, N_MORE, AT_ONCE))
def test_laws_of_more_nets(first: int) -> None:
    for seed in range(first, first + AT_ONCE):
        require_laws(seed)


def test_a_seed_is_a_net() -> None:
    spec = draw(7)
    assert make(draw(7)).source == make(spec).source
    assert list(FEATURES)[7] in spec.features()


def broken_by(monkeypatch: pytest.MonkeyPatch, seed: int, spoil: Callable[[nn.Module], None]) -> set[str]:
    """The laws that are broken by a copy of a float net that `spoil` has changed."""

    def spoiled_copy(model: nn.Module, rules: object, example: object) -> nn.Module:
        spoil(model)
        return copy.deepcopy(model)

    monkeypatch.setattr(random_net_laws, "quantize", spoiled_copy)
    return {failure.law for failure in check(make(draw(seed)), ("1", "2"))}


@pytest.mark.parametrize("seed", range(0, 60, 11))
def test_a_copy_keeps_the_laws_of_the_float_model(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    assert broken_by(monkeypatch, seed, lambda model: None) == set()


def test_the_laws_see_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def weight(model: nn.Module) -> None:
        with torch.no_grad():
            next(model.parameters()).add_(1.0)

    def draws(model: nn.Module) -> None:
        model.register_forward_hook(_draw)

    assert {"1.untouched", "2.eval", "2.train"} <= broken_by(monkeypatch, 1, weight)
    assert {"1.untouched", "2.eval"} <= broken_by(monkeypatch, 1, draws)
    assert broken_by(monkeypatch, 1, lambda model: random.random() and None) == {"1.untouched"}


def _draw(module: nn.Module, args: object, output: object) -> None:
    random.random()
