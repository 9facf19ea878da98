"""Two ranks of DistributedDataParallel against one process on the joined batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import torchquant as tq
from tests.processes import results_of_ranks
from torchquant.errors import ConfigError, NonFiniteError
from torchquant.search import PrecisionLearning, SearchSettings

WORLD_SIZE = 2
BATCH = 8
STEPS = 4

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")


# Schemes and observers whose numbers on N ranks are those of one process on the joined batch.
AGREEING_SCHEMES = (
    "ul2q:3",
    "vecq:3/channel",
    "clipq:3",
    "zoomq:3",
    "xnor/channel",
    "esb:4,k=1,center=true",
    "tqt:4",
    "pact:4",
)
AGREEING_OBSERVERS = ("running", "histogram", "mse", "entropy", "aciq", "meanstd")


def small_model() -> nn.Sequential:
    """Float64, so that another order of summation is far below every tolerance. Same weights each time."""
    torch.manual_seed(1)

    def weights() -> tq.Quantizer:
        return tq.AffineQuantizer(4, tq.BatchMinMax(axis=0), symmetric="narrow", gradient_clip=True)

    def acts(axis: int | None = None) -> tq.Quantizer:
        return tq.AffineQuantizer(8, tq.ExpAvgMinMax(axis=axis), gradient_clip=True)

    return nn.Sequential(
        tq.QWrapper([nn.Conv2d(2, 4, 3, padding=1), nn.ReLU()], weights(), acts(), input_quantizer=acts()),
        tq.QWrapper([nn.Conv2d(4, 4, 3), nn.SiLU()], weights(), acts(axis=1)),
        nn.Flatten(),
        tq.QWrapper(nn.Linear(4 * 36, 3), weights(), acts()),
    ).double()


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    xs = torch.randn(STEPS, BATCH, 2, 8, 8, generator=generator, dtype=torch.float64)
    xs *= torch.linspace(0.5, 2.0, BATCH, dtype=torch.float64).view(1, -1, 1, 1, 1)  # the ranks' ranges differ
    return list(zip(xs, torch.randint(0, 3, (STEPS, BATCH), generator=generator), strict=True))


def part_of(x: Tensor, rank: int | None) -> Tensor:
    return x if rank is None else x.chunk(WORLD_SIZE)[rank]


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def calibrated(rank: int | None) -> dict[str, Tensor]:
    """State after calibration on whole numbers: sums are exact, so any difference is one of method."""
    model = small_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter * 64).round())
    model[1].activation = None
    tq.set_qmodule_state(model, tq.QModuleState.CALIBRATION)
    for x, _ in batches():
        model((part_of(x, rank) * 8).round())
    return snapshot(model)


def trained(rank: int | None) -> list[dict[str, Tensor]]:
    """State after each step of quantization-aware training; the second half with frozen ranges."""
    model = small_model()
    network = model if rank is None else DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    states = []
    for step, (x, labels) in enumerate(batches()):
        observe = step < STEPS // 2
        tq.set_qmodule_state(model, tq.QModuleState.QUANT_AWARE_TRAIN if observe else tq.QModuleState.QUANT_EVAL)
        optimizer.zero_grad()
        F.cross_entropy(network(part_of(x, rank)), part_of(labels, rank)).backward()
        optimizer.step()
        states.append(snapshot(model))
    return states


def fitted(rank: int | None) -> dict[str, Tensor]:
    """Numbers that data-driven quantizers fit to activations of which each rank sees a part."""
    found = {}
    quantizers = {
        "twn": tq.TernaryQuantizer(momentum=0.5),
        "exact": tq.TernaryQuantizer("exact", axis=1),
        "esb": tq.ESBQuantizer(4, 1, momentum=0.5),
        "esb_channel": tq.ESBQuantizer(3, 0, axis=1),
    }
    for text in AGREEING_SCHEMES:
        quantizers[text] = tq.make_quantizer(text, site="output").double()
    for name, quantizer in quantizers.items():
        for x, _ in batches():
            quantizer.pre_observe(part_of(x, rank))
        found |= {f"{name}.{key}": value for key, value in quantizer.state_dict().items()}
    for name in AGREEING_OBSERVERS:
        observer = tq.make_quantizer(f"affine:4,observer={name}/channel", site="output").observer.double()
        for x, _ in batches():
            observer.observe_batch(part_of(x, rank))
        found |= {f"{name}.{key}": value for key, value in observer.state_dict().items()}
    return found


def searched(rank: int | None) -> dict[str, Tensor]:
    """Logits and widths of a search, of which each rank sees a part of the batches and draws noise of its own."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    rules = [{"weight": ["clipq:{n}/channel", "affine:{n},symmetric=narrow/channel"], "output": "affine:8"}]
    settings = SearchSettings(epochs=2, warmup=0, alternate=False, arch_rate=0.1, target=True)
    search = PrecisionLearning(net, rules, torch.zeros(1, 2, 8, 8), "bits<=4", settings)
    torch.manual_seed(0 if rank is None else rank)
    search.run([(part_of(x.float(), rank), part_of(labels, rank)) for x, labels in batches()])
    named = {f"theta{i}": p for i, p in enumerate(search.logits)} | {
        f"width{i}": p for i, p in enumerate(search.widths)
    }
    return {name: p.detach().clone() for name, p in named.items()} | {"prices": search.prices.values}


