"""How a gradient passes a quantizer: the part every format shares.

A format is a *projection*: `project(x, want_inside) -> (value, inside)`, plain tensor maths without
autograd, where `inside` is 1 for elements the format did not clip and 0 for the others. This file
attaches a gradient to it. The value is returned as computed, so it is on the grid bit for bit; the
popular `x + (q - x).detach()` is not (docs/decisions/0001).

Masks are built as floats and kept as bits, because on a CPU what touches bool is not vectorised:
docs/decisions/0002 has the measurements.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from torchquant._registry import Registry
from torchquant.errors import ConfigError
from torchquant.quantizers_functional._bits import is_channels_last, pack_mask, unpack_mask

Clamp = tuple[float | None, float | None]
Projection = Callable[[Tensor, bool], tuple[Tensor, Tensor | None]]
Span = Callable[[], Tensor]


class _PassThrough(torch.autograd.Function):
    """Output `value`; the gradient of x is the incoming one, times `mask` where there is one.

    The mask has one bit an element, laid out in memory as x was.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        ctx.has_mask = mask is not None
        if mask is not None:
            ctx.save_for_backward(pack_mask(mask))
            ctx.channels_last = is_channels_last(mask)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        if not ctx.has_mask:
            return grad, None, None
        (bits,) = ctx.saved_tensors
        return unpack_mask(bits, grad.shape, grad.dtype, ctx.channels_last).mul_(grad), None, None


class _Scaled(torch.autograd.Function):
    """Output `value`; the gradient of x is the incoming one times `factor`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (factor,) = ctx.saved_tensors
        return factor.to(grads[0].dtype) * grads[0], None, None


class _Leaning(torch.autograd.Function):
    """Output `value`; the gradient of x is `g + |g| * lean` where `mask` is 1, else 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, lean: Tensor, mask: Tensor) -> Tensor:
        ctx.channels_last = is_channels_last(mask)
        ctx.save_for_backward(lean, pack_mask(mask))
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = grads
        lean, bits = ctx.saved_tensors
        leaned = torch.addcmul(grad, grad.abs(), lean.to(grad.dtype))
        return unpack_mask(bits, grad.shape, grad.dtype, ctx.channels_last).mul_(leaned), None, None, None


class Gradient:
    """How the gradient of a quantizer's output reaches its input; the forward stays the projection.

    `attach(x, value, inside, span)` returns `value` with a gradient for x. x: the real tensor. `inside`: 1 where
    the gradient may pass, None for everywhere; it has the format's clipping in it if `wants_inside`.
    `span`: calls for the distance of the outermost levels, () or broadcastable against x.

    A new one is a frozen dataclass entered with `@GRADIENTS.register("name")`; its fields are its options, and
    every format that has what it `needs` takes it.
    """

    name: ClassVar[str]
    wants_inside: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset()
    """Traits a format must have: "sign" (one bit, its values are signs)."""

    def attach(self, x: Tensor, value: Tensor, inside: Tensor | None, span: Span | None) -> Tensor:
        return cast(Tensor, _PassThrough.apply(x, value, inside))

    def __repr__(self) -> str:
        return repr(self.name)


GRADIENTS: Registry[type[Gradient]] = Registry("gradient")


@GRADIENTS.register("ste")
@dataclass(frozen=True, repr=False)
class STE(Gradient):
    """B1, straight through: the gradient passes as it is."""

    name = "ste"


@GRADIENTS.register("clipped")
@dataclass(frozen=True, repr=False)
class ClippedSTE(Gradient):
    """B2: straight through where the format did not clip, else 0."""

    name = "clipped"
    wants_inside = True


@GRADIENTS.register("hardtanh")
@dataclass(frozen=True, repr=False)
class HardTanh(Gradient):
    """B3, for 1-bit formats: straight through where |x| <= 1, else 0 (Courbariaux et al. 2016, arXiv:1602.02830)."""

    name = "hardtanh"
    needs = frozenset({"sign"})

    def attach(self, x: Tensor, value: Tensor, inside: Tensor | None, span: Span | None) -> Tensor:
        with torch.no_grad():
            within = x.detach().abs().le_(1.0)
            mask = within if inside is None else within.mul_(inside)
        return cast(Tensor, _PassThrough.apply(x, value, mask))


@GRADIENTS.register("approxsign")
@dataclass(frozen=True, repr=False)
class ApproxSign(Gradient):
    """B3, for 1-bit formats: times `max(0, 2 - 2|x|)` (Liu et al. 2018, Bi-Real Net, arXiv:1808.00278)."""

    name = "approxsign"
    needs = frozenset({"sign"})

    def attach(self, x: Tensor, value: Tensor, inside: Tensor | None, span: Span | None) -> Tensor:
        with torch.no_grad():
            factor = (2.0 - 2.0 * x.detach().abs()).clamp_min_(0.0)
            factor = factor if inside is None else factor.mul_(inside)
        return cast(Tensor, _Scaled.apply(x, value, factor))


