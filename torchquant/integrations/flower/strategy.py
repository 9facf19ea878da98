"""A strategy that lets another strategy of Flower exchange packed updates with its clients."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from torchquant._arguments import checked
from torchquant._shown import shown
from torchquant.errors import ConfigError, require
from torchquant.integrations.flower.records import DEFAULT, NAME, UPDATE, app, record_of, record_of_packets
from torchquant.integrations.updates import UpdateCodec

_strategies: Any = require("flwr.serverapp.strategy", "flower")

KEPT = 16
"""The number of packets that a server keeps for clients that were not asked in the last rounds."""


@dataclass(frozen=True)
class Traffic:
    """The bytes of the arrays of one round, to and from all clients, and those of the same arrays unpacked."""

    round: int
    down: int = 0
    up: int = 0
    down_unpacked: int = 0
    up_unpacked: int = 0

    @property
    def ratio(self) -> float:
        """How many times fewer bytes were sent."""
        return (self.down_unpacked + self.up_unpacked) / max(self.down + self.up, 1)


@checked
class PackedStrategy(_strategies.Strategy):  # type: ignore[misc]
    """Lets any strategy of Flower exchange packed updates with clients: `PackedStrategy(FedAvg(), "affine:4/channel")`.

    A client gets whole arrays once, and from then on what has changed since the last message that it answered, so that
    errors of rounding do not add up; one that has missed too much gets whole arrays again. The clients need the mod
    `PackedUpdates` with the same spec. The strategy inside sees whole arrays only. `traffic` has the bytes of each
    round.
    """

    def __init__(self, strategy: Any, spec: str = DEFAULT) -> None:
        if not isinstance(strategy, _strategies.Strategy):
            raise ConfigError(
                f"strategy must be one of flwr.serverapp.strategy, such as FedAvg(), got {shown(strategy)}"
            )
        self.strategy, self.codec = strategy, UpdateCodec(spec)
        self.key = getattr(strategy, "arrayrecord_key", "arrays")
        self.traffic: list[Traffic] = []
        self._held: dict[str, Tensor] = {}
        self._version = 0
        self._packets: deque[bytes] = deque(maxlen=KEPT)
        self._answered: dict[int, int] = {}

    def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Any) -> Any:
        """Pack the arrays of the messages of the strategy."""
        return self._sent(server_round, self.strategy.configure_train(server_round, arrays, config, grid), arrays)

    def configure_evaluate(self, server_round: int, arrays: Any, config: Any, grid: Any) -> Any:
        """Pack the arrays of the messages of the strategy."""
        return self._sent(server_round, self.strategy.configure_evaluate(server_round, arrays, config, grid), arrays)

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        """Unpack the arrays of the replies for the strategy."""
        return self.strategy.aggregate_train(server_round, self._received(server_round, replies))

    def aggregate_evaluate(self, server_round: int, replies: Any) -> Any:
        """Note which clients have answered."""
        return self.strategy.aggregate_evaluate(server_round, self._received(server_round, replies))

    def summary(self) -> None:
        """Log the settings of the strategy."""
        self.strategy.summary()

    def _sent(self, server_round: int, messages: Iterable[Any], arrays: Any) -> list[Any]:
        messages = list(messages)
        if messages:
            self._update(arrays.to_torch_state_dict())
        n_whole = size_of(self._held)
        for message in messages:
            packets = self._packets_for(message.metadata.dst_node_id)
            said = {"spec": self.codec.spec, "whole": packets is None, "to": self._version}
            said["from"] = self._version - len(packets or {})
            record = record_of(self._held) if packets is None else record_of_packets(packets)
            content = {**message.content, self.key: record, NAME: app.ConfigRecord(said)}
            message.content = app.RecordDict(content)
            n_bytes = n_whole if packets is None else sum(map(len, packets.values()))
            self._count(server_round, down=n_bytes, down_unpacked=n_whole)
        return messages

    def _update(self, new: Mapping[str, Tensor]) -> None:
        """Bring what clients hold up to date."""
        if not self._held:
            self._held = dict(new)
            return
        packet = self.codec.encode(new, self._held)
        self._held, self._version = packet.received, self._version + 1
        self._packets.append(packet.data)

    def _packets_for(self, node: int) -> dict[str, bytes] | None:
        """Return the packets that a client lacks, by version; None if whole arrays are less, or it has none."""
        n_missed = self._version - self._answered.get(node, -1)
        if node not in self._answered or n_missed > len(self._packets):
            return None
        first = self._version - len(self._packets) + 1
        numbered = {str(first + i): data for i, data in enumerate(self._packets) if first + i > self._answered[node]}
        return numbered if sum(map(len, numbered.values())) < size_of(self._held) else None

    def _received(self, server_round: int, replies: Iterable[Any]) -> list[Any]:
        replies = list(replies)
        for reply in replies:
            node = reply.metadata.src_node_id
            if reply.has_error():
                self._answered.pop(node, None)
                continue
            self._answered[node] = self._version
            if self.key in reply.content:
                packed = reply.content[self.key]
                if list(packed) != [UPDATE]:
                    raise ConfigError(
                        f"client {node} sent arrays that are not packed; give its app mods=[PackedUpdates("
                        f"{self.codec.spec!r})]"
                    )
                data = packed[UPDATE].data
                reply.content[self.key] = record_of(self.codec.decode(data, self._held))
                self._count(server_round, up=len(data), up_unpacked=size_of(self._held))
        return replies

    def _count(self, server_round: int, **n_bytes: int) -> None:
        if not self.traffic or self.traffic[-1].round != server_round:
            self.traffic.append(Traffic(server_round))
        last = self.traffic[-1]
        self.traffic[-1] = replace(last, **{name: getattr(last, name) + n for name, n in n_bytes.items()})


def size_of(tensors: Mapping[str, Tensor]) -> int:
    """Return the bytes of the tensors themselves."""
    return sum(x.numel() * x.element_size() for x in tensors.values())
