"""A calibrated model to measure on: each search point is either float or holds one of its options."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from torchquant._arguments import one_number
from torchquant.errors import ConfigError, NonFiniteError
from torchquant.graph.called import tensors_in
from torchquant.graph.recording import call_with
from torchquant.plan.quant_plan import QuantPlan
from torchquant.plan.rules import Rules
from torchquant.qmodule import QModule
from torchquant.search.cost import SearchPoint
from torchquant.search.learning.mixture import FLOAT, MixtureQuantizer
from torchquant.search.learning.supernet import build_supernet
from torchquant.search.space import search_rules, searched_slots
from torchquant.training.batches import pair_of
from torchquant.training.calibration import calibrate
from torchquant.utils import qmodules

Loss = Callable[[Any, Any], Tensor]
"""(output of the model, targets) -> mean loss of the batch, a scalar."""
Batch = tuple[Any, Any]
"""(inputs, targets); the inputs are a tensor, a tuple of arguments, or a dictionary of keyword arguments."""


def searched_plan(
    net: nn.Module, rules: Rules | QuantPlan, example_inputs: Any, min_bits: int = 2, max_bits: int = 8
) -> QuantPlan:
    """Make the plan with candidates from rules, as `search_rules` reads them; return a plan unchanged.

    Raises ConfigError if it leaves nothing to choose.
    """
    plan = rules
    if not isinstance(plan, QuantPlan):
        plan = QuantPlan.from_rules(search_rules(plan, min_bits, max_bits), net, example_inputs)
    if not searched_slots(plan):
        raise ConfigError("the rules leave nothing to choose: give a slot a list of specs, or a spec with {n}")
    return plan


def checked_batches(batches: Iterable[Any]) -> list[Batch]:
    """Return all batches as a list. Raises ConfigError for none, or for a batch that is not a pair."""
    found = list(batches)
    if not found:
        raise ConfigError("sensitivity needs at least one batch, got none")
    found = [pair_of(batch, i) for i, batch in enumerate(found)]
    for i, batch in enumerate(found):
        if batch_size(batch) == 0:
            raise ConfigError(f"batch {i} has no sample; give batches with at least one")
    return found


def batch_size(batch: Any) -> int:
    """Return the number of samples: the first axis of the first tensor among the inputs."""
    first = next(iter(tensors_in(batch[0])), None)
    return len(first) if first is not None and first.ndim else 0


def samples_of(batch: Batch) -> Iterator[Batch]:
    """Yield the batch as batches of one sample; a tensor of another length than the batch stays whole."""
    size = batch_size(batch)

    def cut(value: Any, i: int) -> Any:
        if isinstance(value, Tensor):
            return value[i : i + 1] if value.ndim and len(value) == size else value
        if isinstance(value, Mapping):
            return {name: cut(part, i) for name, part in value.items()}
        return type(value)(cut(part, i) for part in value) if isinstance(value, tuple | list) else value

    for i in range(size):
        yield cut(batch[0], i), cut(batch[1], i)


def scalar_loss(loss: Loss, output: Any, targets: Any) -> Tensor:
    """Compute the loss, which must be one finite number. Raises ConfigError, NonFiniteError."""
    found = one_number(loss(output, targets), "the loss")
    if not bool(found.detach().isfinite()):
        raise NonFiniteError(f"the loss is {float(found)}; sensitivity needs a model and data that give finite numbers")
    return found


class CalibratedSupernet:
    """A copy of the float model under a plan, in eval mode, with its ranges measured on the batches.

    Every search point is float until `using` gives it an option. Raises the errors of `build_supernet`.
    """

    def __init__(self, net: nn.Module, plan: QuantPlan, batches: list[Batch]) -> None:
        self.batches = batches
        self.spaces = searched_slots(plan)
        self.model, made = build_supernet(net, plan)
        self.mixtures = {point: made.get(point, []) for point in self.spaces}  # an input that is quantized has none
        self.model.eval()
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        for mixture in self.all_mixtures():
            mixture.forced, mixture.narrow = FLOAT, False
            mixture.refresh()
        calibrate(self.model, batches, with_targets=True, show_progress=False)

    def all_mixtures(self) -> Iterator[MixtureQuantizer]:
        """Yield all mixtures of the model, point by point."""
        for mixtures in self.mixtures.values():
            yield from mixtures

    def options(self, point: SearchPoint) -> list[str]:
        """Return the spec strings of a search point."""
        return self.spaces[point].options(point[1])

    def owners(self, point: SearchPoint) -> list[QModule]:
        """Return the modules that hold the quantizers of a search point."""
        own = {id(mixture) for mixture in self.mixtures[point]}
        return [m for _, m in qmodules(self.model) if any(id(q) in own for q in m.quantizers().values())]

    @contextmanager
    def using(self, point: SearchPoint, option: int) -> Iterator[None]:
        """Quantize one search point with one option while the context lasts."""
        try:
            for mixture in self.mixtures[point]:
                mixture.forced = option
            yield
        finally:
            for mixture in self.mixtures[point]:
                mixture.forced = FLOAT

    @torch.no_grad()
    def outputs(self) -> Iterator[Any]:
        """Yield the outputs of the model with its current options, batch by batch."""
        for inputs, _ in self.batches:
            yield call_with(self.model, inputs, "a batch")

    def mean_loss(self, loss: Loss, outputs: Iterable[Any]) -> float:
        """Compute the mean loss over all samples."""
        total = 0.0
        for batch, output in zip(self.batches, outputs, strict=True):
            total += batch_size(batch) * float(scalar_loss(loss, output, batch[1]))
        return total / sum(map(batch_size, self.batches))
