"""Recipes by which lean training makes a tensor again in backward: from codes, a parameter, or inputs of a layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from torchquant.errors import NoCodesError
from torchquant.quantizers_functional._bits import is_channels_last, masked, pack_codes, pack_mask, unpack_codes
from torchquant.quantizers_functional._formula import Altered, Formula
from torchquant.quantizers_functional._gradient import Clamp, Gradient, Projected, cast_back, compute_dtype, owned
from torchquant.quantizers_functional.formats import Format, OwnLevels, UniformGrid

MOST_CODES = 256


class Layout(NamedTuple):
    """The size, the strides and the offset of a tensor in its storage."""

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
        """Return the tensors to keep in place of `value`, the tensor itself; the same ones until `forget`."""
        raise NotImplementedError

    def forget(self) -> None:  # noqa: B027 - a recipe may hold nothing that is large
        """Let go of the tensors to keep, after the forward; whoever keeps them gives them to `make`."""

    def levels(self) -> Format | None:
        """Return the format of the whole tensor, on whose levels all elements lie; None if there is no such one."""
        return None

    def is_lost(self) -> bool:
        """Whether the memory of a parameter that it needs was freed, as FSDP does after the forward of a part."""
        return False

    def make(self, kept: Sequence[Tensor]) -> Tensor:
        """Make the tensor again, equal bit for bit and in its layout, but perhaps at another place in its storage."""
        raise NotImplementedError


class FromCodes(Recipe):
    """Levels are kept as codes: one byte each, or less where there are few codes.

    A NaN has no code. If there is one, what is made again is NaN everywhere, so that backward hides nothing.
    """

    def __init__(self, format: Format, value: Tensor, layout: Layout, x: Tensor, clamp: Clamp | None) -> None:
        self.format = _lasting(format)
        self.dtype, self.layout = value.dtype, layout
        low, high = format.code_range
        self.bits = next(bits for bits in (1, 2, 4, 8) if high - low < 2**bits)
        self._kept: list[Tensor] = []
        if not have_own_codes(format, value.dtype):
            real = x.detach() if clamp is None else x.detach().clamp(*clamp)
            self._keep((format.encode(real) - low).to(torch.uint8), value.detach().amax() * 0.0)

    def kept(self, value: Tensor) -> Sequence[Tensor]:
        if not self._kept:
            self._keep(*self.format.to_bytes(value.detach()))
        return self._kept

    def forget(self) -> None:
        self._kept = []

    def levels(self) -> Format | None:
        return self.format if self.format.axis is None else None

    def _keep(self, codes: Tensor, zero_or_nan: Tensor) -> None:
        self._kept = [pack_codes(_in_memory_order(codes, self.layout), self.bits), zero_or_nan]
        self._kept += self.format.numbers()

    def make(self, kept: Sequence[Tensor]) -> Tensor:
        codes, zero_or_nan, *numbers = kept
        shown = unpack_codes(codes, self.bits, self.layout.size.numel()).as_strided(
            self.layout.size, self.layout.stride
        )
        format = _with(self.format, numbers)
        if type(format) is UniformGrid:
            return format.with_scale(format.scale + zero_or_nan).from_bytes(shown, self.dtype)
        return format.from_bytes(shown, self.dtype).add_(zero_or_nan)


class FromParameter(Recipe):
    """The projection of a parameter, which is there in backward too, is computed again."""

    def __init__(self, format: Format, parameter: Tensor) -> None:
        self.format = _lasting(format)
        self._kept = [parameter.detach(), *self.format.numbers()]

    def kept(self, value: Tensor) -> Sequence[Tensor]:
        return self._kept

    def is_lost(self) -> bool:
        return is_freed(self._kept[0])

    def make(self, kept: Sequence[Tensor]) -> Tensor:
        parameter, *numbers = kept
        format = _with(self.format, numbers)
        return cast_back(_projected(format, parameter, False)[0], parameter.dtype)


@dataclass(frozen=True)
class ClippedAgain(Gradient):
    """The clipped straight-through gradient of a parameter; backward projects again to see what was clipped.

    Where forward sees that nothing was, as in a weight that its range covers, backward has nothing to do.
    """

    name = "clipped"
    wants_inside = True
    packs = True
    format: Format

    def attach(self, projected: Projected) -> Tensor:
        if projected.inside is None or not projected.x.requires_grad:
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
            inside = _projected(_with(ctx.format, numbers), x.detach(), True)[1]
            if inside is None:
                return grad, None, None, *(None for _ in numbers)
            bits = inside if inside.dtype == torch.uint8 else pack_mask(inside)
        return masked(grad, bits, is_channels_last(x)), None, None, *(None for _ in numbers)


def _lasting(format: Format) -> Format:
    """Return the format, with copies of its numbers if these may be changed in place, as statistics are."""
    numbers = format.numbers()
    if not any(number.requires_grad or number._version for number in numbers):
        return format
    return format.with_numbers([number.detach().clone() for number in numbers])


def _with(format: Format, numbers: Sequence[Tensor]) -> Format:
    """Return the format with these numbers: the format itself if they are its own."""
    is_own = all(number is own for number, own in zip(numbers, format.numbers(), strict=True))
    return format if is_own else format.with_numbers(numbers)


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
        kept_of = [() if one is None else one.kept() for one in inputs]
        self.remade = [
            None if one is None else (one.recipe, one.layout, len(kept))
            for one, kept in zip(inputs, kept_of, strict=True)
        ]
        self._kept = [tensor for kept in kept_of for tensor in kept]

    def kept(self, value: Tensor) -> Sequence[Tensor]:
        return self._kept

    def forget(self) -> None:
        self._kept = []

    def is_lost(self) -> bool:
        return any(map(is_freed, self._kept))

    def make(self, kept: Sequence[Tensor]) -> Tensor:
        held, given = iter(kept), []
        for one in self.remade:
            given.append(None if one is None else made(one[0], one[1], list(islice(held, one[2]))))
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


def made(recipe: Recipe | None, layout: Layout, kept: Sequence[Tensor]) -> Tensor:
    """Return the tensor of a `Known`, from what was kept."""
    return kept[0] if recipe is None else layout.view(recipe.make(kept))


def is_whole(format: Format) -> bool:
    """Whether all numbers with which a format computes are in it; functions of a user may read others."""
    return bool(format.parameters) if isinstance(format, Formula) else not isinstance(format, Altered)


def is_parameter(x: Tensor) -> bool:
    """Whether x is a parameter or a view of one."""
    return isinstance(x if x._base is None else x._base, nn.Parameter)


def is_freed(x: Tensor) -> bool:
    """Whether x has elements and its memory has none."""
    return x.untyped_storage().nbytes() == 0 and x.numel() > 0


def has_codes(format: Format) -> bool:
    """Whether each level has a code of one byte."""
    try:
        low, high = format.code_range
    except NoCodesError:
        return False
    return high - low < MOST_CODES and not isinstance(format, OwnLevels)


def have_own_codes(format: Format, dtype: torch.dtype) -> bool:
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


def _autocast_of(device: str) -> Callable[[], AbstractContextManager[Any]]:
    """Return a function that makes the autocast in which this is called."""
    if not torch.is_autocast_enabled(device):
        return nullcontext
    dtype, caches = torch.get_autocast_dtype(device), torch.is_autocast_cache_enabled()
    return lambda: torch.autocast(device, dtype, cache_enabled=caches)
