"""Packed updates through Flower itself: its strategies, its client apps, and messages as they go over the wire."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchquant.errors import ConfigError

pytest.importorskip("flwr", reason="flwr pins typer and rich; it is installed in an environment of its own")

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict  # noqa: E402
from flwr.clientapp import ClientApp  # noqa: E402
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto  # noqa: E402
from flwr.serverapp.strategy import FedAdam, FedAvg  # noqa: E402

from torchquant.integrations.flower import LocalGrid, PackedStrategy, PackedUpdates  # noqa: E402

SPEC = "affine:4,symmetric=narrow/channel"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 64))


class Wire(LocalGrid):
    """Clients behind a wire, which may be down for some of them; counts the bytes of whole messages."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.down: set[int] = set()
        self.n_bytes: list[int] = []

    def get_node_ids(self) -> Iterable[int]:
        return [node for node in super().get_node_ids() if node not in self.down]

    def send_and_receive(self, messages: Iterable[Any], *, timeout: float | None = None) -> Iterable[Any]:
        return [self._wired(self._answer(self._wired(message))) for message in messages]

    def _wired(self, message: Any) -> Any:
        """Return the message with its content written and read, as between two machines."""
        if not message.has_error():
            proto = recorddict_to_proto(message.content)
            written = proto.SerializeToString()
            self.n_bytes.append(len(written))
            message.content = recorddict_from_proto(type(proto).FromString(written))
        return message


def app(spec: str | None = SPEC, seen: list[Any] | None = None, **options: Any) -> ClientApp:
    made = ClientApp(mods=[PackedUpdates(spec, **options)] if spec else [])

    @made.train()
    def learn(message: Message, context: Context) -> Message:
        state = message.content["arrays"].to_torch_state_dict()
        if seen is not None:
            seen.append((context.node_id, state))
        return reply(message, trained(state, context.node_id))

    @made.evaluate()
    def judge(message: Message, context: Context) -> Message:
        metrics = MetricRecord({"num-examples": 8, "n": len(message.content["arrays"])})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return made


