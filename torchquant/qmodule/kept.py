"""What a forward keeps for its backward in lean training: codes, and what computes a tensor again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from torchquant.errors import NoCodesError
from torchquant.quantizers_functional._bits import is_channels_last, masked, pack_mask
from torchquant.quantizers_functional._formula import Altered, Formula
from torchquant.quantizers_functional._gradient import Clamp, Gradient, Projected, cast_back, compute_dtype, owned
from torchquant.quantizers_functional.formats import Format, OwnLevels, UniformGrid
from torchquant.quantizers_functional.gradients import ClippedSTE

Hooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]
MOST_CODES = 256
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
WORDS = {1: torch.int64, 2: torch.int32, 4: torch.int16}
"""Bits of a code -> the integer that holds as many bytes as codes go into one byte."""


class Layout(NamedTuple):
    """Where a tensor lies in its storage."""

    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    @staticmethod
    def of(x: Tensor) -> Layout:
        return Layout(x.size(), x.stride(), int(x.storage_offset()))

    def view(self, x: Tensor) -> Tensor:
        """Return the tensor that lies so in the storage of x."""
        return x if Layout.of(x) == self else x.as_strided(self.size, self.stride, self.offset)

    @property
    def is_dense(self) -> bool:
        """Whether its elements fill a piece of memory without gaps, each once."""
        expected = 1
        for stride, size in sorted((t, s) for t, s in zip(self.stride, self.size, strict=True) if s != 1):
            if stride != expected:
                return False
            expected *= size
        return True


class Recipe:
    """How a tensor is made again, outside of autograd."""

    def kept(self, value: Tensor) -> Sequence[Tensor]:
        """Return the tensors to keep in place of `value`, the tensor itself; the same ones every time."""
        raise NotImplementedError

    def levels(self) -> Format | None:
        """Return the format of the whole tensor, on whose levels all elements lie; None if there is no such one."""
        return None

    def make(self, kept: Sequence[Tensor]) -> Tensor:
        """Make the tensor again, equal bit for bit and in its layout, but perhaps at another place in its storage."""
        raise NotImplementedError


class FromCodes(Recipe):
    """Levels are kept as codes: one byte each, or less where there are few codes.

    A NaN has no code. If there is one, what is made again is NaN everywhere, so that backward hides nothing.
    """

    def __init__(self, format: Format, value: Tensor, x: Tensor, clamp: Clamp | None) -> None:
        self.format = _lasting(format)
        self.numbers = self.format.numbers()
        self.dtype, self.layout = value.dtype, Layout.of(value)
        low, high = format.code_range
        self.bits = next(bits for bits in (1, 2, 4, 8) if high - low < 2**bits)
        self._kept: list[Tensor] = []
        if not _have_own_codes(format, value.dtype):
            real = x.detach() if clamp is None else x.detach().clamp(*clamp)
            self._keep((format.encode(real) - low).to(torch.uint8), value)

    def kept(self, value: Tensor) -> Sequence[Tensor]:
        if not self._kept:
            self._keep(self.format.to_bytes(value), value)
        return self._kept

    def levels(self) -> Format | None:
        return self.format if self.format.axis is None else None

    def _keep(self, codes: Tensor, value: Tensor) -> None:
        zero_or_nan = value.detach().amax() * 0.0
        self._kept = [packed(_in_memory_order(codes, self.layout), self.bits), zero_or_nan, *self.numbers]

    def make(self, kept: Sequence[Tensor]) -> Tensor:
        codes, zero_or_nan, *numbers = kept
        shown = unpacked(codes, self.bits, self.layout.size.numel()).as_strided(self.layout.size, self.layout.stride)
        format = _with(self.format, self.numbers, numbers)
        if type(format) is UniformGrid:
            return format.with_scale(format.scale + zero_or_nan).from_bytes(shown, self.dtype)
        return format.from_bytes(shown, self.dtype).add_(zero_or_nan)


class FromParameter(Recipe):
    """The projection of a parameter, which is there in backward too, is computed again."""

    def __init__(self, format: Format, parameter: Tensor) -> None:
        self.format = _lasting(format)
        self.numbers = self.format.numbers()
        self._kept = [parameter.detach(), *self.numbers]

    def kept(self, value: Tensor) -> Sequence[Tensor]:
        return self._kept

    def make(self, kept: Sequence[Tensor]) -> Tensor:
        parameter, *numbers = kept
        format = _with(self.format, self.numbers, numbers)
        return cast_back(_projected(format, parameter, False)[0], parameter.dtype)


@dataclass(frozen=True)
class _ClippedAgain(Gradient):
    """The clipped straight-through gradient of a parameter; backward projects again to see what was clipped."""

    name = "clipped"
    format: Format

    def attach(self, projected: Projected) -> Tensor:
        if not projected.x.requires_grad:
            return super().attach(projected)
        value, format = owned(projected.value, projected.x), _lasting(self.format)
        return cast(Tensor, _MaskedAgain.apply(projected.x, value, format, *format.numbers()))


class _MaskedAgain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, format: Format, *numbers: Tensor) -> Tensor:
        ctx.save_for_backward(x, *numbers)
        ctx.format = format
        ctx.mark_dirty(value)
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x, *numbers), (grad,) = ctx.saved_tensors, grads
        with torch.no_grad():
            inside = _projected(_with(ctx.format, ctx.format.numbers(), numbers), x.detach(), True)[1]
            assert inside is not None
            bits = inside if inside.dtype == torch.uint8 else pack_mask(inside)
        return masked(grad, bits, is_channels_last(x)), None, None, *(None for _ in numbers)


def _lasting(format: Format) -> Format:
    """Return the format, with copies of its numbers if these may be changed in place, as statistics are."""
    numbers = format.numbers()
    if not any(number.requires_grad or number._version for number in numbers):
        return format
    return format.with_numbers([number.detach().clone() for number in numbers])


def _with(format: Format, numbers: Sequence[Tensor], others: Sequence[Tensor]) -> Format:
    """Return the format with other tensors in place of `numbers`, which are its own: itself if they are the same."""
    is_same = all(other is number for other, number in zip(others, numbers, strict=True))
    return format if is_same else format.with_numbers(others)


def _projected(format: Format, x: Tensor, want_inside: bool) -> tuple[Tensor, Tensor | None]:
    """Project x on a format, by a kernel where there is one. The mask is packed or not, see `Format.fused`."""
    real = x.to(compute_dtype(x))
    done = format.fused(real, want_inside, None, False)
    return format.project(real, want_inside) if done is None else done


class FromInputs(Recipe):
    """A result is computed again from its inputs, each a tensor that is kept or made again itself; None is none."""

    def __init__(self, compute: Callable[..., Tensor], inputs: Sequence[Known | None], device: str) -> None:
        self.compute = compute
        self.autocast = _autocast_of(device)
        self.kept_of = [() if one is None else one.kept() for one in inputs]
        self.remade = [None if one is None else (one.recipe, one.layout) for one in inputs]

    def kept(self, value: Tensor) -> Sequence[Tensor]:
        return [tensor for kept in self.kept_of for tensor in kept]

    def make(self, kept: Sequence[Tensor]) -> Tensor:
        held, given = iter(kept), []
        for one, own in zip(self.remade, self.kept_of, strict=True):
            given.append(None if one is None else _made(*one, list(islice(held, len(own)))))
        with torch.no_grad(), self.autocast():
            return self.compute(*given)


class Known(NamedTuple):
    """A tensor, and how it is made again, None if it is kept itself; `layout` is within what the recipe makes."""

    value: Tensor
    recipe: Recipe | None
    layout: Layout

    def kept(self) -> Sequence[Tensor]:
        """Return the tensors to keep."""
        return [self.value] if self.recipe is None else self.recipe.kept(self.value)


def _made(recipe: Recipe | None, layout: Layout, kept: Sequence[Tensor]) -> Tensor:
    """Return the tensor of a `Known`, from what was kept."""
    return kept[0] if recipe is None else layout.view(recipe.make(kept))


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
        return _made(self.recipe, self.layout, held)


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
        if value.numel() < FEWEST_ELEMENTS or not _is_whole(format):
            return
        if clamp is None and _is_parameter(x):
            self._note(value, FromParameter(format, x))
        elif _has_codes(format) and Layout.of(value).is_dense:
            self._note(value, FromCodes(format, value, x, clamp))
            if format.axis is None and value.grad_fn is not None:
                self._formats[value.grad_fn] = format

    def note_input(self, x: Tensor) -> None:
        """Note the input of a layer if only its elements were chosen and moved since it was quantized."""
        if x.grad_fn is None or self.knows(x):
            return
        node: Any = x.grad_fn
        while node is not None and node not in self._formats and node.name() in KEEPS_LEVELS:
            node = node.next_functions[0][0]
        format = self._formats.get(node)
        if format is not None and _have_own_codes(format, x.dtype):
            self.note_quantized(x, format, x)

    def note_zeros_and(self, x: Tensor, result: Tensor) -> None:
        noted = self._find(x)
        format = None if noted is None else noted.recipe.levels()
        if format is not None and _have_own_codes(format, result.dtype):
            self.note_quantized(result, format, result)

    def gradient_of(self, gradient: Gradient, format: Format, x: Tensor, clamp: Clamp | None) -> Gradient:
        if clamp is not None or type(gradient) is not ClippedSTE or x.numel() < FEWEST_ELEMENTS:
            return gradient
        return _ClippedAgain(format) if _is_parameter(x) and _is_whole(format) and self._is_on_top() else gradient

    def note_computed(self, value: Tensor, compute: Callable[..., Tensor], *inputs: Tensor | None) -> None:
        if self.recomputes and value.numel() >= FEWEST_ELEMENTS and inputs[0] is not None and self.knows(inputs[0]):
            known = [None if one is None else self._known(one.detach(), self._find(one)) for one in inputs]
            self._note(value, FromInputs(compute, known, value.device.type))

    def knows(self, x: Tensor) -> bool:
        """Whether x is a noted tensor, or a view of one, that has not been changed."""
        return self._find(x) is not None

    def misses(self, x: Tensor) -> bool:
        return x.numel() >= FEWEST_ELEMENTS and self._find(x) is None

    def _note(self, value: Tensor, recipe: Recipe) -> None:
        storage = value.untyped_storage()
        self._noted[storage._cdata] = _Noted(
            StorageWeakRef(storage), value._version, value.dtype, Layout.of(value), recipe
        )

    def _find(self, x: Tensor) -> _Noted | None:
        noted = self._noted.get(x.untyped_storage()._cdata)
        if noted is None or noted.storage.expired() or (noted.version, noted.dtype) != (x._version, x.dtype):
            return None
        return noted

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

    def _is_on_top(self) -> bool:
        """Whether its hooks get what is saved now; a checkpoint of a part of the model has hooks of its own."""
        top = torch._C._autograd._top_saved_tensors_default_hooks(True)
        return top is not None and top[0] is self.pack


def unpack(kept: Kept | tuple[Tensor, int]) -> Tensor:
    """Return the tensor that was given to `LeanRecorder.pack`."""
    return _unchanged(*kept) if isinstance(kept, tuple) else kept.tensor()


def _is_whole(format: Format) -> bool:
    """Whether all numbers with which a format computes are in it; functions of a user may read others."""
    return bool(format.parameters) if isinstance(format, Formula) else not isinstance(format, Altered)


def _is_parameter(x: Tensor) -> bool:
    """Whether x is a parameter or a view of one."""
    return isinstance(x if x._base is None else x._base, nn.Parameter)


def _has_codes(format: Format) -> bool:
    try:
        low, high = format.code_range
    except NoCodesError:
        return False
    return high - low < MOST_CODES and not isinstance(format, OwnLevels)


def _have_own_codes(format: Format, dtype: torch.dtype) -> bool:
    """Whether each level, rounded to this type, is nearest to itself: float16 saturates, bfloat16 has 8 bits."""
    if not isinstance(format, UniformGrid) or format.offset is not None:
        return False
    low, high = format.code_range
    return dtype in (torch.float32, torch.float64) or (dtype == torch.bfloat16 and high - low < 128)


def _in_memory_order(codes: Tensor, layout: Layout) -> Tensor:
    """Return the codes as (n,), in the order in which the elements of the layout lie in memory."""
    if codes.stride() != layout.stride:
        codes = torch.empty_strided(layout.size, layout.stride, dtype=codes.dtype, device=codes.device).copy_(codes)
    return codes.as_strided((codes.numel(),), (1,))


def packed(codes: Tensor, bits: int) -> Tensor:
    """Pack codes of 1, 2, 4 or 8 bits without gaps. (n,) uint8 -> (ceil(n * bits / 8),) uint8.

    >>> packed(torch.tensor([1, 2, 3], dtype=torch.uint8), 4)
    tensor([33,  3], dtype=torch.uint8)
    """
    if bits == 8:
        return codes
    per_byte = 8 // bits
    if len(codes) % per_byte:
        codes = F.pad(codes, (0, -len(codes) % per_byte))
    words = codes.view(WORDS[bits])
    gathered = words
    for i in range(1, per_byte):
        gathered = gathered | (words >> i * (8 - bits))
    return gathered.to(torch.uint8)


def unpacked(codes: Tensor, bits: int, numel: int) -> Tensor:
    """Unpack what `packed` made. (ceil(n * bits / 8),) uint8 -> (n,) uint8.

    >>> unpacked(torch.tensor([33, 3], dtype=torch.uint8), 4, 3)
    tensor([1, 2, 3], dtype=torch.uint8)
    """
    if bits == 8:
        return codes
    words = codes.to(WORDS[bits])
    spread = words
    for i in range(1, 8 // bits):
        spread = spread | (words << i * (8 - bits))
    mask = sum((2**bits - 1) << 8 * i for i in range(8 // bits))
    return (spread & mask).view(torch.uint8)[:numel]


def _autocast_of(device: str) -> Callable[[], AbstractContextManager[Any]]:
    """Return a function that makes the autocast in which this is called."""
    if not torch.is_autocast_enabled(device):
        return nullcontext
    dtype, caches = torch.get_autocast_dtype(device), torch.is_autocast_cache_enabled()
    return lambda: torch.autocast(device, dtype, cache_enabled=caches)
