"""Quantization-aware training sharded by `fully_shard` over two ranks, saved and loaded by torch's own checkpoints."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import torchquant as tq
from tests.processes import results_of_ranks
from torchquant.errors import ConfigError
from torchquant.utils import qmodules

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")

RULES = {"ranges": "w4a8", "learned steps": [{"weight": "lsq:4/channel", "input": "lsq:8", "output": "lsq:8"}]}
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def net(rules: Any) -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 16), nn.ReLU())
    return tq.quantize(nn.Sequential(*layers, nn.Linear(16, 4)), rules, images(0))


def images(step: int) -> Tensor:
    return torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(step))


def sharded(rules: Any, calibrated: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = net(rules)
    if calibrated:
        tq.calibrate(model, [images(0), images(1)], state=tq.QModuleState.QUANT_AWARE_TRAIN)
    for module in model.modules():
        if isinstance(module, tq.QModule) and next(module.parameters(), None) is not None:
            fully_shard(module)
    fully_shard(model)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, steps: range) -> None:
    model.train()
    for step in steps:
        model(images(2 + step).chunk(2)[rank]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def evaluated(model: nn.Module) -> Tensor:
    with torch.no_grad(), tq.qmodule_state(model.eval(), tq.QModuleState.QUANT_EVAL):
        return model(images(0)).clone()


def refused(model: nn.Module) -> str:
    try:
        return str(len(tq.state_report(model)))
    except ConfigError as error:
        return str(error)


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        found: dict[str, Any] = {}
        for name, rules in RULES.items():
            model, optimizer = sharded(rules, calibrated=True)
            train(model, optimizer, rank, range(2))
            for statistic in model[1].buffers():  # each rank has its own, and a checkpoint those of any rank
                dist.broadcast(statistic, 0)
            states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
            dcp.save(states, checkpoint_id=f"{folder}/{name}")
            saved = evaluated(model)

            fresh, other = sharded(rules, calibrated=False)
            states = dict(zip(("model", "optimizer"), get_state_dict(fresh, other), strict=True))
            dcp.load(states, checkpoint_id=f"{folder}/{name}")
            set_state_dict(fresh, other, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
            loaded = evaluated(fresh)

            train(model, optimizer, rank, range(2, 4))
            train(fresh, other, rank, range(2, 4))
            found[name] = {
                "sharded": any(isinstance(p, DTensor) for p in model.parameters()),
                "report": refused(fresh),
                "states": {module.state.name for _, module in qmodules(fresh)},
                "outputs": (saved, loaded),
                "trained": (evaluated(model), evaluated(fresh)),
                "whole": get_model_state_dict(fresh, options=WHOLE),
            }
        torch.save(found, f"{folder}/rank{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    return results_of_ranks(work, folder)


@pytest.mark.parametrize("name", RULES)
def test_a_loaded_training_continues_with_the_same_numbers(name: str, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        found = rank[name]
        assert found["sharded"]
        assert found["states"] == {"QUANT_AWARE_TRAIN"}
        assert torch.equal(*found["outputs"])
        assert torch.equal(*found["trained"])
        assert not torch.equal(found["outputs"][0], found["trained"][0])


def test_a_report_reads_whole_numbers(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["ranges"]["report"] == str(len(tq.state_report(net("w4a8"))))
        assert "the parameters of 0 weight are sharded over ranks" in rank["learned steps"]["report"]
        assert "report on a model that is not sharded" in rank["learned steps"]["report"]


@pytest.mark.parametrize("name", RULES)
def test_the_whole_state_loads_into_one_process(name: str, ranks: list[dict[str, Any]]) -> None:
    model = net(RULES[name])
    model.load_state_dict(ranks[0][name]["whole"])
    torch.testing.assert_close(evaluated(model), ranks[0][name]["trained"][1], rtol=0, atol=1e-6)
