"""Choose a rotation for channels that share one, by the output error of the layers that read them, and fold it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torchquant.graph.recording import call_with
from torchquant.ptq.ends import in_runs
from torchquant.ptq.functional.orthogonal import (
    cayley_step,
    hadamard,
    hadamard_factors,
    orthogonalized,
    random_orthogonal,
    random_signs,
)
from torchquant.ptq.padding import Padding, paddings
from torchquant.ptq.readers import Call, Readers, each_readers
from torchquant.ptq.rotation_sets import RotationSet
from torchquant.qmodule import QModuleState
from torchquant.qmodule.input_slots import InputSlots
from torchquant.range_observers._distributed import reduce_sum
from torchquant.utils import qmodule_state

MOST_ROWS = 512
"""The largest number of rows (tokens, positions) of each value on which rotations are compared."""


def start_of(size: int, keeps_mean: bool, generator: torch.Generator) -> Tensor:
    """Draw a rotation, (size, size) float64: of a Hadamard matrix with random signs, where it may change the mean.

    One that keeps the mean has rows and columns that sum to 1.
    """
    if keeps_mean:
        first, second = (_with_mean(size, generator) for _ in range(2))
        return first @ second.mT
    if hadamard_factors(size) is None or size == 1:
        return random_orthogonal(size, generator)
    return random_signs(size, generator).double()[:, None] * hadamard(size).double().mT / math.sqrt(size)


def _with_mean(size: int, generator: torch.Generator) -> Tensor:
    """Draw an orthogonal matrix whose first column is constant."""
    drawn = torch.randn(size, size, generator=generator, dtype=torch.float64)
    drawn[:, 0] = 1.0
    return orthogonalized(drawn)


@dataclass
class MeasuredRotation:
    """The layers that read a set of channels, by the value that arrives at them, and how well a rotation suits them."""

    found: RotationSet
    readers: list[Readers]

    def loss(self, rotation: Tensor | None) -> Tensor:
        """Compute the mean relative error of the outputs, all rounded behind the rotation; with gradients for it."""

        def turned(x: Tensor) -> Tensor:
            return x if rotation is None else in_runs(x, rotation)

        return torch.stack([readers.loss(turned, turned) for readers in self.readers]).mean()

    @torch.no_grad()
    def error(self, rotation: Tensor | None) -> float:
        """Compute the loss as a number, over all ranks."""
        return float(reduce_sum(self.loss(rotation)))

    def learned(self, start: Tensor, steps: int, rate: float) -> Tensor:
        """Lower the loss by Cayley steps from a rotation, of a falling rate; returns the best one on the way.

        `rate`: how far the first step turns, in radians, as the root of the mean square over all directions.
        """
        kept = _with_mean(len(start), torch.Generator().manual_seed(0)) if self.found.keeps_mean else None
        now = best = start
        least = self.error(start)
        for step in range(steps):
            leaf = now.clone().requires_grad_()
            with torch.enable_grad():
                gradient = reduce_sum(torch.autograd.grad(self.loss(leaf), [leaf])[0])
            skew = gradient @ now.mT - now @ gradient.mT
            if kept is not None:  # no turn of the constant direction
                inner = kept.mT @ skew @ kept
                inner[0, :] = inner[:, 0] = 0.0
                skew = kept @ inner @ kept.mT
            size = float(skew.norm()) / math.sqrt(len(start))
            if not size > 0:
                break
            now = cayley_step(now, skew * (rate * (1.0 - step / steps) / size))
            if (error := self.error(now)) < least:
                best, least = now, error
        return best


def calls_and_paddings(model: nn.Module, batches: Sequence[Any]) -> tuple[list[Call], list[Padding]]:
    """Make a forward of each batch, and find which of its tokens are not padding."""
    calls: list[Call] = [partial(call_with, model, batch, "a batch") for batch in batches]
    return calls, paddings(model, batches)


def measured(model: nn.Module, sets: Sequence[RotationSet], batches: Sequence[Any]) -> list[MeasuredRotation]:
    """Collect what the readers of each set get on the batches, in the float model."""
    of_path = {end.slot.path: i for i, one in enumerate(sets) for end in one.readers if end.slot is not None}
    modules = {path: model.get_submodule(path) for path in of_path}
    wrappers = {path: m for path, m in modules.items() if isinstance(m, InputSlots) and m.is_linear}
    found = [MeasuredRotation(one, []) for one in sets]
    calls, padding = calls_and_paddings(model, batches)
    with qmodule_state(model, QModuleState.BYPASSED):
        for readers in each_readers(model, wrappers, calls, padding, lambda _: torch.Generator()):
            if readers.n_rows:
                rows = [x[:: max(1, len(x) // MOST_ROWS)] for x in readers.sample]
                found[of_path[next(iter(readers.wrappers))]].readers.append(replace(readers, values=rows))
    return found
