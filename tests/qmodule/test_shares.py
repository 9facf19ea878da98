"""Ranks that see shares of a batch of every size, also none, have the numbers of one process with the joined batch."""

from __future__ import annotations

import datetime

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import torchquant as tq
from tests.processes import results_of_ranks
from torchquant.quantizers import QUANTIZERS
from torchquant.range_observers import OBSERVERS

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")

BATCH = 16
SHARES = ((13, 3), (16, 0), (1, 15))
NOBODY = (0, 0)
FURTHER = (
    "lsq:1,signed=false",
    "lsq:3,init=paper/channel",
    "ewgs:3",
    "lsqplus:3,offset=true/channel",
    "residual:5,iterations=2",
    "esb:4,k=1,center=true/channel",
    "ternary,method=exact/channel",
    "xnor/channel",
    "affine:8,observer=percentile,percentile=90,low_percentile=10/channel",
    "affine:8,observer=aciq,family=laplace/channel",
    "nvfp4",
    "affine:4/channel",
)


def quantizers() -> dict[str, tq.Quantizer]:
    found = {f"{name}-{i}": q for name in QUANTIZERS for i, q in enumerate(QUANTIZERS[name].examples(None))}
    found |= {text: tq.make_quantizer(text, site="output") for text in FURTHER}
    for name in OBSERVERS:
        found[f"observer {name}"] = tq.make_quantizer(f"affine:4,observer={name}", site="output")
        found[f"observer {name}, two calls"] = tq.make_quantizer(f"affine:4,observer={name}", site="output")
        found[f"observer {name}, two calls"].observer.n_calls = 2
    return {name: quantizer.double() for name, quantizer in found.items()}


def numbers(share: slice) -> dict[str, dict[str, Tensor]]:
    """What every quantizer has after two batches of which this rank saw `share`."""
    found = {}
    for name, quantizer in quantizers().items():
        generator = torch.Generator().manual_seed(5)
        for _ in range(2):
            x = torch.randn(BATCH, 3, 2, generator=generator, dtype=torch.float64)
            x *= torch.linspace(0.2, 3.0, BATCH, dtype=torch.float64).view(-1, 1, 1)
            quantizer.pre_observe((x.abs() if quantizer.signed is False else x)[share])
        found[name] = {key: value.clone() for key, value in quantizer.state_dict().items()}
    return found


def refusals(rank: int) -> list[str]:
    """What a rank without elements, or with a clean share, is told when the other one sees NaN."""
    said = []
    for text in ("affine:4", "esb:4,k=1", "codebook:2", "residual:2", "lsq:4", "affine:8,observer=percentile"):
        for size in (0, 3):
            x = torch.full((size,), 1.0) if rank == 0 else torch.full((4,), float("nan"))
            try:
                tq.make_quantizer(text, site="output").pre_observe(x)
            except tq.errors.NonFiniteError:
                continue
            said.append(f"{text} took NaN on the other rank, with {size} elements of its own")
    clamped = tq.make_quantizer("affine:4", site="output")
    clamped.pre_observe(torch.full((4 * rank,), 9.0), clamp=(0.0, 6.0))
    return said + ([] if clamped.observer.range_max == 6.0 else [f"clamped: {clamped.observer}"])


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=limit)
    try:
        found = {}
        for first, second in (*SHARES, NOBODY):
            found[first, second] = numbers(slice(first) if rank == 0 else slice(first, first + second))
        torch.save({"numbers": found, "refusals": refusals(rank)}, f"{folder}/rank{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:  # type: ignore[type-arg]
    folder = tmp_path_factory.mktemp("shares")
    return results_of_ranks(work, folder)


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Tensor]]:
    return numbers(slice(None))


@pytest.mark.parametrize("shares", SHARES)
def test_numbers_are_those_of_the_joined_batch(
    shares: tuple[int, int],
    ranks: list[dict],
    alone: dict[str, dict[str, Tensor]],  # type: ignore[type-arg]
) -> None:
    off = []
    for name, expected in alone.items():
        for key, value in expected.items():
            first, second = (rank["numbers"][shares][name][key] for rank in ranks)
            if not torch.equal(first, second):
                off.append(f"{name}.{key} differs between the ranks")
            elif first.shape != value.shape or not torch.allclose(first.double(), value.double(), 1e-9, 1e-12):
                off.append(f"{name}.{key}: {first.flatten()[:2].tolist()}, alone {value.flatten()[:2].tolist()}")
    assert not off


def test_a_batch_that_is_empty_on_all_ranks_changes_nothing(ranks: list[dict]) -> None:  # type: ignore[type-arg]
    for rank in ranks:
        for name, found in rank["numbers"][NOBODY].items():
            assert all(not (value > 0).any() for key, value in found.items() if key.endswith("observed_weight")), name


def test_nan_on_one_rank_is_refused_on_the_other_and_a_clamp_holds(ranks: list[dict]) -> None:  # type: ignore[type-arg]
    assert [rank["refusals"] for rank in ranks] == [[], []]
