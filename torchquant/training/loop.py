"""The training loop: AdamW with a one-cycle learning rate; a stopped training resumes where it was."""

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
from torchquant._files import read_saved, reading, write_whole
from torchquant._shown import shown
from torchquant.errors import ConfigError
from torchquant.graph.recording import call_with
from torchquant.qmodule import QModuleState
from torchquant.training.amp import grad_scaler, mixed_precision
from torchquant.training.batches import check_batches, count, is_first_rank, pair_of, place, progress_bar, taken
from torchquant.training.distillation import Distillation, teaching
from torchquant.training.monitor import Monitor
from torchquant.utils import observe_weights, quantizer_parameters, set_qmodule_state

OnEpoch = Callable[[int, float], None]
"""Called after each epoch with its number, from 1, and its mean loss."""
Loss = Callable[[Any, Any], Tensor]
"""(outputs, targets) -> the loss, a tensor with one number."""
AFRESH = "delete it to train from the start"


@checked
def fit(
    model: nn.Module,
    batches: Callable[[], Iterable[tuple[Any, Any]]] | Iterable[Any],
    epochs: int,
    learning_rate: float,
    steps_per_epoch: int | None = None,
    loss: Loss = F.cross_entropy,
    on_epoch: OnEpoch | None = None,
    progress: Path | None = None,
    generator: torch.Generator | None = None,
    warm_up: float = 0.3,
    state: QModuleState | None = None,
    max_batches: int | None = None,
    device: str | torch.device | None = None,
    show_progress: bool | None = None,
    teacher: nn.Module | Distillation | None = None,
    monitor: Monitor | None = None,
    amp: str | None = None,
    compiled: bool = False,
) -> None:
    """Train with AdamW and a one-cycle learning rate; leaves the model in eval mode.

    `batches`: (inputs, targets) pairs for every epoch, such as a list or a DataLoader, or a function that returns the
    pairs of an epoch; at most `max_batches` of them are used. `steps_per_epoch`: the largest number of steps of an
    epoch, for the learning rate; None: the length of `batches`. The numbers that quantizers learn have no weight decay.
    `state`: the state for the training, such as QUANT_AWARE_TRAIN; afterwards the weight ranges are updated and the
    model is in QUANT_EVAL. None: the current state of the model, which does not change. `progress`: a file in which the
    training is saved after each epoch; if it exists, training resumes from it and ends with the same numbers, bit for
    bit. `generator`: the generator of `batches`, saved there too. `warm_up`: share of the steps in which the rate
    rises. `device`: the device for the model and the batches; None: that of the model. `show_progress`: a progress bar;
    None: one if `on_epoch` is not given, rich is installed, and the output is a terminal. `teacher`: a model, such as
    the float one, whose predictions are learned too; a `Distillation` says how. `monitor`: a monitor of the model; it
    gets the loss of each step, and its state is saved in `progress`. `amp`: mixed precision, "bf16" or "fp16"; fp16
    scales gradients, and does not step where they overflow. `compiled`: train with `torch.compile`, which takes a
    while at first; the model itself stays as it is. With torch.distributed, gradients are averaged
    over the ranks; the first rank writes `progress`, and all ranks read it. Raises ConfigError for no epochs or no
    batches.

    >>> net = nn.Linear(2, 2)
    >>> data = [(torch.randn(4, 2), torch.zeros(4, dtype=torch.int64))]
    >>> fit(net, data, epochs=2, learning_rate=1e-2)
    """
    check_batches(batches, max_batches)
    n_steps = _steps(batches, epochs, steps_per_epoch, max_batches)
    if not 0.0 < learning_rate < math.inf or not 0.0 < warm_up < 1.0:
        raise ConfigError(
            f"learning_rate must be above 0 and finite, warm_up between 0 and 1; got {learning_rate} and {warm_up}"
        )
    where = place(model, device)
    if state is not None:
        set_qmodule_state(model, state)
    module = across_ranks(model)
    if compiled:
        module = torch.compile(module)  # type: ignore[assignment]
    scaler = grad_scaler(amp, where)
    course = _Course(model, learning_rate, epochs * n_steps, warm_up, generator, monitor, scaler)
    model.train()
    first = 1 + (0 if progress is None or not progress.exists() else course.resume(progress))
    n_left = (epochs - first + 1) * n_steps
    with (
        progress_bar("training", n_left, show_progress, on_epoch) as advance,
        teaching(model, teacher, where) as lesson,
    ):
        for epoch in range(first, epochs + 1):
            losses = []
            stream = taken(_of_epoch(batches), max_batches, where)
            for inputs, targets in (pair_of(batch, i) for i, batch in enumerate(stream)):
                with mixed_precision(amp, where):
                    outputs = call_with(module, inputs, "a batch")
                    value = lesson(one_number(loss(outputs, targets), "the loss"), outputs, inputs)
                course.step(value)
                losses.append(value.detach())
                advance()
            if not losses:
                raise ConfigError("there are no batches to train on; give at least one")
            if progress is not None and is_first_rank():
                course.keep(progress, epoch)
            if on_epoch is not None:
                on_epoch(epoch, float(torch.stack(losses).mean()))
    if monitor is not None:
        monitor.flush()
    model.eval()
    if state is not None:
        observe_weights(model)
        set_qmodule_state(model, QModuleState.QUANT_EVAL)


