"""QuantizeLinear and DequantizeLinear: as numbers, or as ONNX nodes inside `with onnx_nodes():`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from torchquant.deploy.codes import Grid
from torchquant.range_observers._statistics import per_channel_view

_AS_NODES = ContextVar("as_nodes", default=False)


@contextmanager
def onnx_nodes() -> Iterator[None]:
    """Trace the functions of this file as the ONNX operators they are named after."""
    token = _AS_NODES.set(True)
    try:
        yield
    finally:
        _AS_NODES.reset(token)


def _node(op: str, x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, dtype: torch.dtype) -> Tensor:
    attributes: dict[str, Any] = {} if axis is None else {"axis": axis}
    return torch.onnx.ops.symbolic(op, (x, scale, zero_point), attributes, dtype=dtype, shape=x.shape)


def quantize_linear(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> Tensor:
    """`saturate(round_half_even(x / scale) + zero_point)` in the type of zero_point, as ONNX defines it.

    x: (*) float32. scale float32 and zero_point int8 or uint8: () or (C,) along `axis`.

    >>> quantize_linear(torch.tensor([-9.0, 0.5, 1.5]), torch.tensor(1.0), torch.tensor(2, dtype=torch.uint8), None)
    tensor([0, 2, 4], dtype=torch.uint8)
    """
    if _AS_NODES.get():
        return _node("QuantizeLinear", x, scale, zero_point, axis, zero_point.dtype)
    steps = torch.round(x / per_channel_view(scale, x.ndim, axis))
    limits = torch.iinfo(zero_point.dtype)
    return (steps + per_channel_view(zero_point, x.ndim, axis)).clamp(limits.min, limits.max).to(zero_point.dtype)


def dequantize_linear(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> Tensor:
    """`(codes - zero_point) * scale` in float32, as ONNX defines it; shapes as in `quantize_linear`."""
    if _AS_NODES.get():
        return _node("DequantizeLinear", codes, scale, zero_point, axis, torch.float32)
    steps = codes.to(torch.float32) - per_channel_view(zero_point, codes.ndim, axis)
    return steps * per_channel_view(scale, codes.ndim, axis)


class StoredGrid(nn.Module):
    """The scale and zero point of a grid as buffers, so that they become initializers of the file."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.axis = grid.axis
        self.register_buffer("scale", grid.scale)
        self.register_buffer("zero_point", grid.zero_point.to(grid.storage))


class StoredWeight(StoredGrid):
    """A weight kept as 8-bit codes in the layout of its layer; forward gives the real weight."""

    codes: Tensor

    def __init__(self, codes: Tensor, grid: Grid) -> None:
        super().__init__(grid)
        self.register_buffer("codes", codes.to(grid.storage))

    def forward(self) -> Tensor:
        return dequantize_linear(self.codes, self.scale, self.zero_point, self.axis)


class QuantizeDequantize(StoredGrid):
    """The Q/DQ pair of an activation. Where its codes do not fill 8 bits, a clip takes the ends first."""

    def __init__(self, grid: Grid) -> None:
        super().__init__(grid)
        limits = torch.iinfo(grid.storage)
        self.low = _bound(grid, grid.qmin) if grid.qmin > limits.min else None
        self.high = _bound(grid, grid.qmax) if grid.qmax < limits.max else None

    def forward(self, x: Tensor) -> Tensor:
        codes = quantize_linear(self._clipped(x), self.scale, self.zero_point, self.axis)
        return dequantize_linear(codes, self.scale, self.zero_point, self.axis)

    def _clipped(self, x: Tensor) -> Tensor:
        if self.low is None and self.high is None:
            return x
        bounds: list[Any] = [self.low, self.high]
        return x.clamp(*(per_channel_view(b, x.ndim, self.axis) if isinstance(b, Tensor) else b for b in bounds))


def _bound(grid: Grid, code: int) -> Tensor | float:
    real = grid.real(code)
    return real if real.ndim else float(real)
