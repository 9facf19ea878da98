"""Lean training on two ranks, replicated and sharded, gives the gradients of the plain formulation bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import torchquant as tq
from tests.processes import results_of_ranks
from tests.qmodule.test_lean import W8A8, WAYS, images, net
from torchquant.qmodule import recorder

STEPS = 2
HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")


class Normed(nn.Module):
    """Layer norms that keep what linear layers give: in another shard, whose weights are freed when it is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(64) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(-1, 64)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = torch.relu(norm(layer(x)))
        return x


def by_layers(model: nn.Module, **options: Any) -> nn.Module:
    for module in model.modules():
        if isinstance(module, tq.QModule) and next(module.parameters(), None) is not None:
            fully_shard(module, **options)
    return fully_shard(model, **options)


WRAPPED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "replicated": DistributedDataParallel,
    "sharded": fully_shard,
    "sharded by layers": by_layers,
    "in bfloat16": lambda model: by_layers(model, mp_policy=HALF),
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "convolutions": net,
    "learned steps": lambda: net("w4a4-lsq"),
    "norms": lambda: net([{key: W8A8[0][key] for key in ("weight", "input")}], make=Normed),
}
CASES = {
    ("convolutions", "replicated"): (),
    ("convolutions", "sharded by layers"): (),
    ("learned steps", "sharded"): (),
    ("norms", "replicated"): (),
    ("norms", "sharded by layers"): (),
    ("norms", "in bfloat16"): (),
}


def own(model: nn.Module) -> list[Tensor]:
    return [x for x in (*model.parameters(), *model.buffers()) if not isinstance(x, DTensor)]


def keep(alive: list[Tensor], x: Tensor) -> Tensor:
    alive.append(x)
    return x


def n_bytes(tensors: list[Tensor], within: list[Tensor] | None = None) -> int:
    """The memory of tensors, each storage once; of those that are in `within` too."""
    sizes = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}
    counted = {x.untyped_storage()._cdata for x in within or tensors}
    return sum(size for storage, size in sizes.items() if storage in counted)


def whole(x: Tensor) -> Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


def steps(model: nn.Module, rank: int, wrap: Callable[[nn.Module], nn.Module], way: tuple[bool, bool]) -> Any:
    """Train a copy on this rank's part of the images. Return gradients of each step, parameters, and bytes kept."""
    model = copy.deepcopy(model)
    tq.set_lean(model, way[0], recompute=way[1])
    network, found, kept = wrap(model), [], 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(STEPS):
        alive: list[Tensor] = []
        with saved_tensors_hooks(partial(keep, alive), lambda x: x):
            loss = network((step + 1) * images().chunk(2)[rank]).float().square().mean()
        kept = n_bytes(alive) - n_bytes(own(model), within=alive)
        del alive
        loss.backward()
        found.append({name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
        optimizer.zero_grad()
    return found, {name: whole(p) for name, p in model.named_parameters()}, kept


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    recorder.FEWEST_ELEMENTS = 16
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        models = {name: make() for name, make in MODELS.items()}
        found = {
            (name, wrapped, way): steps(models[name], rank, WRAPPED[wrapped], options)
            for name, wrapped in CASES
            for way, options in WAYS.items()
        }
        torch.save(found, f"{folder}/rank{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    return results_of_ranks(work, folder)


@pytest.mark.parametrize(("name", "wrapped"), CASES)
def test_lean_gradients_equal_plain_ones(name: str, wrapped: str, ranks: list[dict[Any, Any]]) -> None:
    for rank in ranks:
        (expected, parameters, most), *others = (rank[name, wrapped, way] for way in WAYS)
        assert all(grad.isfinite().all() for grads in expected for grad in grads.values())
        assert len(expected[0]) == len(parameters)
        for gradients, trained, kept in others:
            torch.testing.assert_close(gradients, expected, rtol=0, atol=0)
            torch.testing.assert_close(trained, parameters, rtol=0, atol=0)
            assert kept < (0.7 if name == "convolutions" else 1.0) * most


@pytest.mark.parametrize("name", ["convolutions", "norms"])
def test_sharded_training_equals_replicated(name: str, ranks: list[dict[Any, Any]]) -> None:
    for rank in ranks:
        for way in WAYS:
            (grads, parameters, _), (found, trained, _) = (
                rank[name, wrapped, way] for wrapped in ("replicated", "sharded by layers")
            )
            torch.testing.assert_close(found, grads, rtol=0, atol=0)
            torch.testing.assert_close(trained, parameters, rtol=0, atol=0)
