"""What operators make of integers: one function an operator, keyed by its name.

A function gets the operator's own arguments and returns an `IntegerTensor`, or `NotImplemented` for arguments that
have no integer form. Sums of products are taken in float64, where whole numbers are exact up to 2**53; what they may
reach is checked against 32 bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from torchquant.deploy.codes import bias_codes
from torchquant.deploy.integer_run import current_run
from torchquant.deploy.values import Addition, Average, Clamp, Codes, Concat, IntegerTensor, Product, Sum, Sums, Weight
from torchquant.errors import ExportError
from torchquant.quantizers_functional.bn_fold import channel_view

Handler = Callable[..., Any]
OPS: dict[str, Handler] = {}

# Values move or stay; none is computed. Names of functions and methods.
MOVING = {
    *("view", "view_as", "reshape", "flatten", "unflatten", "permute", "transpose", "t", "contiguous", "movedim"),
    *("squeeze", "unsqueeze", "expand", "expand_as", "repeat", "__getitem__", "select", "narrow", "roll", "flip"),
    *("chunk", "split", "unbind", "tensor_split", "detach", "clone", "pixel_shuffle", "pixel_unshuffle"),
    *("max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"),
    *("channel_shuffle", "native_channel_shuffle", "amax"),
}
KEEPING = {"dropout", "dropout1d", "dropout2d", "dropout3d", "float"}
ABOUT = {
    *("size", "dim", "numel", "ndimension", "stride", "is_floating_point", "is_complex", "get_device", "__len__"),
    *("is_contiguous", "element_size", "storage_offset", "is_signed", "__hash__", "nelement"),
}
ALIASES = {"axis": "dim", "keepdims": "keepdim"}
PROPERTIES = {"shape", "ndim", "dtype", "device", "layout", "requires_grad", "is_cuda", "is_meta", "is_sparse"}


def run_op(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The result of a torch function whose arguments hold an `IntegerTensor`; in real numbers where it must be."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        name = func.__self__.__name__
        if name in PROPERTIES:
            with _plainly():
                return func(*args, **kwargs)
    if name in ABOUT:
        with _plainly():
            return func(*args, **kwargs)
    kwargs = {ALIASES.get(key, key): value for key, value in kwargs.items()}
    args = (*(kwargs.pop(key) for key in ("input", "tensors") if key in kwargs), *args)
    if writes_into(name) and isinstance(args[0], IntegerTensor):
        raise ExportError(
            f"{current_run().site}: the model writes into a quantized tensor behind it ({name}), which integers do not "
            "follow. Use the operator that returns a new tensor"
        )
    handler = OPS.get(name)
    found = NotImplemented if handler is None else handler(*args, **kwargs)
    if found is NotImplemented and name in MOVING:
        found = _moved(func, *args, **kwargs)
    if found is not NotImplemented:
        return found
    if name not in MOVING:
        current_run().note_float(name)
    real_args, real_kwargs = tree_map_only(IntegerTensor, IntegerTensor.real, (tuple(args), kwargs))
    return func(*real_args, **real_kwargs)


def writes_into(name: str) -> bool:
    """Whether an operator of that name changes its first argument and nobody takes up the result."""
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__") and name != "requires_grad_")


def _plainly() -> AbstractContextManager[Any]:
    """Without `__torch_function__`."""
    return torch._C.DisableTorchFunctionSubclass()


def _op(*names: str) -> Callable[[Handler], Handler]:
    def enter(handler: Handler) -> Handler:
        OPS.update(dict.fromkeys(names, handler))
        return handler

    return enter


def _codes(x: Any) -> Codes | None:
    return x.codes if isinstance(x, IntegerTensor) else None


def _made(value: Any, like: Tensor) -> IntegerTensor:
    return IntegerTensor(value, like.shape)


def _on_codes(x: IntegerTensor, f: Callable[[Tensor], Any]) -> Any:
    """`f` of the integers, as values on the same grid; f may return a tuple of tensors."""
    value = _codes(x)
    if value is None:
        return NotImplemented
    found = f(value.ints.to(torch.float64))
    if isinstance(found, Tensor):
        return _made(replace(value, ints=found.to(torch.int64)), found)
    return type(found)(_made(replace(value, ints=part.to(torch.int64)), part) for part in found)


def _moved(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(x, IntegerTensor) or kwargs.get("return_indices"):
        return NotImplemented
    return _on_codes(x, lambda ints: func(ints, *args, **kwargs))


@_op(*KEEPING)
def _kept(x: Any, *args: Any, **kwargs: Any) -> Any:
    training = kwargs.get("training", args[1] if len(args) > 1 else False)
    return NotImplemented if training else x


@_op("to")
def _to(x: Any, *args: Any, **kwargs: Any) -> Any:
    wanted = kwargs.get("dtype", next((a for a in args if isinstance(a, torch.dtype)), torch.float32))
    return x if wanted == torch.float32 else NotImplemented


@_op("pad")
def _pad(x: Any, pad: Any, mode: str = "constant", value: float | None = None) -> Any:
    if not isinstance(x, IntegerTensor) or (mode == "constant" and value):
        return NotImplemented
    return _on_codes(x, lambda ints: torch.nn.functional.pad(ints, pad, mode))


@_op("interpolate")
def _interpolate(x: Any, size: Any = None, scale_factor: Any = None, mode: str = "nearest", **kwargs: Any) -> Any:
    if not isinstance(x, IntegerTensor) or not mode.startswith("nearest"):
        return NotImplemented
    return _on_codes(x, lambda ints: torch.nn.functional.interpolate(ints, size, scale_factor, mode))


@_op("relu")
def _relu(x: Any, inplace: bool = False) -> Any:
    return _clamped(x, (0.0, None))


@_op("relu6")
def _relu6(x: Any, inplace: bool = False) -> Any:
    return _clamped(x, (0.0, 6.0))


@_op("hardtanh")
def _hardtanh(x: Any, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Any:
    return _clamped(x, (min_val, max_val))


@_op("clamp", "clip")
def _clamp(x: Any, min: Any = None, max: Any = None) -> Any:
    if isinstance(min, Tensor) or isinstance(max, Tensor):
        return NotImplemented
    return _clamped(x, (min, max))


def _clamped(x: IntegerTensor, clamp: Clamp) -> Any:
    if clamp == (0.0, None) and _codes(x) is not None:
        return _on_codes(x, lambda ints: ints.clamp_min(0.0))
    if isinstance(x.value, Weight):
        return NotImplemented
    (low, high), (former_low, former_high) = clamp, x.clamp_to or (None, None)
    low = former_low if low is None else low if former_low is None else max(low, former_low)
    high = former_high if high is None else high if former_high is None else min(high, former_high)
    return IntegerTensor(x.value, x.shape, (low, high))


def _convolution(function: Any, x: Any, weight: Any, bias: Any = None, *args: Any, **kwargs: Any) -> Any:
    return _weighted(lambda a, w: function(a, w, None, *args, **kwargs), x, weight, bias, 1 - weight.dim())


for _name in (f"{kind}{n}d" for kind in ("conv", "conv_transpose") for n in (1, 2, 3)):
    OPS[_name] = partial(_convolution, getattr(torch, _name))


@_op("linear")
def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    return _weighted(lambda a, w: torch.nn.functional.linear(a, w), x, weight, bias, -1)


def _weighted(
    function: Callable[[Tensor, Tensor], Tensor], x: Any, weight: Any, bias: Tensor | None, channel_axis: int
) -> Any:
    """A layer in integers: a product with each integer term of the weight, the bias on the grid of the products."""
    value = _codes(x)
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
    return _made(parts[0] if len(parts) == 1 else Sums(tuple(parts)), acc)


def _bias_on_grid(bias: Tensor, scale: Tensor, ndim: int, channel_axis: int) -> Tensor:
    """A bias in steps of the sums: as stored, or rounded here. Shaped to broadcast against them."""
    stored = bias.value if isinstance(bias, IntegerTensor) else None
    if isinstance(stored, Weight):
        return channel_view(stored.terms[0][1], ndim, channel_axis)
    return bias_codes(channel_view(bias.detach(), ndim, channel_axis), scale, current_run().site)


@_op("matmul", "__matmul__", "bmm", "mm")
def _matmul(input: Any, other: Any) -> Any:
    left, right = _codes(input), _codes(other)
    if left is None or right is None:
        return NotImplemented
    run = current_run()
    if run.checking:
        run.check_accumulator(float(left.limit) * right.limit * left.ints.shape[-1])
    acc = torch.matmul(left.ints.to(torch.float64), right.ints.to(torch.float64))
    return _made(Sum(acc.to(torch.int64), left.scale * right.scale), acc)


@_op("mul", "__mul__", "__rmul__", "multiply", "__imul__")
def _mul(input: Any, other: Any) -> Any:
    left, right = _codes(input), _codes(other)
    if left is None or right is None:
        return NotImplemented
    ints = left.ints * right.ints
    return _made(Product(ints, left.scale * right.scale), ints)


@_op("add", "__add__", "__radd__", "__iadd__")
def _add(input: Any, other: Any, alpha: float = 1) -> Any:
    return _sum_of(input, other, alpha, minus=False)


@_op("sub", "__sub__", "__isub__", "subtract")
def _sub(input: Any, other: Any, alpha: float = 1) -> Any:
    return _sum_of(input, other, alpha, minus=True)


def _sum_of(a: Any, b: Any, alpha: float, minus: bool) -> Any:
    left, right = _codes(a), _codes(b)
    if left is None or right is None or alpha != 1:
        return NotImplemented
    shape = torch.broadcast_shapes(left.ints.shape, right.ints.shape)
    return IntegerTensor(Addition(left, right, minus), shape)


@_op("cat", "concat", "concatenate")
def _cat(tensors: Sequence[Any], dim: int = 0) -> Any:
    values = [_codes(x) for x in tensors]
    parts = [value for value in values if value is not None]
    if len(parts) < len(values):
        return NotImplemented
    joined = torch.cat([part.ints for part in parts], dim)
    first = parts[0]
    if all(torch.equal(p.scale, first.scale) and torch.equal(p.zero_point, first.zero_point) for p in parts):
        return _made(replace(first, ints=joined, limit=max(p.limit for p in parts)), joined)
    return _made(Concat(tuple(parts), dim), joined)


@_op("mean")
def _mean(x: Any, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Any:
    value = _codes(x)
    if value is None or kwargs:
        return NotImplemented
    dims = tuple(range(x.dim())) if dim is None else (dim,) if isinstance(dim, int) else tuple(dim)
    sums = value.ints.sum(dims, keepdim)
    return _made(Sum(sums, value.scale, value.ints.numel() // max(1, sums.numel())), sums)


def _of_each_rank(name: str, handler: Handler) -> None:
    """Enter a pool for 1, 2 and 3 axes; its handler gets their number first. Inputs without a batch run in float."""
    for n in (1, 2, 3):

        def handle(x: Any, *args: Any, n: int = n, **kwargs: Any) -> Any:
            return handler(n, x, *args, **kwargs) if x.dim() == n + 2 else NotImplemented

        OPS[f"{name}{n}d"] = handle


def _adaptive_average(n: int, x: Any, output_size: Any) -> Any:
    value = _codes(x)
    if value is None:
        return NotImplemented
    given = output_size if isinstance(output_size, tuple | list) else (output_size,) * n
    spatial = x.shape[x.dim() - len(given) :]
    wanted = [s if g is None else g for g, s in zip(given, spatial, strict=True)]
    if all(w == 1 for w in wanted):
        dims = tuple(range(-len(wanted), 0))
        sums = value.ints.sum(dims, keepdim=True)
        return _made(Sum(sums, value.scale, math.prod(spatial)), sums)
    if any(s % w for s, w in zip(spatial, wanted, strict=True)):
        return NotImplemented
    kernel = [s // w for s, w in zip(spatial, wanted, strict=True)]
    return _window_average(value, kernel, kernel)


def _average(
    n: int,
    x: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Any:
    value = _codes(x)
    if value is None or ceil_mode or divisor_override is not None:
        return NotImplemented
    kernel, steps, pads = (_each(v, n) for v in (kernel_size, stride or kernel_size, padding))
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

    return _made(Average(sums, value.scale, size, in_float), sums)


def _windows(x: Tensor, kernel: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Sums over windows of the last axes, one element after another."""
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


_of_each_rank("adaptive_avg_pool", _adaptive_average)
_of_each_rank("avg_pool", _average)
