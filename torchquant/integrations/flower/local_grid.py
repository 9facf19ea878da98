"""Flower's clients one after the other in this process: simulations without Ray."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torchquant._arguments import Count, checked
from torchquant.errors import one_line, require

_app: Any = require("flwr.app", "flower")
_serverapp: Any = require("flwr.serverapp", "flower")
_identity: Any = require("flwr.supercore.task_identity", "flower").TaskIdentity

SERVER = 1
"""The number of the server among the nodes; clients follow."""


@checked
class LocalGrid(_serverapp.Grid):  # type: ignore[misc]
    """Runs a ClientApp as `n_clients` clients in this process: `strategy.start(LocalGrid(app, 10), arrays)`.

    Each client has a context of its own, with its number as "partition-id" and their number as "num-partitions" in
    `node_config`; the state of the context lasts from round to round. A client that raises an exception answers with an
    error, which the strategy logs, unless `raises`.
    """

    def __init__(self, client_app: Any, n_clients: Count, raises: bool = True) -> None:
        self.client_app, self.raises = client_app, raises
        _identity.task_id, _identity.run_id, _identity.node_id = 1, 0, SERVER  # as where a server has a process
        self.contexts = {
            node: _app.Context(
                run_id=0,
                node_id=node,
                node_config={"partition-id": node - SERVER - 1, "num-partitions": n_clients},
                state=_app.RecordDict(),
                run_config={},
            )
            for node in range(SERVER + 1, SERVER + 1 + n_clients)
        }

    def get_node_ids(self) -> Iterable[int]:
        """Return the numbers of the clients."""
        return list(self.contexts)

    def send_and_receive(self, messages: Iterable[Any], *, timeout: float | None = None) -> Iterable[Any]:
        """Let each client answer its message. `timeout` is not needed."""
        return [self._answer(message) for message in messages]

    def _answer(self, message: Any) -> Any:
        try:
            return self.client_app(message, self.contexts[message.metadata.dst_node_id])
        except Exception as error:
            if self.raises:
                raise
            return _app.Message(_app.Error(code=0, reason=one_line(error)), reply_to=message)

    def set_run(self, run: Any) -> None:
        """Do nothing: there is one run."""

    @property
    def run(self) -> Any:
        """No run: the clients are in this process."""
        return None

    def create_message(
        self, content: Any, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Any:
        """Make a message to a client."""
        return _app.Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def push_messages(self, messages: Iterable[Any]) -> Iterable[str]:
        """Raise NotImplementedError: clients answer at once, in `send_and_receive`."""
        raise NotImplementedError("clients in this process answer at once; call send_and_receive")

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Any]:
        """Raise NotImplementedError: clients answer at once, in `send_and_receive`."""
        raise NotImplementedError("clients in this process answer at once; call send_and_receive")
