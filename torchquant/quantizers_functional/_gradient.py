"""How a gradient passes through a quantizer: the part that all formats share.

A format is a *projection*: `project(x, want_inside, clamp) -> (value, inside)`, plain tensor maths without
autograd on x, or on `x.clamp(*clamp)`, where `inside` is 1 for elements the format did not clip and 0 for the others.
This file attaches a gradient to it. The value is returned as computed, so it is on the grid bit for bit; the
popular `x + (q - x).detach()` is not (docs/decisions/0001).

Masks are built as floats and kept as bits, because operations on bool are not vectorised on a CPU:
docs/decisions/0002 has the measurements.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from torchquant._arguments import explained
from torchquant._registry import Registry
from torchquant._tensors import like
from torchquant.errors import ConfigError
from torchquant.kernels._bounds import Clamp as Clamp
from torchquant.quantizers_functional._bits import is_channels_last, masked, pack_mask, unpack_mask

Projection = Callable[[Tensor, bool, Clamp | None], tuple[Tensor, Tensor | None]]
Fused = Callable[[Tensor, bool, Clamp | None, bool], tuple[Tensor, Tensor | None] | None]
Ends = Callable[[], tuple[Tensor, Tensor]]


class _PassThrough(torch.autograd.Function):
    """Returns `value`; the gradient of x is the incoming one, times `mask` if given.

    The mask, packed already or not, is kept as one bit per element in the memory layout of x. `value` becomes the
    output, an ordinary tensor that may be written in place; see `owned`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        ctx.has_mask = mask is not None
        if mask is not None:
            is_packed = mask.dtype == torch.uint8
            ctx.save_for_backward(mask if is_packed else pack_mask(mask))
            ctx.channels_last = is_channels_last(value if is_packed else mask)
        ctx.mark_dirty(value)
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        if not ctx.has_mask:
            return grad, None, None
        (bits,) = ctx.saved_tensors
        return masked(grad, bits, ctx.channels_last), None, None


@dataclass(frozen=True)
class Projected:
    """A tensor and its projection, as a gradient estimator gets them.

    `x`: the real tensor, with its autograd history. `value`: its projection, without history. `inside`: 1 where
    the gradient may pass and 0 elsewhere, None for everywhere; the format's clipping is in it if the
    estimator `wants_inside`; for an estimator that `packs`, it may be packed. `training`: whether the quantizer is in
    train mode. `ends()`: lowest and highest level, () or broadcastable against x. `step()`: distance of the levels, for
    uniform formats.
    """

    x: Tensor
    value: Tensor
    inside: Tensor | None = None
    training: bool = True
    ends: Ends | None = None
    step: Callable[[], Tensor] | None = None


class Gradient:
    """A gradient estimator: how the gradient of a quantizer's output reaches its input.

    `attach(projected)` returns `projected.value` with a gradient for `projected.x`; an estimator that
    `softens` returns something between the two while it trains. A new estimator is a frozen dataclass
    registered with `@GRADIENTS.register("name")`; its fields are its options, and every format with the traits
    that it `needs` accepts it. The built-in estimators are in gradients.py.
    """

    name: ClassVar[str]
    wants_inside: ClassVar[bool] = False
    softens: ClassVar[bool] = False
    packs: ClassVar[bool] = False
    """True for an estimator that only passes the mask on: it takes masks packed to one bit an element."""
    needs: ClassVar[frozenset[str]] = frozenset()
    """Traits that a format must have: "sign" (one bit, its values are signs), "step" (uniform)."""

    def attach(self, projected: Projected) -> Tensor:
        return pass_through(projected.x, projected.value, projected.inside)

    def __repr__(self) -> str:
        options = ", ".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))  # type: ignore[arg-type]
        return repr(self.name + (f"({options})" if options else ""))


GRADIENTS: Registry[type[Gradient]] = Registry("gradient")


def owned(value: Tensor, x: Tensor) -> Tensor:
    """Return `value` as a tensor that nothing else refers to, for a gradient to x: a copy if it is a view or x itself.

    A Function returns such a tensor as one that it has changed (`mark_dirty`), which costs nothing. Returning a view
    of it would forbid writing to the output in place; writing to a view of x would change x.
    """
    if torch.compiler.is_compiling():
        return value.clone()  # fused with the computation of value
    is_shared = value._is_view() or value.untyped_storage()._cdata == x.untyped_storage()._cdata
    return value.clone() if is_shared else value


