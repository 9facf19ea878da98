"""The deploy form of a model: every QModule replaced by one that holds codes instead of quantizers.

It is an ordinary module: run it to see in torch what the file will compute.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from torchquant.deploy.codes import Grid, fold_into_scale, layer_grid, uniform_grid
from torchquant.deploy.qdq import QuantizeDequantize, StoredWeight
from torchquant.errors import ExportError
from torchquant.qmodule import QModule, QOp, QWrapper
from torchquant.qmodule.bn_folding import running_bias, running_factor
from torchquant.quantizers import Quantizer


class DeployLayer(nn.Module):
    """A QWrapper as it computes in QUANT_EVAL, its weight stored as codes. `path` names it in messages."""

    def __init__(self, wrapper: QWrapper, path: str) -> None:
        super().__init__()
        self.bn = wrapper.bn
        self.activation = wrapper.activation
        self.input = _acts_site(wrapper.input_quantizer, f"{path}: the input quantizer")
        self.output = _acts_site(wrapper.acts_quantizer, f"{path}: the output quantizer")
        self.layer = wrapper.layer
        self.row = wrapper.row
        self.weight: StoredWeight | None = None
        self.bias: nn.Parameter | None = None
        if wrapper.weight_quantizer is not None:
            codes, grid, self.bn = _weight_codes(wrapper, wrapper.weight_quantizer, path)
            self.weight = StoredWeight(codes, grid)
            bias = getattr(wrapper.layer, "bias", None)
            if self.bn is None and wrapper.bn is not None:
                bias = running_bias(wrapper.bn, bias)
            self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
            self.layer = _without_weight(wrapper.layer)

    def forward(self, x: Tensor) -> Tensor:
        x = self.input(x)
        y = self.layer(x) if self.weight is None else self.row.run(self.layer, x, self.weight(), self.bias)
        y = y if self.bn is None else self.bn(y)
        return self.output(y if self.activation is None else self.activation(y))


class DeployOp(nn.Module):
    """A QOp as it computes in QUANT_EVAL."""

    def __init__(self, op: QOp, path: str) -> None:
        super().__init__()
        self.op = op.op
        self.activation = op.activation
        self.output = _acts_site(op.acts_quantizer, f"{path}: the output quantizer")

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        y = self.op(*args, **kwargs)
        return self.output(y if self.activation is None else self.activation(y))


@torch.no_grad()
def deploy_form(model: nn.Module) -> nn.Module:
    """A float32 CPU copy of the model in eval mode that computes QUANT_EVAL from stored 8-bit codes.

    Whatever state the QModules are in; a site without a quantizer stays float. Batch norms are folded
    where the codes can carry it exactly, and stay behind the layer where not. Raises ExportError for a
    model without QModules, a site that is not calibrated, has no uniform grid or needs more than 8
    bits, a model that is not float32, and for grouped transposed convolutions with a grid per channel.
    """
    if not any(isinstance(module, QModule) for module in model.modules()):
        raise ExportError(
            f"{type(model).__name__} has no QModule, so nothing in it is quantized. Wrap its layers in QWrapper and "
            "its operators in QOp, or use torch.onnx.export for a float model"
        )
    return _converted(copy.deepcopy(model).cpu().eval(), "", {})


def _converted(module: nn.Module, path: str, done: dict[nn.Module, nn.Module]) -> nn.Module:
    """`module` with every QModule below it replaced, children first; a module used twice stays one."""
    if module not in done:
        for name, child in module._modules.items():
            if child is not None:
                module._modules[name] = _converted(child, f"{path}.{name}" if path else name, done)
        done[module] = _replacement(module, path or type(module).__name__)
    return done[module]


def _replacement(module: nn.Module, path: str) -> nn.Module:
    if isinstance(module, QWrapper):
        return DeployLayer(module, path)
    if isinstance(module, QOp):
        return DeployOp(module, path)
    if isinstance(module, QModule):
        raise ExportError(
            f"{path}: {type(module).__name__} is neither a QWrapper nor a QOp; only these two can be exported. "
            "Build the module from them"
        )
    return module


def _acts_site(quantizer: Quantizer | None, name: str) -> nn.Module:
    if quantizer is None:
        return nn.Identity()
    return QuantizeDequantize(uniform_grid(quantizer, f"{name} ({type(quantizer).__name__})"))


def _weight_codes(wrapper: QWrapper, quantizer: Quantizer, path: str) -> tuple[Tensor, Grid, nn.Module | None]:
    """(codes in the layout of the layer, their grid, the batch norm that is left to run)."""
    name = f"{path}: the weight quantizer ({type(quantizer).__name__})"
    weight = wrapper.float_weight()
    if weight.dtype != torch.float32:
        raise ExportError(f"{path}: the weight is {weight.dtype}, but files are written in float32. Call model.float()")
    grid, layer, row = uniform_grid(quantizer, name), wrapper.layer, wrapper.row
    if grid.axis is not None:
        grid = replace(grid, axis=grid.axis % weight.ndim)
    codes = quantizer.encode(weight)
    bn = None if wrapper.fold_mode else wrapper.bn
    if bn is not None and _can_fold(bn, layer):
        folded = fold_into_scale(codes, grid, running_factor(bn))
        stored = None if folded is None else layer_grid(folded[1], layer, row)
        if folded is not None and stored is not None:
            return row.channels_first(layer, folded[0]), stored, None
    stored = layer_grid(grid, layer, row)
    if stored is None:
        raise ExportError(
            f"{name} has a scale of its own for each output channel, but ONNX stores the weight of a transposed "
            f"convolution with groups={layer.groups} so that its groups share their scales. Use an observer with "
            "axis=None here"
        )
    return row.channels_first(layer, codes), stored, bn


def _can_fold(bn: nn.Module, layer: nn.Module) -> bool:
    """Whether the batch norm acts on the output channels: not sure for Linear, whose input may be (N, C, L)."""
    return bn.running_mean is not None and not isinstance(layer, nn.Linear)


def _without_weight(layer: Any) -> nn.Module:
    """A copy that keeps the geometry of the layer, but not its float weight."""
    empty = nn.Parameter(layer.weight.new_empty(0), requires_grad=False)
    return copy.deepcopy(layer, {id(layer.weight): empty})
