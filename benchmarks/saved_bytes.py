"""Bytes that a forward pass keeps alive for its backward pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


class _Kept:
    """One saved tensor. Lives exactly as long as the graph node that saved it."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()


def saved_bytes(forward: Callable[[], object], exclude: Iterable[Tensor] = ()) -> int:
    """Bytes of the distinct storages that `forward()`'s result holds for backward.

    Counts what autograd saves, `ctx.save_for_backward` of custom Functions included (a tensor put on
    `ctx` as an attribute is invisible to autograd and to this count). A storage saved twice counts once,
    and whole, also when only a view of it was saved. Storages of `exclude` do not count: pass
    parameters, buffers, and whatever the caller holds anyway.
    """
    kept: weakref.WeakSet[_Kept] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Kept:
        holder = _Kept(tensor)
        kept.add(holder)
        return holder

    def unpack(holder: _Kept) -> Tensor:
        return holder.tensor

    with saved_tensors_hooks(pack, unpack):
        result = forward()
    ignored = {tensor.untyped_storage().data_ptr() for tensor in exclude}
    storages = {s.data_ptr(): s.nbytes() for s in (holder.tensor.untyped_storage() for holder in kept)}
    del result  # held until here: without it the graph, and what it saved, would be gone
    return sum(size for pointer, size in storages.items() if pointer not in ignored)


def state_tensors(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers: there with or without a backward pass."""
    return [*model.parameters(), *model.buffers()]
