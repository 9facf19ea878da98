"""Checkpoints of the float model, loaded into and written by the model that was made from it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from torchquant.errors import ConfigError

KeyPair = tuple[str, str]  # (key in the float model, key in the quantized model) of one tensor


class FloatCheckpoints(nn.Module):
    """A module made from the layers of a float `net`, that also speaks the checkpoints of `net`.

    Call `share_keys(net)` once the layers are in place; then

    * `self.load_state_dict(net.state_dict())` takes weights and batch norm statistics; quantizers and
      states stay as they are. Under a prefix too, such as the "module." of DistributedDataParallel;
    * `net.load_state_dict(self.float_state_dict())` goes back.

    A checkpoint of the quantized model loads as usual. What is neither is left to `load_state_dict`,
    which reports missing and unexpected keys.

    >>> from torchquant.qmodule import QWrapper
    >>> class Quantizable(FloatCheckpoints):
    ...     def __init__(self, net):
    ...         super().__init__()
    ...         self.block = QWrapper([net[0], net[1]], None, None)
    ...         self.share_keys(net)
    >>> net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    >>> model = Quantizable(net)
    >>> model.load_state_dict(net.state_dict())
    <All keys matched successfully>
    >>> list(model.float_state_dict()) == list(net.state_dict())
    True
    """

    float_keys: list[KeyPair]

    def __init__(self) -> None:
        super().__init__()
        self.float_keys = []

    def share_keys(self, net: nn.Module) -> None:
        """Note under which keys `net` and this module hold the same tensors.

        Raises ConfigError if `net` has one that this module has not.
        """
        theirs = net.state_dict(keep_vars=True)
        own: dict[int, list[str]] = {}
        for key, value in self.state_dict(keep_vars=True).items():
            own.setdefault(id(value), []).append(key)
        self.float_keys = [(float_key, key) for float_key, value in theirs.items() for key in own.get(id(value), [])]
        lost = theirs.keys() - {float_key for float_key, _ in self.float_keys}
        if lost:
            raise ConfigError(
                f"{type(self).__name__} was built without {', '.join(sorted(lost))} of {type(net).__name__}; use these "
                "modules in it (the same objects, not copies), or delete them from the float model first"
            )

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
