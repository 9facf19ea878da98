"""QuantizeLinear, DequantizeLinear and related operators: as numbers; as ONNX nodes inside `with onnx_nodes():`; or on
integers inside `with integer_run(...)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from torchquant.deploy.integer.context import active_run
from torchquant.deploy.integer.tensor import IntegerTensor, quantized
from torchquant.deploy.integer.values import Clamp, Weight
from torchquant.deploy.lowering.export_grids import Grid, Table, bias_codes, uniform_grid
from torchquant.deploy.lowering.stand_in import PassesForTensor
from torchquant.quantizers import Quantizer
from torchquant.quantizers._token import TokenQuantizer
from torchquant.quantizers_functional.bn_fold import channel_view
from torchquant.quantizers_functional.tokens import largest_code, token_scales, token_steps
from torchquant.range_observers._statistics import per_channel_view

LARGEST_BIAS_BITS = 30
FLOAT, UINT8, INT8 = 1, 2, 3
"""ONNX type numbers of torch types."""
LOOK_UP = "torchquant::LookUp"
"""Placeholder for a Gather until the file is finished: the exporter would compute a Gather with constant inputs."""

Terms = tuple[tuple[Tensor, Tensor], ...]
_AS_NODES = ContextVar("as_nodes", default=False)


@contextmanager
def onnx_nodes() -> Iterator[None]:
    """Trace the functions of this file as the ONNX operators with their names."""
    token = _AS_NODES.set(True)
    try:
        yield
    finally:
        _AS_NODES.reset(token)


def as_nodes() -> bool:
    """Tell whether the functions of this file are being traced."""
    return _AS_NODES.get()


def node(op: str, inputs: tuple[Tensor, ...], dtype: torch.dtype, shape: Any, **attributes: Any) -> Tensor:
    """Add an ONNX operator to the traced graph."""
    return torch.onnx.ops.symbolic(op, inputs, attributes, dtype=dtype, shape=shape)


def in_graph(
    op: str, inputs: tuple[Tensor | None, ...], dtype: torch.dtype, shapes: list[Any], attributes: dict[str, Any]
) -> list[Tensor]:
    """Add an ONNX operator with several outputs and optional inputs to the traced graph."""
    return list(torch.onnx.ops.symbolic_multi_out(op, inputs, attributes, dtypes=[dtype] * len(shapes), shapes=shapes))


def _axis(axis: int | None) -> dict[str, Any]:
    return {} if axis is None else {"axis": axis}


BLOCK = "block_size"
"""Attribute of a DequantizeLinear that has a scale for each block of codes."""
SITE = "site"
"""Attribute of a QuantizeLinear until the file is finished: its site. It keeps equal nodes from being merged."""


def quantize_linear(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, site: str = "") -> Tensor:
    """Compute `saturate(round_half_even(x / scale) + zero_point)` in the type of zero_point, as ONNX defines it.

    x: (*) float32. scale float32 and zero_point int8 or uint8: () or (C,) along `axis`. `site` is recorded on the node.

    >>> quantize_linear(torch.tensor([-9.0, 0.5, 1.5]), torch.tensor(1.0), torch.tensor(2, dtype=torch.uint8), None)
    tensor([0, 2, 4], dtype=torch.uint8)
    """
    if as_nodes():
        noted = {SITE: site} if site else {}
        return node("QuantizeLinear", (x, scale, zero_point), zero_point.dtype, x.shape, **_axis(axis), **noted)
    steps = torch.round(x / per_channel_view(scale, x.ndim, axis))
    limits = torch.iinfo(zero_point.dtype)
    return (steps + per_channel_view(zero_point, x.ndim, axis)).clamp(limits.min, limits.max).to(zero_point.dtype)


def dequantize_linear(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int | None, block: int | None = None
) -> Tensor:
    """`(codes - zero_point) * scale` in float32, as ONNX defines it; shapes as in `quantize_linear`.

    With `block`, codes (C, K) have a scale and a zero point for each `block` along `axis`, 0 or 1, in each slice of the
    other axis: (C, ceil(K / block)), or (ceil(C / block), K).
    """
    if as_nodes():
        inputs = (codes, scale) if zero_point is None else (codes, scale, zero_point)
        blocks = {} if block is None else {BLOCK: block}
        return node("DequantizeLinear", inputs, torch.float32, codes.shape, **_axis(axis), **blocks)
    if block is not None:
        assert axis is not None
        own = torch.arange(codes.shape[axis], device=codes.device) // block
        steps = codes.to(torch.float32)
        steps = steps if zero_point is None else steps - zero_point.index_select(axis, own)
        return steps * scale.index_select(axis, own)
    steps = codes.to(torch.float32)
    if zero_point is not None:
        steps = steps - per_channel_view(zero_point, codes.ndim, axis)
    return steps * per_channel_view(scale, codes.ndim, axis)


def look_up_linear(levels: Tensor, codes: Tensor, rows: Tensor | None) -> Tensor:
    """Compute `levels[codes]`, or `levels[codes + rows]`; a Gather in the file. levels: (L, ...)."""
    if as_nodes():
        inputs = (levels, codes) if rows is None else (levels, codes, rows)
        return node(LOOK_UP, inputs, levels.dtype, (*codes.shape, *levels.shape[1:]))
    index = codes.to(torch.int64)
    return levels[index if rows is None else index + rows]


class StoredGrid(nn.Module):
    """The scale and zero point of a grid as buffers, so that they become initializers of the file."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.axis = grid.axis
        self.qmin, self.qmax = grid.qmin, grid.qmax
        self.register_buffer("scale", grid.scale)
        self.register_buffer("zero_point", grid.zero_point.to(grid.storage))

    def shaped(self, ndim: int) -> tuple[Tensor, Tensor]:
        """Return (scale float64, zero point int64) in shapes that broadcast against `ndim` dimensions."""
        scale, zero_point = self.scale.to(torch.float64), self.zero_point.to(torch.int64)
        return per_channel_view(scale, ndim, self.axis), per_channel_view(zero_point, ndim, self.axis)


