"""Checkpoints of the float model, loaded into and written by the model that was made from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from torchquant._arguments import checked
from torchquant._renamed import renamed_attribute, renamed_names
from torchquant.errors import ConfigError
from torchquant.qmodule.fused_part import current_keys, rename_moved_keys
from torchquant.qmodule.input_slots import InputSlots

KeyPair = tuple[str, str]  # (key in the float model, key in the quantized model) of one tensor


@checked
def link_float_state(model: nn.Module, float_state: Mapping[str, Tensor]) -> None:
    """Let `model` load checkpoints of the float model it was made from; `float_state_dict(model)` writes them.

    `float_state`: `net.state_dict(keep_vars=True)` of the float model, whose tensors `model` holds under
    other keys. Raises ConfigError if one is missing.
    """
    own: dict[int, list[str]] = {}
    for key, value in model.state_dict(keep_vars=True).items():
        own.setdefault(id(value), []).append(key)
    pairs = [(float_key, key) for float_key, value in float_state.items() for key in own.get(id(value), [])]
    lost = float_state.keys() - {float_key for float_key, _ in pairs}
    if lost:
        raise ConfigError(
            f"{type(model).__name__} was built without {', '.join(sorted(lost))} of the float model; use its modules "
            "(the same objects, not copies), or delete them from the float model first"
        )
    if not hasattr(model, "float_keys"):
        model.register_load_state_dict_pre_hook(_translate)
    model.float_keys = pairs  # type: ignore[assignment]


def unlink_float_state(model: nn.Module) -> None:
    """Undo `link_float_state`."""
    for key, hook in list(model._load_state_dict_pre_hooks.items()):
        if getattr(hook, "hook", hook) is _translate:
            del model._load_state_dict_pre_hooks[key]
    if hasattr(model, "float_keys"):
        del model.float_keys


@checked
def float_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return weights and buffers under the keys of the float model; the tensors share memory with the model's.

    A weight behind a transform, or beside a low-rank product, is returned as it would be without them: a new tensor.
    Raises ConfigError for a model that was not made from a float one.
    """
    if not hasattr(model, "float_keys"):
        raise ConfigError(f"{type(model).__name__} was not made from a float model; use its state_dict instead")
    state = model.state_dict()
    state |= {key: wrapper.float_weight_of(state[key]) for key, wrapper in _transformed(model).items()}
    return {float_key: state[key] for float_key, key in float_keys(model)}


def _transformed(model: nn.Module) -> dict[str, InputSlots]:
    """Map the keys of the weights that belong to transforms or low-rank products to their wrappers."""
    own = {id(m.weight_slots()[0].weight): m for m in model.modules() if isinstance(m, InputSlots) and m.has_slots}
    state = model.state_dict(keep_vars=True) if own else {}
    return {key: own[id(value)] for key, value in state.items() if id(value) in own}


def float_keys(model: nn.Module) -> list[KeyPair]:
    """Return (key in the float model, key in this one) for every tensor that both hold."""
    pairs: list[KeyPair] = model.float_keys  # type: ignore[assignment]
    current = current_keys(model, (key for _, key in pairs))  # a model that was pickled by 0.1 has older keys
    return [(float_key, current.get(key, key)) for float_key, key in pairs]


def _translate(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Turn a float checkpoint, or one of version 0.1, in place, into one of the model."""
    rename_moved_keys(model, state_dict, prefix)
    pairs = [(prefix + float_key, prefix + key) for float_key, key in float_keys(model)]
    own = model.state_dict(prefix=prefix)
    theirs = {float_key for float_key, _ in pairs}
    if not state_dict.keys() & theirs or state_dict.keys() & (own.keys() - theirs):
        return
    translated = {key: state_dict[float_key] for float_key, key in pairs if float_key in state_dict}
    for key in state_dict.keys() & theirs:
        del state_dict[key]
    shared = {key for _, key in pairs}
    state_dict.update({key: value for key, value in own.items() if key not in shared})
    for key, wrapper in _transformed(model).items():
        if prefix + key in translated:
            translated[prefix + key] = wrapper.stored_weight_of(translated[prefix + key])
    state_dict.update(translated)


class FloatCheckpoints(nn.Module):
    """A module made from the layers of a float `net` that also loads and writes the checkpoints of `net`.

    Call `link_float_state(net)` once the layers are in place; then

    * `self.load_state_dict(net.state_dict())` loads weights and batch norm statistics and keeps quantizers and
      states. Keys may have a prefix, such as the "module." of DistributedDataParallel;
    * `net.load_state_dict(self.float_state_dict())` is the way back.

    A checkpoint of the quantized model loads as usual. Any other checkpoint is passed to `load_state_dict`
    unchanged, which reports missing and unexpected keys.

    >>> from torchquant.qmodule import QWrapper
    >>> class Quantizable(FloatCheckpoints):
    ...     def __init__(self, net):
    ...         super().__init__()
    ...         self.block = QWrapper([net[0], net[1]], None, None)
    ...         self.link_float_state(net)
    >>> net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    >>> model = Quantizable(net)
    >>> model.load_state_dict(net.state_dict())
    <All keys matched successfully>
    >>> list(model.float_state_dict()) == list(net.state_dict())
    True
    """

    def link_float_state(self, net: nn.Module) -> None:
        """Record under which keys `net` and this module hold the same tensors.

        Raises ConfigError if `net` has a tensor that this module lacks.
        """
        link_float_state(self, net.state_dict(keep_vars=True))

    share_keys = renamed_attribute("share_keys", "link_float_state")

    def float_state_dict(self) -> dict[str, Tensor]:
        """Return weights and buffers under the keys of the float model; tensors share memory with this module's."""
        return float_state_dict(self)


__getattr__ = renamed_names(__name__, {"speak_float": "link_float_state"})
