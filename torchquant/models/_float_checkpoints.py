"""Checkpoints of the float model, loaded into and written by the model that was made from it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

KeyPair = tuple[str, str]  # (key in the float model, key in the quantized model) of one tensor


def shared_keys(net: nn.Module, quantized: nn.Module) -> list[KeyPair]:
    """The keys under which both models hold the same tensor object, in the order of `net`."""
    theirs = quantized.state_dict(keep_vars=True)
    keys: dict[int, list[str]] = {}
    for key, value in theirs.items():
        keys.setdefault(id(value), []).append(key)
    ours = net.state_dict(keep_vars=True)
    return [(float_key, key) for float_key, value in ours.items() for key in keys.get(id(value), [])]


class FloatCheckpoints(nn.Module):
    """A module made from the layers of a float `net`, that also speaks the checkpoints of `net`.

    Fill `float_keys` with `shared_keys(net, self)` once the layers are in place; then

    * `self.load_state_dict(net.state_dict())` takes weights and batch norm statistics; quantizers and
      states stay as they are. Under a prefix too, such as the "module." of DistributedDataParallel;
    * `net.load_state_dict(self.float_state_dict())` goes back.

    A checkpoint of the quantized model loads as usual. What is neither is left to `load_state_dict`,
    which reports missing and unexpected keys.
    """

    float_keys: list[KeyPair]

    def __init__(self) -> None:
        super().__init__()
        self.float_keys = []

    def float_state_dict(self) -> dict[str, Tensor]:
        """Weights and buffers under the keys of the float model; tensors share memory with this one."""
        state = self.state_dict()
        return {float_key: state[key] for float_key, key in self.float_keys}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self._translate(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _translate(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Turn a float checkpoint, in place, into one of this module."""
        pairs = [(prefix + float_key, prefix + key) for float_key, key in self.float_keys]
        own = self.state_dict(prefix=prefix)
        float_keys = {float_key for float_key, _ in pairs}
        if not state_dict.keys() & (float_keys - own.keys()) or state_dict.keys() & (own.keys() - float_keys):
            return
        translated = {key: state_dict[float_key] for float_key, key in pairs if float_key in state_dict}
        for key in state_dict.keys() & float_keys:
            del state_dict[key]
        shared = {key for _, key in pairs}
        state_dict.update({key: value for key, value in own.items() if key not in shared})
        state_dict.update(translated)