class QuantizeDequantize(StoredGrid):
    """The Q/DQ pair of an activation, with a clip of the codes between them if they do not fill 8 bits."""

    low: Tensor
    high: Tensor

    def __init__(self, grid: Grid, site: str) -> None:
        super().__init__(grid)
        self.site = site
        self.register_buffer("low", torch.tensor(grid.qmin, dtype=grid.storage))
        self.register_buffer("high", torch.tensor(grid.qmax, dtype=grid.storage))

    @property
    def clips(self) -> bool:
        """Whether the codes do not fill their type."""
        limits = torch.iinfo(self.zero_point.dtype)
        return (self.qmin, self.qmax) != (limits.min, limits.max)

    def clamp_codes(self, clamp: Clamp) -> bool:
        """Replace `x.clamp(*clamp)` by bounds of the codes; return False, without a change, for a grid per channel.

        This is exact: rounding is monotone, so clamping before rounding equals clamping to the rounded bound after it.
        """
        if self.scale.ndim:
            return False
        scale, zero_point = self.shaped(0)
        low, high = (None if b is None else int(torch.round(b / scale).to(torch.int64) + zero_point) for b in clamp)
        self.qmin = self.qmin if low is None else min(max(self.qmin, low), self.qmax)
        self.qmax = self.qmax if high is None else max(min(self.qmax, high), self.qmin)
        self.low.fill_(self.qmin)
        self.high.fill_(self.qmax)
        return True

    def forward(self, x: Tensor) -> Tensor:
        run = active_run()
        if run is not None:
            return quantized(run, self.site, self, x)
        codes = self._clipped(quantize_linear(x, self.scale, self.zero_point, self.axis, self.site))
        return dequantize_linear(codes, self.scale, self.zero_point, self.axis)

    def codes_of(self, quantized: Tensor) -> Tensor:
        """Return the codes (int64) of values on the grid."""
        scale, zero_point = self.shaped(quantized.ndim)
        return torch.round(quantized.to(torch.float64) / scale).to(torch.int64) + zero_point

    def _clipped(self, codes: Tensor) -> Tensor:
        if not self.clips:
            return codes
        if as_nodes():
            return node("Clip", (codes, self.low, self.high), codes.dtype, codes.shape)
        return codes.clamp(self.qmin, self.qmax)


