"""Fold batch norms permanently into their layers, so that a rounded weight stays exactly as it is."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from torchquant.qmodule import QWrapper
from torchquant.qmodule.bn_folding import running_bias, running_factor


@torch.no_grad()
def fold_for_good(layers: Mapping[str, QWrapper]) -> list[str]:
    """Fold the batch norm of each layer with folding on into its weight. Returns the paths of the layers that had one.

    The batch norm stays, with the factor 1 and the folded bias, and is frozen: on batch statistics it would compute
    something else. State dicts keep their keys. A layer whose batch norm is already permanently folded is not changed.
    """
    done = []
    for path, wrapper in layers.items():
        if wrapper.fold_mode is None or bool((running_factor(wrapper.bn) == 1).all()):
            continue
        slot = wrapper.weight_slots()[0]
        folded, bias = slot.seen().detach().clone(), running_bias(wrapper.bn, wrapper.bias_in_use).detach().clone()
        _neutralize(wrapper.bn, bias)
        if getattr(wrapper.layer, "bias", None) is not None:
            wrapper.layer.bias.zero_()
        slot.set_weight(folded)
        wrapper.freeze_bn()
        done.append(path)
    return done


def _neutralize(bn: _BatchNorm, bias: Tensor) -> None:
    """Reduce the batch norm to adding the bias."""
    assert bn.running_mean is not None
    assert bn.running_var is not None
    bn.running_mean.zero_()
    bn.running_var.fill_(1.0 - bn.eps)
    if bn.weight is None or bn.bias is None:
        bn.weight, bn.bias = torch.nn.Parameter(torch.ones_like(bias)), torch.nn.Parameter(torch.zeros_like(bias))
    bn.weight.fill_(1.0)
    bn.bias.copy_(bias)
    bn.weight.div_(running_factor(bn))  # undoes the rounding error of adding eps
