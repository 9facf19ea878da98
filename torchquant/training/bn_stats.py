"""Estimate batch norm statistics again for the trained network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from torchquant._arguments import checked
from torchquant._modes import in_mode
from torchquant.errors import ConfigError
from torchquant.graph.recording import call_with
from torchquant.qmodule import QModuleState
from torchquant.utils import observe_weights, qmodule_state


@checked
@torch.no_grad()
def reestimate_bn(model: nn.Module, batches: Iterable[Any], state: QModuleState = QModuleState.QUANT_EVAL) -> int:
    """Estimate the running mean and variance of every batch norm again, with the current quantized weights.

    During quantization-aware training the running statistics lag behind weights that jump between levels; Nagel et al.
    2022 (arXiv:2203.11086) found that this causes most of the loss at low bit widths. `batches`: inputs (a tensor, or a
    dictionary of arguments), or tuples that begin with them; each passes through the model once in `state`. The mean
    over the batches replaces the statistics. Parameters, ranges, modes and states do not change. Returns the number of
    batches. Raises ConfigError if there are none.

    >>> from torchquant import QWrapper
    >>> model = QWrapper([nn.Linear(2, 2), nn.BatchNorm1d(2)], None, None)
    >>> reestimate_bn(model, [torch.randn(8, 2) for _ in range(4)])
    4
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    seen: dict[int, list[Tensor]] = {id(norm): [] for norm in norms}

    def measure(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].detach()
        var, mean = torch.var_mean(x, [d for d in range(x.ndim) if d != 1])
        seen[id(norm)].append(torch.stack([mean, var]))

    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    hooks = [norm.register_forward_pre_hook(measure) for norm in norms]
    n_batches = 0
    try:
        with in_mode(False, model), qmodule_state(model, state):
            for norm in norms:
                norm.train()
                norm.momentum = 0.0
                norm.num_batches_tracked = None
            for batch in batches:
                inputs = batch[0] if isinstance(batch, tuple | list) and batch else batch
                call_with(model, inputs if isinstance(inputs, Mapping) else (inputs,), "a batch")
                n_batches += 1
    finally:
        for hook in hooks:
            hook.remove()
        for norm, (momentum, tracked) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, tracked
    if n_batches == 0:
        raise ConfigError("reestimate_bn needs at least one batch, got none")
    for norm in norms:
        if seen[id(norm)]:
            assert norm.running_mean is not None
            assert norm.running_var is not None
            mean, var = torch.stack(seen[id(norm)]).mean(0)
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(var)
    observe_weights(model)  # a folded weight depends on the new statistics
    return n_batches