class QuantizeTokens(nn.Module):
    """An activation with a grid per token, computed at run time: float operators and 8-bit codes in the file.

    ONNX's DynamicQuantizeLinear has one scale for the whole tensor, so it cannot be used. Codes are uint8 around 128,
    or int8 around 0 with `keep_signed`.
    """

    def __init__(self, n_bits: int, site: str, keep_signed: bool) -> None:
        super().__init__()
        self.n_bits, self.site, self.zero_point = n_bits, site, 0 if keep_signed else 128

    def forward(self, x: Tensor) -> Tensor:
        x = x.real() if isinstance(x, IntegerTensor) else x
        scale = token_scales(x, self.n_bits)
        steps = token_steps(x, scale, self.n_bits)
        run = active_run()
        if run is not None:
            end = largest_code(self.n_bits)
            exact = (x.to(torch.float64) / scale).clamp(-end, end) + self.zero_point
            codes = run.noted(self.site, steps.to(torch.int64) + self.zero_point, lambda: exact)
            return (codes - self.zero_point).to(x.dtype) * scale
        if as_nodes():
            kind, number = (torch.uint8, UINT8) if self.zero_point else (torch.int8, INT8)
            codes = node("Cast", (steps + self.zero_point,), kind, steps.shape, to=number, **{SITE: self.site})
            steps = node("Cast", (codes,), x.dtype, steps.shape, to=FLOAT) - self.zero_point
        return steps * scale

    def codes_of(self, quantized: Tensor) -> Tensor:
        """Return the codes (int64) of values on the grid."""
        steps = token_steps(quantized, token_scales(quantized, self.n_bits), self.n_bits)
        return steps.to(torch.int64) + self.zero_point


def acts_site(quantizer: Quantizer | None, site: str, keep_signed: bool) -> nn.Module:
    """Make the module that puts an activation on its grid, an identity if it has no quantizer."""
    if isinstance(quantizer, TokenQuantizer):
        return QuantizeTokens(quantizer.n_bits, site, keep_signed)
    return nn.Identity() if quantizer is None else grid_site(quantizer, site, keep_signed)


def grid_site(quantizer: Quantizer, site: str, keep_signed: bool = False) -> QuantizeDequantize:
    """Make the Q/DQ pair of an activation quantizer; `site` is "PATH.output" or "PATH.input". Raises ExportError."""
    path, _, kind = site.rpartition(".")
    grid = uniform_grid(quantizer, f"{path}: the {kind} quantizer ({type(quantizer).__name__})")
    return QuantizeDequantize(grid if keep_signed else grid.unsigned(), site)


