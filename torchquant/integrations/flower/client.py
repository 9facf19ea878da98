"""A mod that lets a Flower client exchange packed updates."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torchquant._arguments import checked
from torchquant.errors import ConfigError
from torchquant.integrations.flower.records import DEFAULT, NAME, UPDATE, app, record_of, record_of_packets
from torchquant.integrations.updates import UpdateCodec

HELD, LEFT_OVER = f"{NAME}.held", f"{NAME}.left-over"


@checked
class PackedUpdates:
    """Packs what a Flower client sends and unpacks what it gets: `ClientApp(mods=[PackedUpdates("affine:4/channel")])`.

    The functions of the client see whole arrays, as without it. The server needs a `PackedStrategy` with the same spec.
    `error_feedback`: what an update loses by rounding is added to the client's next one. Both this and the arrays that
    the server knows the client to have are in the state of the client's context. `key`: the record of the arrays.
    Raises ConfigError for a message that no such server has sent.
    """

    def __init__(self, spec: str = DEFAULT, error_feedback: bool = True, key: str = "arrays") -> None:
        self.codec, self.error_feedback, self.key = UpdateCodec(spec), error_feedback, key

    def __call__(self, message: Any, context: Any, call_next: Any) -> Any:
        """Run the client on the arrays of the message, and return its reply with packed arrays."""
        held = self._held(message, context)
        rest = {name: record for name, record in message.content.items() if name not in (NAME, self.key)}
        message.content = app.RecordDict({**rest, self.key: record_of(held)})
        reply = call_next(message, context)
        if reply.has_error() or self.key not in reply.content:
            return reply
        left_over = context.state[LEFT_OVER].to_torch_state_dict() if LEFT_OVER in context.state else {}
        packet = self.codec.encode(reply.content[self.key].to_torch_state_dict(), held, left_over)
        if self.error_feedback:
            context.state[LEFT_OVER] = record_of(packet.left_over)
        reply.content[self.key] = record_of_packets({UPDATE: packet.data})
        return reply

    def _held(self, message: Any, context: Any) -> dict[str, Tensor]:
        """Return the arrays that the server has sent, those of the last message brought up to date; keep them."""
        if NAME not in message.content or self.key not in message.content:
            raise ConfigError(
                f"the message has no packed arrays in {self.key!r}; PackedUpdates needs a server with PackedStrategy"
            )
        said, sent = message.content[NAME], message.content[self.key]
        if said["spec"] != self.codec.spec:
            raise ConfigError(f"the server packs by {said['spec']!r}, this client by {self.codec.spec!r}; use one spec")
        if said["whole"]:
            held = sent.to_torch_state_dict()
        else:
            version = context.state[NAME]["version"] if NAME in context.state else None
            if version is None or version < said["from"]:
                raise ConfigError(
                    f"the server sends what has changed since its version {said['from']}, and this client has "
                    f"{'none' if version is None else version}; the server sends all arrays after this error"
                )
            held = context.state[HELD].to_torch_state_dict()
            for number in range(version + 1, said["to"] + 1):
                held = self.codec.decode(sent[str(number)].data, held)
        context.state[HELD] = record_of(held)
        context.state[NAME] = app.ConfigRecord({"version": said["to"]})
        return held