def pinned(rank: int | None) -> dict[str, Tensor]:
    """State before and after training with pinned weight quantizers, one of which learns its step."""
    model = small_model()
    model[1].weight_quantizer = tq.make_quantizer("lsq:4/channel").double()
    model[3].weight_quantizer = tq.make_quantizer("nvfp4").double()
    for place in (0, 1, 3):
        (slot,) = model[place].weight_slots()
        slot.quantizer.pin(slot.seen())
    before = snapshot(model)
    tq.set_qmodule_state(model, tq.QModuleState.QUANT_AWARE_TRAIN)
    network = model if rank is None else DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for x, labels in batches():
        optimizer.zero_grad()
        F.cross_entropy(network(part_of(x, rank)), part_of(labels, rank)).backward()
        optimizer.step()
    return {f"before.{key}": value for key, value in before.items()} | snapshot(model)


def rounded(rank: int | None) -> dict[str, Tensor]:
    """State after post-training algorithms on the batches of which this rank sees a part."""
    model = small_model()
    tq.ptq.run(model, ["calibrate", "gptq", "refit", "bias_correction"], [part_of(x, rank) for x, _ in batches()])
    return snapshot(model)


LEARNING = ("brecq:steps=6", "qdrop:steps=3", "autoround:unit=block,steps=4", "omniquant:steps=3", "block_ap:steps=3")


def learned(rank: int | None) -> dict[str, Tensor]:
    """State after stages that learn by gradients, on the batches of which this rank sees a part."""
    parts, found = [part_of(x, rank) for x, _ in batches()], {}
    for stage in LEARNING:
        model = small_model()
        report = tq.ptq.run(model, ["calibrate", stage, "step_tuning:steps=2"], parts)
        found |= {f"{stage}.{key}": value for key, value in snapshot(model).items()}
        found[f"{stage}.errors"] = torch.tensor([s.error for s in report.steps if s.error is not None])
    return found


def transformed(rank: int | None) -> dict[str, Tensor]:
    """Scales before the inputs, and what follows from the inputs in model stages."""
    model = small_model()
    tq.ptq.run(model, ["smoothquant:steps=4,fold=false"], [part_of(x, rank) for x, _ in batches()], keep="always")
    return snapshot(model)


def uneven(rank: int | None) -> dict[str, Tensor]:
    """State after stages for which the last rank has no batches."""
    model, weights = small_model(), nn.Sequential(tq.QWrapper(nn.Linear(8, 8), tq.make_quantizer("affine:3/channel")))
    tq.calibrate(model, [part_of(x, rank) for x, _ in batches()])
    own = [x for x, _ in batches()] if not rank else []
    tq.ptq.run(model, ["gptq", "brecq:steps=3", "bias_correction"], own)
    tq.ptq.run(weights.double(), ["smoothquant:steps=3,fold=false", "gptq"], [x.flatten(0, 2) for x in own])
    return snapshot(model) | {f"weights.{key}": value for key, value in snapshot(weights).items()}


def said(rank: int) -> list[str]:
    """What a rank is told if one has fewer batches, or meets an error."""
    found, whole = [], [x for x, _ in batches()]
    wrong = [torch.zeros(1, 3, 8, 8, dtype=torch.float64)] if rank else whole[:1]
    model = small_model()
    tq.calibrate(model, whole)
    for stage, given in (("calibrate", whole[rank:]), ("gptq", wrong), ("brecq", wrong), ("awq:fold=false", wrong)):
        try:
            tq.ptq.run(model, [stage], given)
        except (ConfigError, RuntimeError) as error:
            found.append(f"{error}".splitlines()[0])
    return found