def is_traced() -> bool:
    """Whether `torch.jit.trace` is tracing."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined]


def pass_through(x: Tensor, value: Tensor, inside: Tensor | None = None) -> Tensor:
    """Return `value`; the gradient of x is the incoming one, only where `inside` is 1 if it is given.

    `inside`: 0 and 1 in a float type, or packed as `pack_mask` does in the memory order of x.
    """
    if not _wants_gradient(x):  # compiled code cannot call a Function that no gradient asks for
        return owned(value, x)
    return cast(Tensor, _PassThrough.apply(x, owned(value, x), inside))


def _wants_gradient(x: Tensor) -> bool:
    """Whether to attach a gradient for x. Not under `torch.jit.trace`, which traces the forward only: a graph with a
    Python function in it can be neither checked nor saved.
    """
    return torch.is_grad_enabled() and x.requires_grad and not is_traced()


def make_gradient(gradient: str | Gradient, **options: Any) -> Gradient:
    """Make the estimator of that name with its options; an instance is returned as is. Raises UnknownNameError."""
    if isinstance(gradient, Gradient):
        return gradient
    return GRADIENTS[gradient](**options)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the type in which the maths runs: float32 for half types, else the tensor's own."""
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def cast_back(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast grid values back to the tensor's type; values that would overflow float16 become the largest float16."""
    if dtype == torch.float16:
        largest = torch.finfo(dtype).max
        value = value.clamp(-largest, largest)
    return value.to(dtype)


def apply_projection(
    x: Tensor,
    project: Projection,
    gradient: str | Gradient = "ste",
    clamp: Clamp | None = None,
    training: bool = True,
    ends: Ends | None = None,
    step: Callable[[], Tensor] | None = None,
    fused: Fused | None = None,
) -> Tensor:
    """Project `clamp(x)` on a grid and attach a gradient for x.

    `gradient`: one of `GRADIENTS`, by name or made. `clamp=(low, high)` quantizes
    `torch.clamp(x, low, high)` in the same pass; the gradient is then that of the clamp followed by the
    quantizer, strict at both ends as in `torch.relu` and `torch.nn.functional.hardtanh`. Half types are
    computed in float32 and cast back. `training`, `ends` and `step` are passed to the estimator, see `Projected`.
    `fused`: the projection by a kernel where there is one, see `Format.fused`.
    """
    gradient = make_gradient(gradient)
    if not x.is_floating_point():
        raise ConfigError(f"only floating point tensors can be quantized, got {x.dtype}")
    needs_grad = _wants_gradient(x)
    if clamp is not None and needs_grad and gradient.softens:
        x = x.clamp(*clamp)
    with torch.no_grad():
        working = compute_dtype(x)
        real = x.detach() if x.dtype == working else x.detach().to(working)
        wants_inside = needs_grad and gradient.wants_inside
        strict = clamp if needs_grad and not gradient.softens else None
        done = None if fused is None else fused(real, wants_inside, clamp, strict is not None)
        value, mask = project(real, wants_inside, clamp) if done is None else done
        if x.dtype != working:
            value = cast_back(value, x.dtype)
        if not needs_grad:
            return value
        if strict is not None and done is None:
            mask = where_strictly_inside(real, strict, _unpacked(mask, real))
        elif not gradient.packs:
            mask = _unpacked(mask, real)
    if type(gradient).attach is Gradient.attach:
        return pass_through(x, value, mask)
    return gradient.attach(Projected(x, value, mask, training, ends, step))


def apply_at_once(
    x: Tensor,
    project: Callable[[Tensor, bool, bool], tuple[Tensor, Tensor | None] | None],
    gradient: Gradient,
    clamp: Clamp | None,
) -> Tensor | None:
    """Do what `apply_projection` does, by `project(x, is_strict, wants_inside)`; None where that returns None.

    `project` returns the projection of `x.clamp(*clamp)` and its packed mask, as `Format.fused` does; it does not
    return None after it has changed something. None too for an estimator that needs more than these.
    """
    if type(gradient).attach is not Gradient.attach or not gradient.packs:
        return None
    needs_grad = _wants_gradient(x)
    found = project(x.detach(), needs_grad and clamp is not None, needs_grad and gradient.wants_inside)
    if found is None or not needs_grad:
        return None if found is None else found[0]
    return pass_through(x, *found)


def _unpacked(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """Return the mask of x as 0 and 1 in x's type, if it is packed."""
    if mask is None or mask.dtype != torch.uint8:
        return mask
    return unpack_mask(mask, x.shape, x.dtype, is_channels_last(x))


def where_strictly_inside(x: Tensor, clamp: Clamp, inside: Tensor | None) -> Tensor:
    """Return `inside` (or 1) where low < x < high, else 0, by native selects that stay in floats."""
    low, high = clamp
    mask = torch.ones_like(x) if inside is None else inside
    if high is None:
        return torch.ops.aten.threshold_backward(mask, x, low)
    if low is None:
        return torch.ops.aten.threshold_backward(mask, -x, -high)
    return torch.ops.aten.hardtanh_backward(mask, x, low, high)


@explained
def gradient_clip(x: Tensor, range_min: Tensor | float, range_max: Tensor | float) -> Tensor:
    """Return x; in backward, stop the gradient where x is outside [range_min, range_max].

    x: (*). range_min, range_max: number, () or broadcastable to x, same unit as x.

    >>> x = torch.tensor([-2.0, 0.5, 3.0], requires_grad=True)
    >>> gradient_clip(x, -1.0, 1.0).sum().backward()
    >>> x.grad
    tensor([0., 1., 0.])
    """
    if not _wants_gradient(x):
        return x
    with torch.no_grad():
        low, high = like(range_min, x), like(range_max, x)
        inside = torch.minimum(torch.maximum(x, low), high).eq_(x)
    return pass_through(x, x.detach().clone(), inside)