@checked
def fit_quantized(model: nn.Module, *args: Any, **options: Any) -> None:
    """Do the same as `fit` with quantizers on (`state` defaults to QUANT_AWARE_TRAIN). The model ends in QUANT_EVAL."""
    fit(model, *args, **{"state": QModuleState.QUANT_AWARE_TRAIN} | options)


class _Course:
    """The parts of a training that change step by step: the model, the optimizer, the learning rate."""

    def __init__(
        self,
        model: nn.Module,
        learning_rate: float,
        n_steps: int,
        warm_up: float,
        generator: torch.Generator | None,
        monitor: Monitor | None,
        scaler: torch.amp.GradScaler,
    ) -> None:
        learned = quantizer_parameters(model)
        of_quantizers = set(map(id, learned["params"]))
        weights = {"params": [p for p in model.parameters() if id(p) not in of_quantizers]}
        groups = [weights, learned] if of_quantizers else [weights]
        self.model, self.generator, self.monitor, self.scaler = model, generator, monitor, scaler
        self.optimizer = torch.optim.AdamW(groups, lr=learning_rate, weight_decay=1e-2)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, learning_rate, total_steps=n_steps, pct_start=warm_up
        )

    def step(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        before = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.get_scale() >= before:  # otherwise gradients overflowed, and there was no step
            self.schedule.step()
        if self.monitor is not None:
            self.monitor.step({"loss": loss})

    def keep(self, progress: Path, epoch: int) -> None:
        """Write everything that is needed to resume after the epoch."""
        saved: dict[str, Any] = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        saved |= {"schedule": self.schedule.state_dict(), "epoch": epoch, "random": random_state()}
        saved |= {"scaler": self.scaler.state_dict()} if self.scaler.is_enabled() else {}
        saved |= {} if self.generator is None else {"batches": self.generator.get_state()}
        saved |= {} if self.monitor is None else {"monitor": self.monitor.state_dict()}
        write_whole(progress, partial(torch.save, saved))

    def resume(self, progress: Path) -> int:
        """Resume from a file of `keep`; return the number of finished epochs."""
        with reading(progress, AFRESH):
            saved = read_saved(progress)
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.schedule.load_state_dict(saved["schedule"])
            if self.scaler.is_enabled():
                self.scaler.load_state_dict(saved["scaler"])
            if self.generator is not None:
                self.generator.set_state(saved["batches"])
            if self.monitor is not None and "monitor" in saved:
                self.monitor.load_state_dict(saved["monitor"])
            set_random_state(saved["random"])
            return int(saved["epoch"])


def _steps(batches: object, epochs: int, steps_per_epoch: int | None, max_batches: int | None) -> int:
    """Return the number of steps of an epoch. Raises ConfigError if it is unknown or 0."""
    n_steps = count(batches, max_batches) if steps_per_epoch is None else steps_per_epoch
    if n_steps is None:
        raise ConfigError(f"the number of batches of an epoch is unknown for {shown(batches)}; give steps_per_epoch")
    if epochs < 1 or n_steps < 1:
        raise ConfigError(f"epochs and steps_per_epoch must be at least 1, got {epochs} and {n_steps}")
    if epochs > 1 and isinstance(batches, Iterator):
        raise ConfigError(
            f"batches must last for {epochs} epochs, but {shown(batches)} ends with the first; give a list, a "
            "DataLoader, or a function that returns the batches of an epoch"
        )
    return n_steps


def _of_epoch(batches: Any) -> Iterable[Any]:
    """Return the batches of one epoch. Raises ConfigError for a function that returns something else."""
    found = batches() if callable(batches) and not isinstance(batches, Iterable) else batches
    if not isinstance(found, Iterable):
        raise ConfigError(f"batches() must return (inputs, targets) pairs, got {shown(found)}")
    return found


def epochs_done(progress: Path | None) -> int:
    """Return the number of finished epochs in a file of progress; 0 without one."""
    if progress is None or not progress.exists():
        return 0
    with reading(progress, AFRESH):
        return int(read_saved(progress)["epoch"])


def across_ranks(model: nn.Module) -> nn.Module:
    """Wrap the model in DistributedDataParallel; return it unchanged without a process group, or if it is wrapped."""
    if not (dist.is_available() and dist.is_initialized()) or isinstance(model, DistributedDataParallel):
        return model
    return DistributedDataParallel(model, find_unused_parameters=True)


def random_state() -> list[Tensor]:
    """Return the states of torch's own generators: that of the CPU, then those of the GPUs."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]


def set_random_state(states: list[Tensor]) -> None:
    """Restore the result of `random_state`; for GPUs only if their number is the same."""
    torch.set_rng_state(states[0])
    if len(states) > 1 and torch.cuda.device_count() == len(states) - 1:
        torch.cuda.set_rng_state_all(states[1:])