def trained(state: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    model, generator = net(), torch.Generator().manual_seed(seed)
    model.load_state_dict(state)
    x = torch.randn(16, 256, generator=generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (model(x) - x[:, :64]).square().mean().backward()
    optimizer.step()
    return model.state_dict()


def reply(message: Message, state: dict[str, Tensor]) -> Message:
    content = {"arrays": ArrayRecord(state), "metrics": MetricRecord({"num-examples": 16})}
    return Message(RecordDict(content), reply_to=message)


def run(strategy: Any, grid: Any, rounds: int) -> dict[str, Tensor]:
    return strategy.start(grid, ArrayRecord(net().state_dict()), num_rounds=rounds).arrays.to_torch_state_dict()


def apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    start = net().state_dict()
    moved = sum(float((expected[k] - start[k]).square().sum()) for k in start if start[k].is_floating_point())
    return (sum(float((found[k] - expected[k]).square().sum()) for k in start) / moved) ** 0.5


@pytest.mark.parametrize("make", [FedAvg, FedAdam])
def test_every_strategy_sees_whole_arrays(make: Any) -> None:
    expected = run(make(), LocalGrid(app(None), 3), 4)
    found = run(PackedStrategy(make(), SPEC), Wire(app(), 3), 4)
    assert found.keys() == expected.keys()
    assert 0.0 < apart(found, expected) < (0.05 if make is FedAvg else 0.3)


@pytest.mark.parametrize(("spec", "ratio"), [("affine:8,symmetric=narrow/channel", 3.5), (SPEC, 7.0)])
def test_bytes_of_a_round(spec: str, ratio: float) -> None:
    n_bytes = {}
    for name, strategy, grid in (
        ("float", FedAvg(fraction_evaluate=0.0), Wire(app(None), 2)),
        ("packed", packed := PackedStrategy(FedAvg(fraction_evaluate=0.0), spec), Wire(app(spec), 2)),
    ):
        run(strategy, grid, 3)
        n_bytes[name] = sum(grid.n_bytes[-4:])  # two messages and two replies
    first, *others = packed.traffic
    assert [traffic.round for traffic in packed.traffic] == [1, 2, 3]
    assert first.down == first.down_unpacked
    assert all(traffic.ratio > ratio for traffic in others)
    assert n_bytes["float"] > ratio * n_bytes["packed"]


def test_clients_hold_what_the_server_believes() -> None:
    seen: list[Any] = []
    grid = Wire(app(seen=seen), 2)
    strategy = PackedStrategy(FedAvg(), SPEC)
    run(strategy, grid, 3)
    states = dict(seen[-2:])
    torch.testing.assert_close(states[2], states[3], rtol=0, atol=0)
    for context in grid.contexts.values():
        held = context.state["torchquant.held"].to_torch_state_dict()
        torch.testing.assert_close(dict(held), dict(strategy._held), rtol=0, atol=0)


def test_a_client_that_missed_rounds_gets_what_it_lacks() -> None:
    seen: list[Any] = []
    grid = Wire(app(seen=seen), 3)
    strategy = PackedStrategy(FedAvg(fraction_evaluate=0.0), SPEC)
    arrays = ArrayRecord(net().state_dict())
    for grid.down in [set(), {3}, {3}, set(), *[{4}] * 12, set()]:
        n_seen = len(seen)
        arrays = strategy.start(grid, arrays, num_rounds=1).arrays
        assert len(seen) == n_seen + 3 - len(grid.down)
        for _, state in seen[n_seen:]:
            torch.testing.assert_close(dict(state), dict(strategy._held), rtol=0, atol=0)
    whole = sum(x.numel() * x.element_size() for x in net().state_dict().values())
    assert sum(n > whole for n in grid.n_bytes) == 4  # each client once, and the one that missed twelve rounds
    assert sum(whole / 7 < n <= whole for n in grid.n_bytes) == 1  # three packets for the one that missed two


def test_a_client_that_lost_its_state_answers_with_an_error_and_gets_all() -> None:
    seen: list[Any] = []
    grid = Wire(app(seen=seen), 3, raises=False)
    strategy = PackedStrategy(FedAvg(fraction_evaluate=0.0), SPEC)
    arrays = ArrayRecord(net().state_dict())
    strategy.start(grid, arrays, num_rounds=1)
    grid.contexts[2].state = RecordDict()
    strategy.start(grid, arrays, num_rounds=1)
    assert sorted(node for node, _ in seen) == [2, 3, 3, 4, 4]
    strategy.start(grid, arrays, num_rounds=1)
    assert sorted(node for node, _ in seen[5:]) == [2, 3, 4]


def test_error_feedback_is_in_the_state_of_the_client() -> None:
    kept = {}
    for feedback in (True, False):
        grid = Wire(app("ternary", error_feedback=feedback), 2)
        run(PackedStrategy(FedAvg(), "ternary"), grid, 2)
        kept[feedback] = "torchquant.left-over" in grid.contexts[2].state
    assert kept == {True: True, False: False}


def test_both_sides_must_pack() -> None:
    arrays = ArrayRecord(net().state_dict())
    with pytest.raises(ConfigError, match="no packed arrays in 'arrays'; PackedUpdates needs a server with Packed"):
        FedAvg().start(LocalGrid(app(), 2), arrays, num_rounds=1)
    with pytest.raises(ConfigError, match=r"the server packs by 'affine:8.*', this client by 'affine:4.*use one spec"):
        PackedStrategy(FedAvg()).start(LocalGrid(app(), 2), arrays, num_rounds=1)
    with pytest.raises(ConfigError, match=r"client . sent arrays that are not packed.*mods=\[PackedUpdates\('affine:4"):
        PackedStrategy(FedAvg(), SPEC).start(LocalGrid(app(None), 2), arrays, num_rounds=1)
    with pytest.raises(ConfigError, match="such as FedAvg"):
        PackedStrategy("FedAvg")
