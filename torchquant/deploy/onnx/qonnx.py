"""Export QONNX: `Quant` nodes of any width, for FPGA compilers (Pappalardo et al. 2022, arXiv:2206.07527)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchquant._arguments import checked
from torchquant._files import write_whole
from torchquant.deploy.lowering.deploy_form import deploy_form
from torchquant.deploy.lowering.qdq import (
    QuantizeDequantize,
    QuantizeTokens,
    StoredGrid,
    StoredTable,
    StoredWeight,
    as_nodes,
    node,
)
from torchquant.deploy.lowering.stand_in import PassesForTensor, leave_out
from torchquant.deploy.lowering.stored_groups import StoredGroups
from torchquant.deploy.lowering.weights_form import DeployWeights
from torchquant.deploy.onnx.export import checked_inputs, describe, exported, tell_of_left_out
from torchquant.errors import ExportError, require
from torchquant.graph.recording import call_with
from torchquant.graph.traced import reseal

DOMAIN = "qonnx.custom_op.general"


@checked
@torch.no_grad()
def export_qonnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Tensor | Sequence[Tensor],
    dynamic_batch: bool = False,
) -> Path:
    """Write a calibrated model as QONNX for FINN, hls4ml and similar compilers. Returns its path.

    Each quantizer is a `Quant` node with its true width, signed or not, narrow or not; weights are float32 constants on
    the grid before their node, as the dialect requires. Batch norms are folded, biases stay float32. Arguments are as
    in `export_onnx`; the batch size is fixed unless `dynamic_batch`, since FPGA compilers need it fixed. `Quant` adds
    the zero point before it rounds, ONNX after: at an exact tie with an odd zero point the codes differ by one. Needs
    the extra `deploy`; the package qonnx runs the file. Raises ExportError for weights whose levels are not uniform,
    ConfigError, MissingDependencyError.
    """
    for package in ("onnx", "onnxscript"):
        require(package, "deploy")
    inputs = checked_inputs(example_inputs)
    form = deploy_form(model, keep_signed=True)
    tell_of_left_out(leave_out(form, lambda: call_with(form, inputs)))
    reseal(form)
    for name, module in list(form.named_modules()):
        for child_name, child in list(module.named_children()):
            setattr(module, child_name, _quant_of(child, f"{name}.{child_name}".lstrip(".")))
    proto = exported(form, inputs, dynamic_batch)
    for entry in proto.opset_import:
        if entry.domain == DOMAIN:
            entry.version = 1
    describe(proto, model, {"torchquant_dialect": "qonnx"})
    require("onnx", "deploy").checker.check_model(proto)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    return write_whole(target, lambda temporary: temporary.write_bytes(proto.SerializeToString()))


def _quant_of(module: nn.Module, path: str) -> nn.Module:
    if isinstance(module, DeployWeights):
        raise ExportError(
            f"{path}: QONNX export supports convolutions and linear layers only, got {type(module.layer).__name__}. "
            "Leave this site float, or use export_onnx"
        )
    if isinstance(module, StoredTable):
        raise ExportError(
            f"{path}: QONNX has uniform quantizers only, but the levels of this weight are not 8-bit integers "
            "times a scale. Use another scheme here, or export_onnx, which writes them as a table"
        )
    if isinstance(module, StoredGroups):
        raise ExportError(
            f"{path}: QONNX is written with one scale per tensor or channel, and this weight has one for each group or "
            "block. Use a scheme without /group and /block here, or export_onnx"
        )
    if isinstance(module, QuantizeTokens):
        raise ExportError(
            f"{module.site}: QONNX has no quantizers with a scale per token. Use a calibrated scheme such as affine:8 "
            "here, or export_onnx, which writes the scale of each token as float operators"
        )
    if isinstance(module, StoredWeight):
        return _QuantWeight(module, path)
    return _QuantActivation(module) if isinstance(module, QuantizeDequantize) else module


class _Quant(nn.Module):
    """A `Quant` node: `(clamp(round(x / scale + zero_point)) - zero_point) * scale`, clamped to the range of `bits`."""

    scale: Tensor
    zero_point: Tensor
    bits: Tensor

    def __init__(self, grid: StoredGrid, ndim: int) -> None:
        super().__init__()
        scale, zero_point = grid.shaped(ndim)
        self.signed = grid.qmin < 0
        n_bits = next(
            n for n in range(1, 10) if grid.qmax < 2 ** (n - self.signed) and grid.qmin >= -self.signed * 2 ** (n - 1)
        )
        ends = (-self.signed * 2 ** (n_bits - 1), 2 ** (n_bits - self.signed) - 1)
        self.narrow = self.signed and (grid.qmin, grid.qmax) == (ends[0] + 1, ends[1])
        self.full = self.narrow or (grid.qmin, grid.qmax) == ends
        self.register_buffer("scale", scale.to(torch.float32))
        self.register_buffer("zero_point", zero_point.to(torch.float32))
        self.register_buffer("bits", torch.tensor(float(n_bits)))

    def quant(self, x: Tensor) -> Tensor:
        settings = {"signed": int(self.signed), "narrow": int(self.narrow), "rounding_mode": "ROUND"}
        inputs = (x, self.scale, self.zero_point, self.bits)
        return node(f"{DOMAIN}::Quant", inputs, torch.float32, x.shape, **settings)


class _QuantActivation(_Quant):
    def __init__(self, site: QuantizeDequantize) -> None:
        if site.scale.ndim:
            raise ExportError(
                f"{site.site}: QONNX export supports one scale per activation only; use an observer without axis"
            )
        super().__init__(site, 0)
        self.site = site
        self.ends = [float((code - self.zero_point) * self.scale) for code in (site.qmin, site.qmax)]

    def forward(self, x: Tensor) -> Tensor:
        if not as_nodes():
            real: Tensor = self.site(x)
            return real
        return self.quant(x if self.full else x.clamp(*self.ends))


class _QuantWeight(_Quant, PassesForTensor):
    on_grid: Tensor

    def __init__(self, weight: StoredWeight, path: str) -> None:
        real = weight()
        if weight.to_layer is not None and weight.axis is not None:
            raise ExportError(
                f"{path}: QONNX has no transposed convolution with groups and scales per channel; use one scale"
            )
        super().__init__(weight, real.ndim)
        self.register_buffer("on_grid", real)

    def real(self) -> Tensor:
        return self.quant(self.on_grid) if as_nodes() else self.on_grid

    def forward(self) -> Any:
        return self.real()
