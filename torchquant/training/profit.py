"""Progressive freezing: the weights whose layers' outputs jump most are frozen first (PROFIT, Park & Yoo 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torchquant._arguments import checked
from torchquant._shown import shown
from torchquant.errors import ConfigError
from torchquant.qmodule.weight_slots import LayerSlot
from torchquant.range_observers._distributed import reduce_sum
from torchquant.utils import weight_slots

SMALLEST = 1e-12


@dataclass(frozen=True)
class Instability:
    """How far the outputs of a layer jump from step to step because its quantized weight does, and if it is frozen."""

    path: str
    divergence: float
    is_frozen: bool


@checked
class ProgressiveFreezing(nn.Module):
    """Freezes weights in rounds, first those whose quantized values make the layer's output jump most.

    Call `step()` after `optimizer.step()`. Every `every` steps each layer is run on its last input with its quantized
    weight of before and after the step; the measure (AIWQ) is the mean over the channels of KL(before || after), each a
    Gaussian with the mean and variance of the channel. At each step in `freeze_at` an equal share of the layers is
    frozen (`requires_grad` False, so that no optimizer moves them), those with the largest sum since the round before;
    with two steps a third of the layers trains to the end. Batch norms and numbers of quantizers go on training. Layers
    with one weight take part, not LSTM and attention. The state is in `state_dict`. The watched model must not be
    compiled. Source: Park & Yoo 2020, PROFIT, arXiv:2008.04693. Deviations: a layer is measured on its last input, at
    sampled steps; the paper's quantizer (DuQ) and negative padding are not here. Raises ConfigError.

    >>> from torchquant import QWrapper, make_quantizer
    >>> net = nn.Sequential(*(QWrapper(nn.Linear(4, 4), make_quantizer("affine:2")) for _ in range(3)))
    >>> schedule = ProgressiveFreezing(net, freeze_at=[1, 2])
    >>> for _ in range(2):
    ...     schedule.step()
    >>> [entry.is_frozen for entry in schedule.report()]
    [True, True, False]
    """

    n_steps: Tensor
    total: Tensor
    frozen: Tensor

    def __init__(self, model: nn.Module, freeze_at: Sequence[int], every: int = 8) -> None:
        super().__init__()
        if not freeze_at or list(freeze_at) != sorted(set(freeze_at)) or freeze_at[0] < 1:
            raise ConfigError(f"freeze_at must be rising steps from 1 on, got {shown(freeze_at)}")
        if every < 1:
            raise ConfigError(f"every must be at least 1, got {every}")
        self.freeze_at = list(freeze_at)
        self.every = every
        found = [slot for slot in weight_slots(model) if isinstance(slot, LayerSlot) and slot.quantizer is not None]
        self._slots = [slot for slot in found if slot.weight.requires_grad and not slot.is_computed]
        if not self._slots:
            raise ConfigError("the model has no layer with a quantized weight that trains; quantize a weight first")
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        self.register_buffer("n_steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("total", torch.zeros(len(self._slots), dtype=torch.float64))
        self.register_buffer("frozen", torch.zeros(len(self._slots), dtype=torch.bool))
        for i, slot in enumerate(self._slots):
            slot.module.register_forward_pre_hook(partial(self._keep_input, i))

    def _keep_input(self, i: int, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Keep the input of a training step that is measured, and the quantized weight that meets it."""
        is_measured = module.training and torch.is_grad_enabled() and not bool(self.frozen[i])
        if is_measured and args and isinstance(args[0], Tensor) and (int(self.n_steps) + 1) % self.every == 0:
            weight = self._quantized(self._slots[i])
            if weight is not None:
                self._before[i] = args[0].detach(), weight

    @torch.no_grad()
    def step(self) -> None:
        """Measure after an optimizer step, if it is one to measure, and freeze where a round ends."""
        self.n_steps += 1
        for i, (x, before) in self._before.items():
            slot, after = self._slots[i], self._quantized(self._slots[i])
            assert after is not None
            self.total[i] += divergence(*(_output(slot, x, weight) for weight in (before, after)))
        self._before.clear()
        if int(self.n_steps) in self.freeze_at:
            self._freeze(self.freeze_at.index(int(self.n_steps)) + 1)

    def _freeze(self, n_rounds: int) -> None:
        wanted = round(len(self._slots) * n_rounds / (len(self.freeze_at) + 1)) - int(self.frozen.sum())
        measured = torch.where(self.frozen, -1.0, reduce_sum(self.total))
        self.frozen[measured.sort(descending=True, stable=True).indices[: max(wanted, 0)]] = True
        self.total.zero_()
        self._apply_frozen()

    def _apply_frozen(self) -> None:
        for slot, is_frozen in zip(self._slots, self.frozen.tolist(), strict=True):
            slot.weight.requires_grad_(not is_frozen)
            if is_frozen:
                slot.weight.grad = None

    def report(self) -> list[Instability]:
        """Return one entry for each layer, in the order of the model; the divergences are sums since the last round."""
        rows = zip(self._slots, self.total.tolist(), self.frozen.tolist(), strict=True)
        return [Instability(slot.label, total, is_frozen) for slot, total, is_frozen in rows]

    @torch.no_grad()
    def _quantized(self, slot: LayerSlot) -> Tensor | None:
        assert slot.quantizer is not None
        return slot.quantizer.quantize(slot.seen()).clone() if slot.quantizer.is_ready else None

    def load_state_dict(self, *args: Any, **options: Any) -> Any:
        """Load the state, and freeze what was frozen."""
        result = super().load_state_dict(*args, **options)
        self._apply_frozen()
        return result


def _output(slot: LayerSlot, x: Tensor, weight: Tensor) -> Tensor:
    """Return the output of the layer with a quantized weight, in the layout of `seen`."""
    found: Tensor = slot.module.row.run(slot.module.layer, x, slot.stored_layout(weight), slot.bias)
    return found


def divergence(before: Tensor, after: Tensor) -> Tensor:
    """Compute the mean over channels of KL(N(before) || N(after)). before, after: (N, C, ...), or (..., C) if 3-D; ().

    >>> x = torch.tensor([[0.0], [2.0]])
    >>> divergence(x, x + 1)
    tensor(0.5000, dtype=torch.float64)
    """
    (m0, v0), (m1, v1) = (_moments(y.to(torch.float64)) for y in (before, after))
    return ((v1 / v0).log() / 2 + (v0 + (m0 - m1).square()) / (2 * v1) - 0.5).mean()


def _moments(y: Tensor) -> tuple[Tensor, Tensor]:
    axis = y.ndim - 1 if y.ndim == 3 else min(1, y.ndim - 1)
    each = y.movedim(axis, 0).flatten(1)
    var, mean = torch.var_mean(each, 1, correction=0)
    return mean, var.clamp_min(SMALLEST)
