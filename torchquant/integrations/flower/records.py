"""Records of Flower's messages that hold whole arrays or packets, and the names that both sides use."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from torchquant.errors import require

app: Any = require("flwr.app", "flower")

NAME = "torchquant"
"""The record in a message that says what the arrays are, and in the state of a client what it holds."""
UPDATE = "update"
"""The name of the one packet of a reply."""
DEFAULT = "affine:8,symmetric=narrow/channel"


def record_of(tensors: Mapping[str, Tensor]) -> Any:
    """Make a record of whole arrays."""
    return app.ArrayRecord.from_torch_state_dict(OrderedDict(tensors))


def record_of_packets(packets: Mapping[str, bytes]) -> Any:
    """Make a record of packets."""
    arrays = {name: app.Array("uint8", (len(data),), NAME, data) for name, data in packets.items()}
    return app.ArrayRecord.from_array_dict(OrderedDict(arrays))