def refused(rank: int) -> bool:
    """Whether a NaN that only the last rank sees is refused on this rank."""
    x = torch.ones(4)
    if rank == WORLD_SIZE - 1:
        x[2] = torch.nan
    try:
        tq.BatchMinMax().observe_batch(x)
    except NonFiniteError:
        return True
    return False


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD_SIZE)
    try:
        result = {"calibrated": calibrated(rank), "trained": trained(rank), "fitted": fitted(rank)}
        result |= {"refused": refused(rank), "searched": searched(rank), "pinned": pinned(rank)}
        result |= {"rounded": rounded(rank), "learned": learned(rank), "transformed": transformed(rank)}
        result |= {"uneven": uneven(rank), "said": said(rank)}
        torch.save(result, f"{folder}/rank{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    return results_of_ranks(work, folder, WORLD_SIZE)


@pytest.fixture(scope="module")
def fitted_alone() -> dict[str, Tensor]:
    return fitted(None)


def test_calibrated_ranges_equal_one_process_exactly(ranks: list[dict[str, Any]]) -> None:
    alone = calibrated(None)
    assert any(name.endswith("range_max") and value.numel() == 4 for name, value in alone.items())
    for rank in ranks:
        torch.testing.assert_close(rank["calibrated"], alone, rtol=0, atol=0)


def test_training_equals_one_process(ranks: list[dict[str, Any]]) -> None:
    for step, alone in enumerate(trained(None)):
        for rank in ranks:
            torch.testing.assert_close(rank["trained"][step], alone, rtol=1e-9, atol=1e-12)


def test_training_moves_the_weights() -> None:
    first, *_, last = trained(None)
    assert not torch.allclose(first["0.weight"], last["0.weight"], atol=1e-3)


def test_ranks_agree_bit_for_bit(ranks: list[dict[str, Any]]) -> None:
    first, second = ranks
    torch.testing.assert_close(first["trained"], second["trained"], rtol=0, atol=0)
    torch.testing.assert_close(first["fitted"], second["fitted"], rtol=0, atol=0)


@pytest.mark.parametrize("name", [*AGREEING_SCHEMES, *AGREEING_OBSERVERS])
def test_numbers_are_those_of_the_joined_batch(
    name: str, ranks: list[dict[str, Any]], fitted_alone: dict[str, Tensor]
) -> None:
    alone = {key: value for key, value in fitted_alone.items() if key.startswith(f"{name}.")}
    assert alone
    for key, value in alone.items():
        torch.testing.assert_close(ranks[1]["fitted"][key], value, rtol=1e-6, atol=1e-9, msg=key)


def test_esb_scale_equals_one_process(ranks: list[dict[str, Any]], fitted_alone: dict[str, Tensor]) -> None:
    for name in ("esb.alpha", "esb_channel.alpha"):
        torch.testing.assert_close(ranks[0]["fitted"][name], fitted_alone[name], rtol=1e-6, atol=0)


def test_ternary_numbers_equal_one_process(ranks: list[dict[str, Any]], fitted_alone: dict[str, Tensor]) -> None:
    for name in ("twn.threshold", "twn.alpha", "exact.threshold", "exact.alpha"):
        torch.testing.assert_close(ranks[0]["fitted"][name], fitted_alone[name], rtol=1e-6, atol=0)


def test_a_search_has_the_same_logits_and_widths_on_all_ranks(ranks: list[dict[str, Any]]) -> None:
    torch.testing.assert_close(ranks[0]["searched"], ranks[1]["searched"], rtol=0, atol=0)
    assert all(float(t.abs().max()) > 0 for name, t in ranks[0]["searched"].items() if name.startswith("theta"))


def test_pins_hold_on_all_ranks(ranks: list[dict[str, Any]]) -> None:
    alone = pinned(None)
    for found in (rank["pinned"] for rank in ranks):
        torch.testing.assert_close(found, alone, rtol=1e-9, atol=1e-12)
        held = [key for key in found if "weight_quantizer" in key and not key.startswith("before.")]
        assert {"0.weight_quantizer.observer.range_min", "1.weight_quantizer.step"} < set(held)
        assert "3.weight_quantizer.block_scales" in held
        assert all(torch.equal(found[key], found[f"before.{key}"]) for key in held)
        assert not torch.equal(found["1.weight"], found["before.1.weight"])


def test_nan_on_one_rank_is_refused_on_all(ranks: list[dict[str, Any]]) -> None:
    assert [rank["refused"] for rank in ranks] == [True, True]


def test_weights_are_rounded_by_the_inputs_of_all_ranks(ranks: list[dict[str, Any]]) -> None:
    alone = rounded(None)
    for rank in ranks:
        torch.testing.assert_close(rank["rounded"], alone, rtol=0, atol=1e-9)
        torch.testing.assert_close(rank["rounded"], ranks[0]["rounded"], rtol=0, atol=0)


@pytest.mark.parametrize(("what", "tolerance"), [("learned", 1e-5), ("transformed", 1e-9), ("uneven", 1e-5)])
def test_post_training_on_ranks_equals_one_process(what: str, tolerance: float, ranks: list[dict[str, Any]]) -> None:
    alone = {"learned": learned, "transformed": transformed, "uneven": uneven}[what](None)
    torch.testing.assert_close(ranks[0][what], ranks[1][what], rtol=0, atol=0)
    drawn = {key for key in alone if key.startswith("qdrop")}  # by each rank for its own part
    found, alone = ({k: v for k, v in each.items() if k not in drawn} for each in (ranks[0][what], alone))
    torch.testing.assert_close(found, alone, rtol=tolerance, atol=tolerance)


def test_no_rank_waits_for_one_that_has_less_or_fails(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["said"] for rank in ranks)
    assert first[0] == second[0]
    assert first[0].startswith("1 of 2 ranks have fewer batches than the others")
    assert (
        first[1:]
        == ["another rank of the process group has failed, and says why; this one cannot go on without it"] * 3
    )
    assert "a batch gives it rows of 27 inputs, and its weight has 18" in second[1]
    assert all("to have 2 channels, but got 3" in message for message in second[2:])