class StoredWeight(StoredGrid, PassesForTensor):
    """A weight stored as 8-bit codes; forward returns the real weight, in the layout of its layer.

    `to_layer` converts the stored layout to that of the layer, where they differ. `table`: if given, the integers that
    the codes count in. `terms`: the weight in integers, in the layer's layout, with scales per output channel.
    """

    codes: Tensor
    table: Tensor | None

    def __init__(
        self,
        codes: Tensor,
        grid: Grid,
        terms: Terms,
        to_layer: Callable[[Tensor], Tensor] | None = None,
        table: Tensor | None = None,
    ) -> None:
        super().__init__(grid)
        self.register_buffer("codes", codes.to(grid.storage if table is None else torch.uint8))
        self.register_buffer("table", None if table is None else table.to(grid.storage))
        self.terms = terms
        self.to_layer = to_layer
        self.has_zero_point = bool(grid.zero_point.any())

    def fit_bias_range(self, bias: Tensor, input_scale: Tensor) -> None:
        """Raise scales so small that the bias exceeds 32 bits in their steps; lower the scales of all-zero channels.

        Next to such a bias the weights of the channel hardly matter; their codes are rounded to the larger steps. An
        all-zero channel has no scale of its own (1 stands for it), and its bias is stored in the finest steps.
        """
        if self.axis not in (None, 0) or self.table is not None or self.to_layer is not None or len(self.terms) != 1:
            return
        least = bias.abs().to(torch.float64) / (2.0**LARGEST_BIAS_BITS * input_scale)
        old = self.scale.to(torch.float64)
        least = least if self.axis == 0 else least.max()
        ints = self.terms[0][1]
        dead = (ints.flatten(1) == 0).all(1) if self.axis == 0 else (ints == 0).all()
        new = torch.where(dead & (least > 0), least, torch.maximum(old, least)).to(torch.float32)
        if torch.equal(new, self.scale):
            return
        ratio = per_channel_view(old / new, self.codes.ndim, self.axis)
        zero_point = per_channel_view(self.zero_point.to(torch.int64), self.codes.ndim, self.axis)
        ints = torch.round((self.codes.to(torch.int64) - zero_point) * ratio).to(torch.int64)
        self.codes.copy_((ints + zero_point).to(self.codes.dtype))
        self.scale.copy_(new)
        self.terms = ((new.to(torch.float64), ints),)

    def forward(self) -> Tensor:
        run = active_run()
        return self.real() if run is None else _in_integers(self.terms, self.real)

    def real(self) -> Tensor:
        return self.as_kept() if self.to_layer is None else self.to_layer(self.as_kept())

    def as_kept(self) -> Tensor:
        """Return the real weight in the layout of the codes."""
        return dequantize_linear(self._counted(self.codes), self.scale, self.zero_point, self.axis)

    def _counted(self, codes: Tensor) -> Tensor:
        return codes if self.table is None else look_up_linear(self.table, codes, None)

    def rows(self, index: Tensor) -> Tensor:
        if self.to_layer is not None:
            return super().rows(index)
        codes = self._counted(look_up_linear(self.codes, index, None))
        if self.axis is None:
            return dequantize_linear(codes, self.scale, self.zero_point, None)
        steps = codes.to(torch.float32)
        if self.has_zero_point:
            steps = steps - look_up_linear(self.zero_point, index, None).to(torch.float32).unsqueeze(-1)
        return steps * look_up_linear(self.scale, index, None).unsqueeze(-1)


def _in_integers(terms: Terms, real: Callable[[], Tensor]) -> Tensor:
    """Make a weight or bias for an integer run; the real one if it has no scale per tensor or output channel."""
    return IntegerTensor(Weight(terms, real), terms[0][1].shape) if terms else real()


class StoredTable(PassesForTensor):
    """A weight stored as codes and a float32 level for each code; forward returns the real weight, bit for bit."""

    codes: Tensor
    levels: Tensor
    first_levels: Tensor | None

    def __init__(self, table: Table, terms: Terms, to_layer: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.terms = terms
        self.to_layer = to_layer
        self.register_buffer("codes", table.codes.to(torch.uint8))
        levels = table.levels
        rows = None
        if levels.ndim == 2:
            rows = channel_view(torch.arange(len(levels)) * levels.shape[1], table.codes.ndim, table.axis)
        self.register_buffer("first_levels", rows)
        self.register_buffer("levels", levels.flatten())

    def forward(self) -> Tensor:
        run = active_run()
        return self.real() if run is None or not run.tables else _in_integers(self.terms, self.real)

    def real(self) -> Tensor:
        return self.to_layer(self.as_kept())

    def as_kept(self) -> Tensor:
        """Return the real weight in the layout of the codes."""
        return look_up_linear(self.levels, self.codes, self.first_levels)

    def rows(self, index: Tensor) -> Tensor:
        first = self.first_levels
        of_rows = None if first is None else first[0] if len(first) == 1 else look_up_linear(first, index, None)
        return look_up_linear(self.levels, look_up_linear(self.codes, index, None), of_rows)


class StoredBias(nn.Module):
    """A bias in 32-bit steps of input scale times weight scale; forward returns its real value. scale: () or (C,).

    In an integer run the layer adds the codes to its sums, and a model that adds the bias itself adds the real value.
    """

    codes: Tensor
    scale: Tensor

    def __init__(self, bias: Tensor, scale: Tensor, name: str) -> None:
        super().__init__()
        self.register_buffer("codes", bias_codes(bias, scale, name).to(torch.int32))
        self.register_buffer("scale", scale.to(torch.float32))

    def forward(self) -> Tensor:
        terms = ((self.scale.to(torch.float64), self.codes.to(torch.int64)),)
        return self._real() if active_run() is None else _in_integers(terms, self._real)

    def _real(self) -> Tensor:
        return dequantize_linear(self.codes, self.scale, None, 0 if self.scale.ndim else None)
