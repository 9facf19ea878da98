"""Fold batch norms permanently into their layers, so that a rounded weight stays exactly as it is."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from torchquant.qmodule import QWrapper
from torchquant.qmodule.bn_folding import running_bias, running_factor

FOLDED = "folded_statistics"
"""Attribute of a folded batch norm: mean and deviation of its outputs."""


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
        _keep_statistics(wrapper)
        folded, bias = slot.seen().detach().clone(), running_bias(wrapper.bn, wrapper.bias_in_use).detach().clone()
        _neutralize(wrapper.bn, bias)
        if getattr(wrapper.layer, "bias", None) is not None:
            wrapper.layer.bias.zero_()
        slot.set_weight(folded)
        wrapper.freeze_bn()
        done.append(path)
    return done


def statistics_of(wrapper: QWrapper) -> tuple[Tensor, Tensor] | None:
    """Return mean and deviation of each output channel by the batch norm, folded or not, (C,); None without one.

    They are those of the data that the network was trained on.
    """
    if wrapper.bn is None:
        return None
    if FOLDED in wrapper.bn.__dict__:
        mean, deviation = wrapper.bn.__dict__[FOLDED]
        return mean.clone(), deviation.clone()
    zero = torch.zeros(wrapper.bn.num_features)
    mean, deviation = (t if t is not None else zero + i for i, t in enumerate((wrapper.bn.bias, wrapper.bn.weight)))
    return mean.detach().clone(), deviation.detach().abs()


def set_statistics(wrapper: QWrapper, mean: Tensor, deviation: Tensor) -> None:
    """Keep mean and deviation of each output channel of a layer whose batch norm is folded, (C,)."""
    wrapper.bn.__dict__[FOLDED] = (mean, deviation)


def _keep_statistics(wrapper: QWrapper) -> None:
    """Keep what the batch norm knows of its outputs; one that is folded again has been scaled since."""
    kept = statistics_of(wrapper)
    assert kept is not None
    mean, deviation = kept
    if FOLDED in wrapper.bn.__dict__:
        factor = running_factor(wrapper.bn).detach().to(mean)
        mean, deviation = mean * factor, deviation * factor.abs()
    set_statistics(wrapper, mean, deviation)


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