@GRADIENTS.register("ewgs")
@dataclass(frozen=True, repr=False)
class EWGS(Gradient):
    """B8, element-wise scaling: `g * (1 + delta * sign(g) * (x - value) / (span / 2))` where not clipped, else 0.

    Source: Lee et al. 2021, arXiv:2104.00903, with x and its discretisation normalised to [-1, 1] by the outermost
    levels of the grid. `delta` 0 is the clipped straight-through.
    """

    name = "ewgs"
    wants_inside = True
    delta: float = 1e-3

    def __post_init__(self) -> None:
        if not self.delta >= 0.0:
            raise ConfigError(f"delta must be a number >= 0, got {self.delta!r}")

    def attach(self, x: Tensor, value: Tensor, inside: Tensor | None, span: Span | None) -> Tensor:
        if span is None:
            raise ConfigError("the gradient 'ewgs' needs the span of the grid; use a quantizer of this format")
        with torch.no_grad():
            half = (span() / 2).to(value.dtype)
            safe = torch.where(half > 0, half, torch.ones_like(half))
            # Outside, where the mask takes it away, it may be infinite; 0 times that would not be 0.
            lean = (x.detach() - value).div_(safe).nan_to_num_(0.0).clamp_(-1.0, 1.0).mul_(self.delta)
            mask = torch.ones_like(value) if inside is None else inside
        return cast(Tensor, _Leaning.apply(x, value, lean, mask))

    def __repr__(self) -> str:
        return repr(f"ewgs(delta={self.delta})")


def make_gradient(gradient: str | Gradient, **options: Any) -> Gradient:
    """The estimator of that name, with its options; one that is made already is returned. Raises UnknownNameError."""
    if isinstance(gradient, Gradient):
        return gradient
    return GRADIENTS[gradient](**options)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type the maths runs in: float32 for half types, else the tensor's own."""
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def cast_back(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Grid values in the tensor's own type; a float16 that would overflow takes the largest float16."""
    if dtype == torch.float16:
        largest = torch.finfo(dtype).max
        value = value.clamp(-largest, largest)
    return value.to(dtype)


def apply_projection(
    x: Tensor,
    project: Projection,
    gradient: str | Gradient = "ste",
    clamp: Clamp | None = None,
    project_clamps: bool = False,
    span: Span | None = None,
) -> Tensor:
    """Project `clamp(x)` on a grid and attach a gradient for x.

    `gradient`: one of `GRADIENTS`, by name or made. `clamp=(low, high)` quantizes
    `torch.clamp(x, low, high)` in the same pass; the gradient is then that of the clamp followed by the
    quantizer, strict at both ends as in `torch.relu` and `torch.nn.functional.hardtanh`.
    `project_clamps` says that `project` does the clamp itself. Half types are computed in float32 and
    cast back. `span` is what `Gradient.attach` asks for.
    """
    gradient = make_gradient(gradient)
    if not x.is_floating_point():
        raise ConfigError(f"only floating point tensors can be quantized, got {x.dtype}")
    needs_grad = torch.is_grad_enabled() and x.requires_grad
    with torch.no_grad():
        real = x.detach().to(compute_dtype(x))
        clamped = real if clamp is None or project_clamps else real.clamp(*clamp)
        value, inside = project(clamped, needs_grad and gradient.wants_inside)
        value = cast_back(value, x.dtype)
        if not needs_grad:
            return value
        mask = inside if clamp is None else _where_strictly_inside(real, clamp, inside)
    return gradient.attach(x, value, mask, span)


def _where_strictly_inside(x: Tensor, clamp: Clamp, inside: Tensor | None) -> Tensor:
    """`inside` (or 1) where low < x < high, else 0, by native selects that stay in floats."""
    low, high = clamp
    mask = torch.ones_like(x) if inside is None else inside
    if high is None:
        return torch.ops.aten.threshold_backward(mask, x, low)
    if low is None:
        return torch.ops.aten.threshold_backward(mask, -x, -high)
    return torch.ops.aten.hardtanh_backward(mask, x, low, high)


def gradient_clip(x: Tensor, range_min: Tensor | float, range_max: Tensor | float) -> Tensor:
    """Return x; in backward, stop the gradient where x is outside [range_min, range_max].

    x: (*). range_min, range_max: number, () or broadcastable to x, same unit as x.

    >>> x = torch.tensor([-2.0, 0.5, 3.0], requires_grad=True)
    >>> gradient_clip(x, -1.0, 1.0).sum().backward()
    >>> x.grad
    tensor([0., 1., 0.])
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return x
    with torch.no_grad():
        low = torch.as_tensor(range_min, dtype=x.dtype, device=x.device)
        high = torch.as_tensor(range_max, dtype=x.dtype, device=x.device)
        inside = torch.minimum(torch.maximum(x, low), high).eq_(x)
    return _PassThrough.apply(x, x.detach(), inside)
