"""The plain training loop: AdamW, one cycle of the learning rate; a stopped one goes on where it was."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from torchquant._arguments import checked, one_number
from torchquant._files import write_whole
from torchquant._shown import shown
from torchquant.errors import ConfigError
from torchquant.graph.watch import call_with
from torchquant.qmodule import QModuleState
from torchquant.utils import observe_weights, quantizer_parameters, set_qmodule_state

OnEpoch = Callable[[int, float], None]
"""Called after each epoch with its number, from 1, and its mean loss."""
Loss = Callable[[Any, Any], Tensor]
"""(outputs, targets) -> ()."""


@checked
def fit(
    model: nn.Module,
    batches: Callable[[], Iterable[tuple[Any, Any]]],
    epochs: int,
    learning_rate: float,
    steps_per_epoch: int,
    loss: Loss = F.cross_entropy,
    on_epoch: OnEpoch | None = None,
    progress: Path | None = None,
    generator: torch.Generator | None = None,
    warm_up: float = 0.3,
) -> None:
    """Train with AdamW and a one-cycle learning rate, in the state the model is in; leaves it in eval mode.

    `batches()` gives the (inputs, targets) of an epoch, at most `steps_per_epoch`. What quantizers learn has no weight
    decay. `progress`: a file that keeps where the training is after each epoch; if it is there already, training goes
    on from it and ends with the same numbers, bit for bit. `generator`: what `batches` draws from, kept there too.
    `warm_up`: share of the steps in which the rate rises.
    With torch.distributed gradients are averaged over the ranks, and the first one writes `progress`, which all read.
    Raises ConfigError for no epochs or no batches.

    >>> net = nn.Linear(2, 2)
    >>> data = [(torch.randn(4, 2), torch.zeros(4, dtype=torch.int64))]
    >>> fit(net, lambda: data, epochs=2, learning_rate=1e-2, steps_per_epoch=1)
    """
    if epochs < 1 or steps_per_epoch < 1:
        raise ConfigError(f"epochs and steps_per_epoch must be at least 1, got {epochs} and {steps_per_epoch}")
    if not 0.0 < learning_rate < math.inf or not 0.0 < warm_up < 1.0:
        raise ConfigError(
            f"learning_rate must be above 0 and finite, warm_up between 0 and 1; got {learning_rate} and {warm_up}"
        )
    module = across_ranks(model)
    learned = quantizer_parameters(model)
    of_quantizers = set(map(id, learned["params"]))
    weights = {"params": [p for p in model.parameters() if id(p) not in of_quantizers]}
    groups = [weights, learned] if of_quantizers else [weights]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=epochs * steps_per_epoch, pct_start=warm_up
    )
    model.train()
    first = 1
    if progress is not None and progress.exists():
        saved = torch.load(progress, weights_only=True, map_location="cpu")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        if generator is not None:
            generator.set_state(saved["batches"])
        set_random_state(saved["random"])
        first = int(saved["epoch"]) + 1
    for epoch in range(first, epochs + 1):
        losses = []
        for x, target in _pairs(batches()):
            value = one_number(loss(call_with(module, x, "a batch"), target), "the loss")
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
            losses.append(value.detach())
        if not losses:
            raise ConfigError("there are no batches to train on")
        if progress is not None and is_first_rank():
            saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            saved |= {"schedule": schedule.state_dict(), "epoch": epoch, "random": random_state()}
            saved |= {} if generator is None else {"batches": generator.get_state()}
            write_whole(progress, partial(torch.save, saved))
        if on_epoch is not None:
            on_epoch(epoch, float(torch.stack(losses).mean()))
    model.eval()


def _pairs(batches: object) -> Iterator[tuple[Any, Any]]:
    """The batches of an epoch; raises ConfigError for one that is no pair."""
    if not isinstance(batches, Iterable):
        raise ConfigError(f"batches() must give (inputs, targets) pairs, got {shown(batches)}")
    for i, batch in enumerate(batches):
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise ConfigError(f"batch {i} must be (inputs, targets), got {shown(batch)}")
        yield batch[0], batch[1]


def epochs_done(progress: Path | None) -> int:
    """How many epochs a file of progress has behind it; 0 without one."""
    if progress is None or not progress.exists():
        return 0
    return int(torch.load(progress, weights_only=True, map_location="cpu")["epoch"])


def across_ranks(model: nn.Module) -> nn.Module:
    """The model in DistributedDataParallel; itself without a process group, or if that is what it is."""
    if not (dist.is_available() and dist.is_initialized()) or isinstance(model, DistributedDataParallel):
        return model
    return DistributedDataParallel(model, find_unused_parameters=True)


def random_state() -> list[Tensor]:
    """Of torch's own generators: the CPU's, then those of the GPUs."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]


def set_random_state(states: list[Tensor]) -> None:
    """Bring the generators to what `random_state` gave; GPUs only if there are as many."""
    torch.set_rng_state(states[0])
    if len(states) > 1 and torch.cuda.device_count() == len(states) - 1:
        torch.cuda.set_rng_state_all(states[1:])


def is_first_rank() -> bool:
    """Whether this process is the one that writes."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


@checked
def fit_quantized(model: nn.Module, *args: Any, **options: Any) -> None:
    """`fit` with quantizers on, then bring the weight ranges up to date; the model ends in QUANT_EVAL."""
    set_qmodule_state(model, QModuleState.QUANT_AWARE_TRAIN)
    fit(model, *args, **options)
    observe_weights(model)
    set_qmodule_state(model, QModuleState.QUANT_EVAL)
