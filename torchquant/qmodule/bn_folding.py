"""Forward passes of a layer whose batch norm is folded into its weight (docs/algorithms.md D2).

The training modes differ in what the network computes while the running statistics, which the
deployed weight contains, still change. In the table, `B` is batch statistics, `R` running
statistics, `Q` the weight quantizer (or nothing), `f` the fold factor gamma / sigma.

| mode | forward in training | layer runs |
|---|---|---|
| running | update R by the float layer; `y = conv(x, Q(W f_R)) + bias_R` | 2 |
| batch | update R; `y = conv(x, Q(W f_B)) + bias_B`, gradients through the batch statistics | 2 |
| corrected | update R; `y = conv(x, Q(W f_R)) * sigma_R / sigma_B + bias_B` | 2 |
| rescale | `y = BN(conv(x, Q(W f_R) / f_R) + b)`, which also updates R | 1 |

With the batch norm frozen or in eval mode all of them are `conv(x, Q(W f_R)) + bias_R`.
Sources: running, NNI 3.0; batch, Jacob et al. 2018 (arXiv:1712.05877) figure C8; corrected,
Krishnamoorthi 2018 (arXiv:1806.08342) section 3.2.2; rescale, the ConvBn modules of torch.ao, which divide the
result: the same but for rounding, and the weight is the smaller tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from torchquant.errors import ConfigError
from torchquant.quantizers_functional.bn_fold import bn_sigma, channel_view, fold_bias, fold_factor

FOLD_MODES = ("running", "batch", "corrected", "rescale")


class RunScaled(Protocol):
    """Runs the layer with its weight times `factor` (C,), quantized; `unfolds`: and divided by it again."""

    def __call__(self, x: Tensor, factor: Tensor, bias: Tensor | None, unfolds: bool = False) -> Tensor: ...


def check_fold(fold_bn: bool | str, bn: _BatchNorm | None, out_channels: int) -> str | None:
    """Return the fold mode that `fold_bn` names, None for no folding. Raises ConfigError."""
    if fold_bn is False:
        return None
    mode = "corrected" if fold_bn is True else fold_bn
    if mode not in FOLD_MODES:
        raise ConfigError(f"fold_bn must be False, True or one of {', '.join(FOLD_MODES)}, got {fold_bn!r}")
    if bn is None:
        return None
    if not bn.track_running_stats or bn.running_mean is None:
        raise ConfigError("a batch norm with track_running_stats=False has nothing to fold; use fold_bn=False")
    if bn.num_features != out_channels:
        raise ConfigError(f"the layer has {out_channels} output channels, its batch norm {bn.num_features}")
    return mode


def running_sigma(bn: _BatchNorm) -> Tensor:
    """Compute sigma_R, (C,)."""
    assert bn.running_var is not None
    return bn_sigma(bn.running_var, bn.eps)


def running_factor(bn: _BatchNorm) -> Tensor:
    """Compute gamma / sigma_R, (C,)."""
    return fold_factor(bn.weight, running_sigma(bn))


def running_bias(bn: _BatchNorm, bias: Tensor | None) -> Tensor:
    """Compute the bias of the layer folded with running statistics, (C,)."""
    assert bn.running_mean is not None
    return fold_bias(bias, bn.running_mean, running_factor(bn), bn.bias)


def folded_forward(
    mode: str, run: RunScaled, run_float: Callable[[Tensor], Tensor], bn: _BatchNorm, bias: Tensor | None, x: Tensor
) -> Tensor:
    """Compute the output of layer + batch norm with the folded, quantized weight. `run_float` is the plain layer."""
    if not bn.training:
        return run(x, running_factor(bn), running_bias(bn, bias))
    if mode == "rescale":
        sigma = running_sigma(bn)
        factor = fold_factor(bn.weight, sigma)
        factor = torch.where(factor == 0, sigma.reciprocal(), factor)
        y = run(x, factor, None, True)
        return bn(y if bias is None else y + channel_view(bias, y.ndim))
    if mode == "running":
        with torch.no_grad():
            bn(run_float(x))
        return run(x, running_factor(bn), running_bias(bn, bias))
    float_output = run_float(x)
    with torch.no_grad():
        bn(float_output)
    var, mean = torch.var_mean(float_output, [d for d in range(float_output.ndim) if d != 1], correction=0)
    batch_sigma = bn_sigma(var, bn.eps)
    batch_factor = fold_factor(bn.weight, batch_sigma)
    batch_bias = fold_bias(bias, mean, batch_factor, bn.bias)
    if mode == "batch":
        return run(x, batch_factor, batch_bias)
    correction = running_sigma(bn) / batch_sigma
    y = run(x, running_factor(bn), None)
    return y * channel_view(correction, y.ndim) + channel_view(batch_bias, y.ndim)
