"""Rows of QWrapper's table for layers of other packages, which are not imported here.

efficientnet_pytorch's `Swish` is `nn.SiLU`, which has a row already.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from torchquant.qmodule import ActivationRow, InputFirstRow, LayerRow, register_pattern


def _run_unpadded(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # not layer._conv_forward: these layers ignore padding_mode
    return F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)


def _run_static(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _run_unpadded(layer, layer.static_padding(x), weight, bias)


def _run_dynamic(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    height, width = (
        max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
        for size, kernel, stride, dilation in zip(
            x.shape[-2:], layer.kernel_size, layer.stride, layer.dilation, strict=True
        )
    )
    if height > 0 or width > 0:
        x = F.pad(x, [width // 2, width - width // 2, height // 2, height - height // 2])
    return _run_unpadded(layer, x, weight, bias)


register_pattern("efficientnet_pytorch.utils.Conv2dStaticSamePadding", LayerRow(_run_static, nn.BatchNorm2d))
register_pattern("efficientnet_pytorch.utils.Conv2dDynamicSamePadding", LayerRow(_run_dynamic, nn.BatchNorm2d))
register_pattern("efficientnet_pytorch.utils.MemoryEfficientSwish", ActivationRow())
for _name in ("GELUActivation", "NewGELUActivation", "FastGELUActivation", "QuickGELUActivation", "SiLUActivation"):
    register_pattern(f"transformers.activations.{_name}", ActivationRow())
for _name in ("GELU", "GELUTanh", "Sigmoid", "Tanh", "Swish", "Mish", "HardSwish", "HardSigmoid", "PReLU"):
    register_pattern(f"timm.layers.activations.{_name}", ActivationRow())
register_pattern("timm.layers.conv2d_same.Conv2dSame", LayerRow(batch_norm=nn.BatchNorm2d))
register_pattern("timm.layers.linear.Linear", LayerRow(batch_norm=nn.BatchNorm1d))
register_pattern("transformers.pytorch_utils.Conv1D", InputFirstRow())
