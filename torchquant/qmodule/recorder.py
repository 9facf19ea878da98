"""The recorder of a forward in lean training: what autograd keeps of the tensors that it knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from torchquant.qmodule.kept import (
    ClippedAgain,
    FromCodes,
    FromInputs,
    FromParameter,
    Known,
    Layout,
    Recipe,
    has_codes,
    have_own_codes,
    is_parameter,
    is_whole,
    made,
)
from torchquant.quantizers_functional._gradient import Clamp, Gradient
from torchquant.quantizers_functional.formats import Format
from torchquant.quantizers_functional.gradients import ClippedSTE

Hooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]
FEWEST_ELEMENTS = 8192
"""Smaller tensors are kept as they are: to describe them would take longer than it is worth."""
KEEPS_LEVELS = frozenset(
    f"{name}Backward0"
    for name in (
        *("MaxPool2DWithIndices", "MaxPool3DWithIndices", "View", "UnsafeView", "ReshapeAlias", "Permute", "Transpose"),
        *("T", "Clone", "Slice", "Select", "Squeeze", "Unsqueeze", "Narrow", "Split", "Relu", "Expand", "Alias"),
    )
)
"""Names of the nodes of operators that choose and move elements, or that put 0 in the place of some."""


class Kept:
    """One tensor as the graph keeps it.

    `hooks`: those that were there outside of the forward, such as `save_on_cpu`; they get the tensors that are kept.
    """

    __slots__ = ("held", "hooks", "layout", "recipe")

    def __init__(self, known: Known, hooks: Hooks | None) -> None:
        self.recipe, self.layout, self.hooks = known.recipe, known.layout, hooks
        self.held = [(one, one._version) if hooks is None else (hooks[0](one), 0) for one in known.kept()]

    def tensor(self) -> Tensor:
        """Return the tensor. Raises RuntimeError if what was kept has been changed in place since then."""
        held = [_unchanged(*one) if self.hooks is None else self.hooks[1](one[0]) for one in self.held]
        return made(self.recipe, self.layout, held)


def _unchanged(tensor: Tensor, version: int) -> Tensor:
    if tensor._version != version:
        raise RuntimeError(
            f"a tensor of shape {tuple(tensor.shape)} that backward needs has been modified by an inplace "
            f"operation: it is at version {tensor._version}, and was kept at version {version}. Call backward "
            "before the optimizer steps, and change a copy"
        )
    return tensor


class _Noted(NamedTuple):
    storage: StorageWeakRef
    version: int
    dtype: torch.dtype
    layout: Layout
    recipe: Recipe


class LeanRecorder:
    """The recorder of one forward: knows of each storage how its contents are made again.

    `recomputes`: whether results of layers are computed again in backward. A tensor that has been changed in place
    since it was noted is kept as it is.
    """

    def __init__(self, recomputes: bool) -> None:
        self.recomputes = recomputes
        self.hooks: Hooks | None = torch._C._autograd._top_saved_tensors_default_hooks(True)
        self.pack = self._pack
        """Returns what the graph keeps in place of a tensor."""
        self._noted: dict[int, _Noted] = {}
        self._formats: dict[Any, Format] = {}

    def note_quantized(self, value: Tensor, format: Format, x: Tensor, clamp: Clamp | None = None) -> None:
        if value.numel() < FEWEST_ELEMENTS or not is_whole(format):
            return
        layout = Layout.of(value)
        if clamp is None and is_parameter(x):
            self._note(value, layout, FromParameter(format, x))
        elif has_codes(format) and (value.is_contiguous() or layout.is_dense):
            recipe = FromCodes(format, value, layout, x, clamp)
            self._note(value, layout, recipe)
            levels = recipe.levels()
            if levels is not None and value.grad_fn is not None:
                self._formats[value.grad_fn] = levels

    def note_input(self, x: Tensor) -> None:
        """Note the input of a layer if only its elements were chosen and moved since it was quantized."""
        if x.grad_fn is None or self.knows(x):
            return
        node: Any = x.grad_fn
        while node is not None and node not in self._formats and node.name() in KEEPS_LEVELS:
            node = node.next_functions[0][0]
        format = self._formats.get(node)
        if format is not None and have_own_codes(format, x.dtype):
            self.note_quantized(x, format, x)

    def note_zeros_and(self, x: Tensor, result: Tensor) -> None:
        noted = self._find(x)
        format = None if noted is None else noted.recipe.levels()
        if format is not None and have_own_codes(format, result.dtype):
            self.note_quantized(result, format, result)

    def gradient_of(self, gradient: Gradient, format: Format, x: Tensor, clamp: Clamp | None) -> Gradient:
        is_other = self.may_change(gradient, x, clamp) and is_whole(format) and self._is_on_top()
        return ClippedAgain(format) if is_other else gradient

    def may_change(self, gradient: Gradient, x: Tensor, clamp: Clamp | None) -> bool:
        if clamp is not None or type(gradient) is not ClippedSTE or x.numel() < FEWEST_ELEMENTS:
            return False
        return is_parameter(x)

    def note_computed(self, value: Tensor, compute: Callable[..., Tensor], *inputs: Tensor | None) -> None:
        if self.recomputes and value.numel() >= FEWEST_ELEMENTS and inputs[0] is not None and self.knows(inputs[0]):
            known = [None if one is None else self._known(one.detach(), self._find(one)) for one in inputs]
            self._note(value, Layout.of(value), FromInputs(compute, known, value.device.type))

    def knows(self, x: Tensor) -> bool:
        """Whether x is a noted tensor, or a view of one, that has not been changed."""
        return self._find(x) is not None

    def misses(self, x: Tensor) -> bool:
        return x.numel() >= FEWEST_ELEMENTS and self._find(x) is None

    def _note(self, value: Tensor, layout: Layout, recipe: Recipe) -> None:
        storage = value.untyped_storage()
        former = self._noted.get(storage._cdata)
        if former is not None:
            former.recipe.forget()
        self._noted[storage._cdata] = _Noted(StorageWeakRef(storage), value._version, value.dtype, layout, recipe)

    def _find(self, x: Tensor) -> _Noted | None:
        noted = self._noted.get(x.untyped_storage()._cdata)
        if noted is None or noted.storage.expired() or (noted.version, noted.dtype) != (x._version, x.dtype):
            return None
        return None if noted.recipe.is_lost() else noted

    def _known(self, x: Tensor, noted: _Noted | None) -> Known:
        layout = Layout.of(x)
        if noted is None:
            return Known(x, None, layout)
        whole = noted.layout
        return Known(whole.view(x), noted.recipe, Layout(layout.size, layout.stride, layout.offset - whole.offset))

    def _pack(self, x: Tensor) -> Kept | tuple[Tensor, int]:
        noted = self._find(x)
        if noted is None and self.hooks is None:
            return x, x._version
        return Kept(self._known(x, noted), self.hooks)

    def finish(self) -> None:
        """End the forward: what is kept belongs to the graph, or to hooks from outside that may have moved it."""
        for noted in self._noted.values():
            noted.recipe.forget()

    def _is_on_top(self) -> bool:
        """Whether its hooks get what is saved now; a checkpoint of a part of the model has hooks of its own."""
        top = torch._C._autograd._top_saved_tensors_default_hooks(True)
        return top is not None and top[0] is self.pack


def unpack(kept: Kept | tuple[Tensor, int]) -> Tensor:
    """Return the tensor that was given to `LeanRecorder.pack`."""
    return _unchanged(*kept) if isinstance(kept, tuple) else kept.tensor()
