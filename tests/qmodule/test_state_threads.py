"""`qmodule_state` on one model in several threads: one at a time, or refused."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import torchquant as tq
from torchquant.errors import ConfigError
from torchquant.qmodule import QModuleState as S


def model() -> nn.Sequential:
    return nn.Sequential(
        tq.QWrapper(nn.Linear(2, 2), tq.make_quantizer("affine:4,symmetric=narrow"), None), tq.QOp(torch.relu, None)
    )


def states(net: nn.Module) -> set[S]:
    return {module.state for _, module in tq.utils.qmodules(net)}


def elsewhere(do: Callable[[], object]) -> object:
    with ThreadPoolExecutor(1, thread_name_prefix="other") as pool:
        return pool.submit(do).result()


def entered(net: nn.Module, state: S) -> set[S]:
    with tq.qmodule_state(net, state):
        return states(net)


def test_a_second_thread_is_refused_while_one_is_inside() -> None:
    net = model()
    with tq.qmodule_state(net, S.CALIBRATION):
        with pytest.raises(
            ConfigError, match="thread 'other_0': thread 'MainThread' is inside qmodule_state"
        ) as caught:
            elsewhere(lambda: entered(net, S.QUANT_EVAL))
        assert "copy.deepcopy" in str(caught.value)
        with pytest.raises(ConfigError, match="cannot set a state in thread"):
            elsewhere(lambda: tq.set_qmodule_state(net, S.QUANT_EVAL))
        with pytest.raises(ConfigError, match="enter QUANT_EVAL"):  # a part of the model
            elsewhere(lambda: entered(net[1], S.QUANT_EVAL))
        assert states(net) == {S.CALIBRATION}
    assert states(net) == {S.BYPASSED}
    assert elsewhere(lambda: entered(net, S.QUANT_EVAL)) == {S.QUANT_EVAL}
    assert states(net) == {S.BYPASSED}


def test_threads_with_a_copy_each_or_one_lock_do_not_mix() -> None:
    net, lock, wrong = model(), threading.Lock(), []

    def work(number: int) -> None:
        state = S.CALIBRATION if number % 2 else S.QUANT_AWARE_TRAIN
        mine = copy.deepcopy(net)
        for _ in range(50):
            wrong.extend(found for found in [entered(mine, state)] if found != {state})
            with lock:
                wrong.extend(found for found in [entered(net, state)] if found != {state})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert not wrong
    assert states(net) == {S.BYPASSED}


def test_nested_reused_and_left_by_an_exception_in_one_thread() -> None:
    net = model()
    outer = tq.qmodule_state(net, S.CALIBRATION)
    for _ in range(2):
        with pytest.raises(KeyError, match="True"), outer, tq.qmodule_state(net[0], S.QUANT_EVAL), outer:
            raise KeyError(states(net) == {S.CALIBRATION} or states(net))
        assert states(net) == {S.BYPASSED}
    assert elsewhere(lambda: entered(net, S.QUANT_EVAL)) == {S.QUANT_EVAL}


def test_a_refused_entry_holds_nothing() -> None:
    first, second = model(), model()
    both = nn.Sequential(first, second)
    with tq.qmodule_state(second, S.CALIBRATION):
        with pytest.raises(ConfigError):
            elsewhere(lambda: entered(both, S.QUANT_EVAL))
        assert states(first) == {S.BYPASSED}
        assert elsewhere(lambda: entered(first, S.QUANT_EVAL)) == {S.QUANT_EVAL}


def test_a_thread_that_died_inside_holds_nothing() -> None:
    net, kept = model(), []

    def enter_and_die() -> None:
        context = tq.qmodule_state(net, S.CALIBRATION)
        kept.append(context)
        context.__enter__()

    thread = threading.Thread(target=enter_and_die)
    thread.start()
    thread.join()
    assert entered(net, S.QUANT_EVAL) == {S.QUANT_EVAL}


def test_tasks_of_one_thread_are_refused_too() -> None:
    net = model()

    async def hold(state: S) -> None:
        with tq.qmodule_state(net, state):
            await asyncio.sleep(0)
            assert states(net) == {state}

    async def both() -> list[BaseException | None]:
        return await asyncio.gather(hold(S.CALIBRATION), hold(S.QUANT_EVAL), return_exceptions=True)

    first, second = asyncio.run(both())
    assert first is None
    assert isinstance(second, ConfigError)
    assert states(net) == {S.BYPASSED}


def test_copies_and_pickles_of_a_held_model_are_free() -> None:
    net = model()
    with tq.qmodule_state(net, S.CALIBRATION):
        twin = copy.deepcopy(net)
        assert elsewhere(lambda: entered(twin, S.QUANT_EVAL)) == {S.QUANT_EVAL}
