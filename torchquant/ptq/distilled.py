"""Inputs made up to match what the batch norms of a model remember."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from torchquant._arguments import checked
from torchquant._modes import in_mode
from torchquant._shown import shown
from torchquant.errors import ConfigError
from torchquant.ptq.functional.without_data import statistics_error


@checked
def distilled_inputs(
    model: nn.Module,
    shape: tuple[int, ...],
    n_batches: int = 1,
    steps: int = 500,
    learning_rate: float = 0.1,
    seed: int = 0,
) -> list[Tensor]:
    """Make batches of inputs, from noise, for which a float model has the statistics that its batch norms remember.

    shape: of one batch, of (N, ...) real numbers, 32 images for example. The mean and the deviation of what each batch
    norm reads, and 0 and 1 of the inputs, are matched by Adam. Use them where there are no data, as the batches of
    `calibrate` and of `run`. Give the float model, before its batch norms are folded. It is not changed. Raises
    ConfigError for a model without batch norms. Source: Cai et al. 2020, arXiv:2001.00281.

    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    >>> [x.shape for x in distilled_inputs(net, (8, 1, 6, 6), n_batches=2, steps=3)]
    [torch.Size([8, 1, 6, 6]), torch.Size([8, 1, 6, 6])]
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    norms = [m for m in dict.fromkeys(norms) if "folded_statistics" not in m.__dict__]
    if not norms:
        raise ConfigError(
            f"{type(model).__name__} has no batch norm that could tell of its inputs; give real batches, or the float "
            "model before its batch norms are folded"
        )
    if len(shape) < 2 or shape[0] < 2:
        raise ConfigError(f"shape must be that of a batch of at least 2 inputs, (N, ...), got {tuple(shape)}")
    if n_batches < 1 or steps < 0 or not 0.0 < learning_rate < float("inf"):
        raise ConfigError(
            "n_batches must be at least 1, steps at least 0 and learning_rate a finite number above 0, got "
            f"{shown(n_batches)}, {shown(steps)} and {shown(learning_rate)}"
        )
    generator = torch.Generator().manual_seed(seed)
    first = next(iter(model.parameters()))
    made = []
    with in_mode(False, model):
        for _ in range(n_batches):
            start = torch.randn(shape, generator=generator).to(first)
            made.append(_matched(model, norms, start, steps, learning_rate))
    return made


def _matched(model: nn.Module, norms: list[_BatchNorm], start: Tensor, steps: int, learning_rate: float) -> Tensor:
    """Change one batch so that the norms read what they remember."""
    errors: list[Tensor] = []

    def read(norm: nn.Module, args: Any) -> None:
        assert isinstance(norm, _BatchNorm)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        errors.append(statistics_error(args[0], norm.running_mean, (norm.running_var + norm.eps).sqrt()))

    handles = [norm.register_forward_pre_hook(read) for norm in norms]
    x = start.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([x], lr=learning_rate)
    zero, one = start.new_zeros(start.shape[1]), start.new_ones(start.shape[1])
    try:
        for _ in range(steps):
            errors.clear()
            with torch.enable_grad():
                model(x)
                loss = torch.stack([*errors, statistics_error(x, zero, one)]).sum()
                (x.grad,) = torch.autograd.grad(loss, [x])
            optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    return x.detach()
