"""Compute operators on integers: one handler for each name in the table of operators.

A handler gets the function that was called and its arguments, and returns an `IntegerTensor`, or `NotImplemented` for
arguments that have no integer form. Sums of products are computed in float64, where integers are exact up to 2**53;
their largest possible value is checked against 32 bits. An operator that passes values on needs no handler: it runs on
the integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from torchquant.deploy.integer.context import current_run
from torchquant.deploy.integer.tensor import HANDLERS as HANDLERS
from torchquant.deploy.integer.tensor import IntegerTensor as IntegerTensor
from torchquant.deploy.integer.tensor import codes_of, made, moved, on_codes
from torchquant.deploy.integer.tensor import handler_of as handler_of
from torchquant.deploy.integer.tensor import register_integer as register_integer
from torchquant.deploy.integer.values import Addition, Average, Clamp, Codes, Concat, Product, Sum, Sums, Weight
from torchquant.deploy.lowering.export_grids import bias_codes
from torchquant.qmodule.own_forward import PRODUCTS
from torchquant.quantizers_functional.bn_fold import channel_view


@register_integer("dropout")
def _kept(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    training = kwargs.get("training", args[1] if len(args) > 1 else False)
    return NotImplemented if training else x


@register_integer("to")
def _to(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """Handle `x.to(...)`, `x.type_as(y)` and `x.float()`."""
    given = (kwargs.get("dtype"), *(a.dtype if isinstance(a, Tensor) else a for a in (*args, kwargs.get("other"))))
    wanted = next((a for a in given if isinstance(a, torch.dtype)), torch.float32)
    return x if wanted == torch.float32 else NotImplemented


@register_integer("max")
def _max(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """Take the maximum of all values, or along an axis with its index; not the larger of two tensors."""
    if codes_of(x) is None or any(isinstance(a, Tensor) for a in (*args, *kwargs.values())):
        return NotImplemented
    if func in (torch.amax, Tensor.amax) or not (args or kwargs):
        return moved(func, x, *args, **kwargs)
    found = func(x.codes.ints, *args, **kwargs)
    return type(found)((made(replace(x.codes, ints=found.values), found.values), found.indices))


@register_integer("pad")
def _pad(func: Any, x: Any, pad: Any, mode: str = "constant", value: float | None = None) -> Any:
    if not isinstance(x, IntegerTensor) or (mode == "constant" and value):
        return NotImplemented
    return on_codes(x, lambda ints: func(ints, pad, mode))


@register_integer("interpolate")
def _interpolate(
    func: Any, x: Any, size: Any = None, scale_factor: Any = None, mode: str = "nearest", **kwargs: Any
) -> Any:
    if not isinstance(x, IntegerTensor) or not mode.startswith("nearest"):
        return NotImplemented
    return on_codes(x, lambda ints: func(ints, size, scale_factor, mode))


@register_integer("relu")
def _relu(func: Any, x: Any, inplace: bool = False) -> Any:
    return _clamped(x, (0.0, None))


@register_integer("relu6")
def _relu6(func: Any, x: Any, inplace: bool = False) -> Any:
    return _clamped(x, (0.0, 6.0))


@register_integer("hardtanh")
def _hardtanh(func: Any, x: Any, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Any:
    return _clamped(x, (min_val, max_val))


@register_integer("clamp")
def _clamp(func: Any, x: Any, min: Any = None, max: Any = None) -> Any:
    if isinstance(min, Tensor) or isinstance(max, Tensor):
        return NotImplemented
    return _clamped(x, (min, max))


def _clamped(x: IntegerTensor, clamp: Clamp) -> Any:
    if clamp == (0.0, None) and codes_of(x) is not None:
        return on_codes(x, lambda ints: ints.clamp_min(0.0))
    if isinstance(x.value, Weight):
        return NotImplemented
    (low, high), (former_low, former_high) = clamp, x.clamp_to or (None, None)
    low = former_low if low is None else low if former_low is None else max(low, former_low)
    high = former_high if high is None else high if former_high is None else min(high, former_high)
    return IntegerTensor(x.value, x.shape, (low, high))


@register_integer(*(f.__name__ for f in PRODUCTS.values()))
def _layer(func: Any, x: Any, weight: Any, bias: Any = None, *args: Any, **kwargs: Any) -> Any:
    channel_axis = -1 if weight.dim() <= 2 else 1 - weight.dim()
    return _weighted(lambda a, w: func(a, w, None, *args, **kwargs), x, weight, bias, channel_axis)


def _weighted(
    function: Callable[[Tensor, Tensor], Tensor], x: Any, weight: Any, bias: Tensor | None, channel_axis: int
) -> Any:
    """Compute a layer in integers: a product with each integer term of the weight, plus the bias on their grid."""
    value = codes_of(x)
    if value is None or not isinstance(weight, IntegerTensor) or not isinstance(weight.value, Weight):
        return NotImplemented
    parts = []
    for scale, ints in weight.value.terms:
        acc = function(value.ints.to(torch.float64), ints.to(torch.float64))
        view = channel_view(scale, acc.ndim, channel_axis) if scale.ndim else scale
        parts.append(Sum(acc.to(torch.int64), value.scale * view))
    run = current_run()
    on_grid = torch.zeros((), dtype=torch.int64)
    if bias is not None:
        on_grid = _bias_on_grid(bias, parts[0].scale, acc.ndim, channel_axis)
        if len(parts) == 1:
            parts = [replace(parts[0], ints=parts[0].ints + on_grid)]
        else:
            parts.append(Sum(on_grid.expand_as(acc), parts[0].scale))
    if run.checking:
        for _, ints in weight.value.terms:
            full = function(torch.full_like(value.ints, value.limit).double(), ints.abs().double())
            run.check_accumulator(float((full + on_grid.abs()).max()))
    return made(parts[0] if len(parts) == 1 else Sums(tuple(parts)), acc)


def _bias_on_grid(bias: Tensor, scale: Tensor, ndim: int, channel_axis: int) -> Tensor:
    """Return a bias in steps of the sums, as stored or rounded here, in a shape that broadcasts against the sums."""
    stored = bias.value if isinstance(bias, IntegerTensor) else None
    if isinstance(stored, Weight):
        return channel_view(stored.terms[0][1], ndim, channel_axis)
    return bias_codes(channel_view(bias.detach(), ndim, channel_axis), scale, current_run().site)


@register_integer("matmul")
def _matmul(func: Any, input: Any, other: Any) -> Any:
    left, right = codes_of(input), codes_of(other)
    if left is None or right is None:
        return NotImplemented
    run = current_run()
    if run.checking:
        run.check_accumulator(float(left.limit) * right.limit * left.ints.shape[-1])
    acc = torch.matmul(left.ints.to(torch.float64), right.ints.to(torch.float64))
    return made(Sum(acc.to(torch.int64), left.scale * right.scale), acc)


@register_integer("mul", "multiply")
def _mul(func: Any, input: Any, other: Any) -> Any:
    left, right = codes_of(input), codes_of(other)
    if left is None or right is None:
        return NotImplemented
    ints = left.ints * right.ints
    return made(Product(ints, left.scale * right.scale), ints)


@register_integer("add")
def _add(func: Any, input: Any, other: Any, alpha: float = 1) -> Any:
    return _sum_of(input, other, alpha, minus=False)


@register_integer("sub", "subtract")
def _sub(func: Any, input: Any, other: Any, alpha: float = 1) -> Any:
    return _sum_of(input, other, alpha, minus=True)


def _sum_of(a: Any, b: Any, alpha: float, minus: bool) -> Any:
    left, right = codes_of(a), codes_of(b)
    if left is None or right is None or alpha != 1:
        return NotImplemented
    shape = torch.broadcast_shapes(left.ints.shape, right.ints.shape)
    return IntegerTensor(Addition(left, right, minus), shape)


@register_integer("cat")
def _cat(func: Any, tensors: Sequence[Any], dim: int = 0) -> Any:
    values = [codes_of(x) for x in tensors]
    parts = [value for value in values if value is not None]
    if len(parts) < len(values):
        return NotImplemented
    joined = torch.cat([part.ints for part in parts], dim)
    first = parts[0]
    if all(torch.equal(p.scale, first.scale) and torch.equal(p.zero_point, first.zero_point) for p in parts):
        return made(replace(first, ints=joined, limit=max(p.limit for p in parts)), joined)
    return made(Concat(tuple(parts), dim), joined)


@register_integer("stack")
def _stack(func: Any, tensors: Sequence[Any], dim: int = 0) -> Any:
    return _cat(func, [x.unsqueeze(dim) for x in tensors], dim)


@register_integer("mean")
def _mean(func: Any, x: Any, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Any:
    value = codes_of(x)
    if value is None or kwargs:
        return NotImplemented
    dims = tuple(range(x.dim())) if dim is None else (dim,) if isinstance(dim, int) else tuple(dim)
    sums = value.ints.sum(dims, keepdim)
    return made(Sum(sums, value.scale, value.ints.numel() // max(1, sums.numel())), sums)


def _lacks_batch(func: Any, x: Any) -> bool:
    """Tell whether x lacks the batch axis of a pool, whose name ends with its number of spatial axes, such as "2d"."""
    return bool(x.dim() != int(func.__name__[-2]) + 2)


@register_integer("adaptive_avg_pool")
def _adaptive_average(func: Any, x: Any, output_size: Any) -> Any:
    value = codes_of(x)
    if value is None or _lacks_batch(func, x):
        return NotImplemented
    given = output_size if isinstance(output_size, tuple | list) else (output_size,) * (x.dim() - 2)
    spatial = x.shape[x.dim() - len(given) :]
    wanted = [s if g is None else g for g, s in zip(given, spatial, strict=True)]
    if all(w == 1 for w in wanted):
        dims = tuple(range(-len(wanted), 0))
        sums = value.ints.sum(dims, keepdim=True)
        return made(Sum(sums, value.scale, math.prod(spatial)), sums)
    if any(s % w for s, w in zip(spatial, wanted, strict=True)):
        return NotImplemented
    kernel = [s // w for s, w in zip(spatial, wanted, strict=True)]
    return _window_average(value, kernel, kernel)


@register_integer("avg_pool")
def _average(
    func: Any,
    x: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Any:
    value = codes_of(x)
    if value is None or ceil_mode or divisor_override is not None or _lacks_batch(func, x):
        return NotImplemented
    kernel, steps, pads = (_each(v, x.dim() - 2) for v in (kernel_size, stride or kernel_size, padding))
    if any(pads) and not count_include_pad:
        return NotImplemented
    padded = torch.nn.functional.pad(value.ints, [p for pad in reversed(pads) for p in (pad, pad)])
    return _window_average(replace(value, ints=padded), kernel, steps)


def _each(value: Any, n: int) -> list[int]:
    given = [value] * n if isinstance(value, int) else list(value)
    return given * n if len(given) == 1 else given


def _window_average(value: Codes, kernel: Sequence[int], stride: Sequence[int]) -> IntegerTensor:
    sums = _windows(value.ints, kernel, stride)
    size = math.prod(kernel)

    def in_float() -> Tensor:
        return _windows(value.real(), kernel, stride) / size

    return made(Average(sums, value.scale, size, in_float), sums)


def _windows(x: Tensor, kernel: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Sum over windows of the last axes, one element after another."""
    spatial = x.shape[-len(kernel) :]
    total: Tensor | None = None
    for offsets in product(*(range(k) for k in kernel)):
        index: list[Any] = [Ellipsis]
        for offset, size, k, step in zip(offsets, spatial, kernel, stride, strict=True):
            index.append(slice(offset, size - k + offset + 1, step))
        part = x[tuple(index)]
        total = part if total is None else total + part
    assert total is not None
    return total
