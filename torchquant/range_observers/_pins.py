"""Pins: numbers that stay fixed, whatever is observed, in memory and in checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial, wraps
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchquant._tensors import ordinary_zeros

HALF_TYPES = (torch.float16, torch.bfloat16)


OBSERVING = frozenset({"pre_observe", "post_observe", "observe_batch", "observe_clamped"})
"""The methods of quantizers and observers that observe tensors."""


def _unless_pinned(observe: Callable[..., None]) -> Callable[..., None]:
    """Make a method that does nothing while its module is pinned."""

    @wraps(observe)
    def observe_unless_pinned(self: Pinnable, *args: Any, **kwargs: Any) -> None:
        if self._buffers.get("pinned") is None:
            observe(self, *args, **kwargs)

    return observe_unless_pinned


class Pinnable(nn.Module):
    """A module that can be told to keep its numbers: observing then changes nothing, and no optimizer moves them.

    The methods named in `OBSERVING` do nothing while it is pinned, even those that a subclass overrides.
    The buffers in `kept` exist only while it is pinned, so that a `state_dict` without pins has the same keys as ever;
    loading a checkpoint with pins pins the module, and one without unpins it. `pinned` is the shape of the weight
    whose numbers are kept, as floats, since models are averaged over everything that they save.
    """

    kept: ClassVar[tuple[str, ...]] = ("pinned",)
    """Buffers that exist while the module is pinned."""
    _frozen: tuple[str, ...] = ()
    """Parameters that the pin has frozen."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in OBSERVING & cls.__dict__.keys():
            setattr(cls, name, _unless_pinned(cls.__dict__[name]))

    @property
    def is_pinned(self) -> bool:
        """Whether the numbers are kept fixed."""
        return self._buffers.get("pinned") is not None

    def is_open_as(self, kind: type[Pinnable], methods: frozenset[str]) -> bool:
        """Tell whether it is not pinned, and neither its class nor the instance overrides these methods of `kind`."""
        if self._buffers.get("pinned") is not None or not methods.isdisjoint(self.__dict__):
            return False
        own = type(self)
        return own is kind or [*map(partial(getattr, own), methods)] == [*map(partial(getattr, kind), methods)]

    def _hold(self, tensors: Mapping[str, Tensor]) -> None:
        """Pin the module, with these tensors for the buffers in `kept`."""
        if not self.is_pinned:
            self._frozen = tuple(name for name, parameter in self.named_parameters() if parameter.requires_grad)
        for name, tensor in tensors.items():
            self.register_buffer(name, ordinary_zeros(tensor.shape, tensor).copy_(tensor))
        for parameter in self.parameters():
            parameter.requires_grad_(False)

    def _release(self) -> None:
        """Unpin the module."""
        for name in self.kept:
            self._buffers.pop(name, None)
        for name in self._frozen:
            self.get_parameter(name).requires_grad_(True)
        self._frozen = ()

    def expect_pins(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """Pin the module if the saved state is pinned, else unpin it; the numbers themselves are loaded afterwards."""
        if prefix + "pinned" in state_dict:
            device = next((tensor.device for tensor in (*self.buffers(), *self.parameters())), None)
            saved = {name: state_dict.get(prefix + name, torch.zeros(0)) for name in self.kept}
            self._hold({name: torch.zeros_like(value, device=device) for name, value in saved.items()})
        elif self.is_pinned:
            self._release()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        if prefix + "pinned" in state_dict or self.is_pinned and self._was_saved(state_dict, prefix, local_metadata):
            self.expect_pins(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    @staticmethod
    def _was_saved(state_dict: Mapping[str, Any], prefix: str, local_metadata: Mapping[str, Any]) -> bool:
        """Whether the state is that of a model with this module: a float checkpoint says nothing about pins."""
        return bool(local_metadata) or any(key.startswith(prefix) for key in state_dict)

    def _wide_buffers(self) -> Iterable[str]:
        """Return the names of the buffers that are never narrower than float32."""
        return self.kept

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Follow device moves and `.double()`, but keep `_wide_buffers` at float32 under `.half()` and the like."""
        before = {name: self._buffers.get(name) for name in self._wide_buffers()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers.get(name)
            if old is not None and new is not None and new.dtype in HALF_TYPES:
                self._buffers[name] = old.to(device=new.device)
        return self
