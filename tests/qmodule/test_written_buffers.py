"""Whoever writes the buffers of quantizers, in whatever way, gets quantizers that know what they hold."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchquant as tq
from torchquant.errors import UnobservedRangeError

S = tq.QModuleState
RULES = ["w8a8", "w2a2-lsq"]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


def batch() -> Tensor:
    return torch.randn(32, 8, generator=torch.Generator().manual_seed(1))


@functools.cache
def made(rules: str, is_calibrated: bool) -> nn.Module:
    model = tq.quantize(net(), rules, batch())
    if is_calibrated:
        with tq.qmodule_state(model, S.CALIBRATION):
            model(batch())
        tq.set_qmodule_state(model, S.QUANT_EVAL)
    return model


def fresh(rules: str) -> nn.Module:
    return copy.deepcopy(made(rules, False))


def calibrated(rules: str) -> nn.Module:
    return copy.deepcopy(made(rules, True))


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def place(model: nn.Module, key: str) -> tuple[nn.Module, str]:
    owner, _, name = key.rpartition(".")
    return model.get_submodule(owner), name


def by_copy(model: nn.Module, known: nn.Module) -> None:
    with torch.no_grad():
        for key, tensor in tensors(model).items():
            tensor.copy_(tensors(known)[key])


def by_data(model: nn.Module, known: nn.Module) -> None:
    for key, tensor in tensors(model).items():
        tensor.data.copy_(tensors(known)[key])


def by_setattr(model: nn.Module, known: nn.Module) -> None:
    for key, tensor in reversed(tensors(known).items()):
        module, name = place(model, key)
        value = tensor.detach().clone()
        setattr(module, name, nn.Parameter(value) if isinstance(tensor, nn.Parameter) else value)


def on_meta_first(model: nn.Module, known: nn.Module) -> None:
    by_setattr(model.to("meta"), known)


def in_the_dictionaries(model: nn.Module, known: nn.Module) -> None:
    for key, tensor in tensors(known).items():
        module, name = place(model, key)
        (module._parameters if name in module._parameters else module._buffers)[name] = copy.deepcopy(tensor)


def one_by_one(model: nn.Module, known: nn.Module) -> None:
    for key, tensor in known.state_dict().items():
        model.load_state_dict({key: tensor}, strict=False)


def by_assign(model: nn.Module, known: nn.Module) -> None:
    model.to("meta").load_state_dict(known.state_dict(), assign=True)


def in_inference_mode(model: nn.Module, known: nn.Module) -> None:
    with torch.inference_mode():
        in_the_dictionaries(model, known)


WRITERS = [by_copy, by_data, by_setattr, on_meta_first, in_the_dictionaries, one_by_one, by_assign, in_inference_mode]


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("state_comes_first", [True, False])
def test_written_buffers_count_as_observed(write: Callable[..., None], rules: str, state_comes_first: bool) -> None:
    known, model, x = calibrated(rules), fresh(rules), batch()
    if state_comes_first:
        tq.set_qmodule_state(model, S.QUANT_EVAL)
    write(model, known)
    if not state_comes_first:
        tq.set_qmodule_state(model, S.QUANT_EVAL)
    with torch.no_grad():
        assert torch.equal(model(x), known(x))
    assert all(row.calibrated for row in tq.state_report(model))


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("write", WRITERS)
def test_buffers_that_saw_nothing_do_not_pass_for_observed(write: Callable[..., None], rules: str) -> None:
    """Also where the quantizers had seen data before."""
    model = calibrated(rules)
    model(batch())
    write(model, fresh(rules))
    tq.set_qmodule_state(model, S.QUANT_EVAL)
    with pytest.raises(UnobservedRangeError, match="has seen no data.*Start .*EMA.* after that"):
        model(batch())


def ema(started: nn.Module, model: nn.Module, decay: float, n_updates: int) -> nn.Module:
    averaged = torch.optim.swa_utils.AveragedModel(
        started, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(decay), use_buffers=True
    )
    averaged.n_averaged += 1  # as timm does it: the first update is an average already
    for _ in range(n_updates):
        averaged.update_parameters(model)
    tq.set_qmodule_state(averaged, S.QUANT_EVAL)
    return averaged


@pytest.mark.parametrize("rules", RULES)
def test_an_average_of_models_that_began_before_calibration_is_not_taken_for_calibrated(rules: str) -> None:
    model, x = calibrated(rules), batch()
    for n_updates in (1, 30, 100):
        with pytest.raises(UnobservedRangeError, match="has seen no data"):
            ema(fresh(rules), model, 0.9, n_updates)(x)
    with torch.no_grad():  # nothing is left of the time before
        assert torch.allclose(ema(fresh(rules), model, 0.9, 200)(x), model(x), atol=1e-3)
        assert torch.allclose(ema(model, model, 0.9, 3)(x), model(x), atol=1e-3)


@pytest.mark.parametrize("name", ["ModelEmaV2", "ModelEmaV3"])
def test_averages_of_timm(name: str) -> None:
    utils = pytest.importorskip("timm.utils")
    model = calibrated("w8a8")
    average = getattr(utils, name)(model, decay=0.5)
    average.update(model)
    with torch.no_grad():
        assert torch.equal(average.module(batch()), model(batch()))
    early = getattr(utils, name)(fresh("w8a8"), decay=0.5)
    early.update(model)
    tq.set_qmodule_state(early, S.QUANT_EVAL)
    with pytest.raises(UnobservedRangeError):
        early.module(batch())


def test_calibration_after_a_refusal_starts_anew() -> None:
    model = calibrated("w8a8")
    early = ema(fresh("w8a8"), model, 0.9, 3)
    with tq.qmodule_state(early, S.CALIBRATION):
        early(batch())
    ranges = [row.ranges for row in tq.state_report(early) if row.site != "weight"]
    assert ranges == [row.ranges for row in tq.state_report(model) if row.site != "weight"]


def test_a_checkpoint_of_0_1_that_saw_nothing_loads() -> None:
    quantizer = tq.make_quantizer("affine:8")
    old = {key: torch.zeros_like(value) for key, value in quantizer.state_dict().items()}
    quantizer.load_state_dict(old)
    assert not quantizer.is_ready
    quantizer.pre_observe(torch.tensor([-1.0, 2.0]))
    assert quantizer.is_ready


@pytest.mark.parametrize("name", ["exp_avg", "batch"])
@pytest.mark.parametrize("n_calls", [1, 2])
def test_compiled_observation_starts_as_the_eager_one_does(name: str, n_calls: int) -> None:
    from torchquant.range_observers import BatchMinMax, ExpAvgMinMax

    eager, compiled = ((ExpAvgMinMax if name == "exp_avg" else BatchMinMax)() for _ in range(2))
    eager.n_calls = compiled.n_calls = n_calls
    torch.compiler.reset()  # each test makes graphs of the one method
    observe: Any = torch.compile(compiled.observe_batch, fullgraph=True, backend="eager")
    for seed in range(4):
        x = torch.randn(8, generator=torch.Generator().manual_seed(seed))
        eager.observe_batch(x)
        observe(x)
    assert compiled.is_observed
    for one, other in zip(eager.get(), compiled.get(), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(eager.observed_weight, compiled.observed_weight)
    torch.compiler.reset()


def test_a_quantized_ensemble_under_vmap() -> None:
    models = [calibrated("w8a8") for _ in range(2)]
    x = batch()
    alone = [model.get_submodule("0") for model in models]
    parameters, buffers = torch.func.stack_module_state(alone)
    run = torch.vmap(lambda p, b: torch.func.functional_call(alone[0], (p, b), (x,)))
    with torch.no_grad():
        assert torch.allclose(run(parameters, buffers)[1], alone[1](x), atol=1e-6)
