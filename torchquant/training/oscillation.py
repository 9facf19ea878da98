"""Track, dampen and freeze weights that oscillate between two levels (Nagel et al. 2022)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchquant._arguments import checked
from torchquant.errors import ConfigError
from torchquant.qmodule.weight_slots import LayerSlot, WeightSlot
from torchquant.quantizers import GridQuantizer
from torchquant.utils import weight_slots

OSCILLATING = 0.005
"""Frequency of reversals above which the paper calls a weight oscillating."""


@dataclass(frozen=True)
class OscillationReport:
    """A report on one weight tensor: number of elements, share that oscillates and share that is frozen, 0..1.

    `path`: path of its module, with the name of the tensor if the module has several, as LSTM does.
    """

    path: str
    n_weights: int
    oscillating: float
    frozen: float


def _on_grids(model: nn.Module) -> Iterator[tuple[WeightSlot, GridQuantizer]]:
    for slot in weight_slots(model):
        if isinstance(quantizer := slot.quantizer, GridQuantizer):
            yield slot, quantizer


class _Layer(nn.Module):
    """The tracking state of one weight; all tensors have the output channel on axis 0."""

    codes: Tensor
    direction: Tensor
    frequency: Tensor
    average: Tensor
    frozen: Tensor

    def __init__(self, codes: Tensor) -> None:
        super().__init__()
        self.register_buffer("codes", codes.clone())
        self.register_buffer("direction", torch.zeros_like(codes, dtype=torch.int8))
        self.register_buffer("frequency", torch.zeros_like(codes, dtype=torch.float32))
        self.register_buffer("average", codes.to(torch.float32))
        self.register_buffer("frozen", torch.zeros_like(codes, dtype=torch.bool))


@checked
class OscillationTracker(nn.Module):
    """Tracks the codes of every quantized weight; freezes elements that oscillate too often.

    Call `step()` after each `optimizer.step()`. A weight oscillates when its code changes against the direction of its
    last change; `frequency` is the exponential average of such changes with `momentum`. With `freeze_above` (a number,
    or a function of the step such as a `Ramp`) a weight with a higher frequency is set to the average level of its
    codes and held there. The state is in `state_dict`. Source: Nagel et al. 2022, arXiv:2203.11086, sections 3.2 and
    4.3. Raises ConfigError if the model has no quantized weight, UnobservedRangeError before calibration.

    >>> from torchquant import QWrapper, make_quantizer
    >>> model = QWrapper(nn.Linear(4, 4), make_quantizer("affine:4,symmetric=narrow"), None)
    >>> model.observe_weight()
    >>> tracker = OscillationTracker(model, freeze_above=0.02)
    >>> tracker.step()
    >>> tracker.report()[0].frozen
    0.0
    """

    def __init__(
        self, model: nn.Module, freeze_above: float | Callable[[int], float] | None = None, momentum: float = 0.01
    ) -> None:
        super().__init__()
        self.n_steps: Tensor
        if not 0.0 < momentum <= 1.0:
            raise ConfigError(f"momentum must be above 0 and at most 1, got {momentum!r}")
        self.momentum = momentum
        self.freeze_above = freeze_above
        self._watched = [slot for slot, _ in _on_grids(model)]
        computed = [slot.label for slot in self._watched if slot.is_computed]
        if computed and freeze_above is not None:
            raise ConfigError(
                f"the weight of {computed[0]} is computed from other parameters, so it cannot be held at a level; "
                "track it without freeze_above"
            )
        if not self._watched:
            raise ConfigError("the model has no weight quantizer with codes to track; quantize a weight first")
        self.layers = nn.ModuleList(_Layer(_codes(slot)) for slot in self._watched)
        self.register_buffer("n_steps", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def step(self) -> None:
        """Update the tracking after an optimizer step, and restore the frozen weights."""
        self.n_steps += 1
        threshold = self.freeze_above
        if callable(threshold):
            threshold = threshold(int(self.n_steps))
        for slot, seen in zip(self._watched, self.layers, strict=True):
            assert isinstance(seen, _Layer)
            _hold(slot, seen)
            codes = _codes(slot)
            codes = torch.where(seen.frozen, seen.codes, codes)
            turned, direction = reversals(codes, seen.codes, seen.direction)
            seen.frequency.lerp_(turned.to(torch.float32), self.momentum)
            seen.average.lerp_(codes.to(torch.float32), self.momentum)
            seen.direction.copy_(direction)
            if threshold is not None:
                newly = (seen.frequency > threshold) & ~seen.frozen
                codes = torch.where(newly, seen.average.round().to(codes.dtype), codes)
                seen.frozen |= newly
            seen.codes.copy_(codes)
            _hold(slot, seen)

    def report(self) -> list[OscillationReport]:
        """Return one entry per weight tensor, in the order of the model."""
        entries = []
        for slot, seen in zip(self._watched, self.layers, strict=True):
            assert isinstance(seen, _Layer)
            oscillating, frozen = (seen.frequency > OSCILLATING).double().mean(), seen.frozen.double().mean()
            entries.append(OscillationReport(slot.label, seen.codes.numel(), float(oscillating), float(frozen)))
        return entries

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load the state; a file of 0.1 has only the weights of QWrappers."""
        theirs = [i for i, slot in enumerate(self._watched) if isinstance(slot, LayerSlot)]
        saved = {key: state_dict[key] for key in state_dict if key.startswith(f"{prefix}layers.")}
        of_each = len(self.layers[0].state_dict())
        if saved and len(saved) == len(theirs) * of_each and len(theirs) < len(self._watched):
            for key in saved:
                del state_dict[key]
            state_dict.update({f"{prefix}layers.{key}": value for key, value in self.layers.state_dict().items()})
            for key, value in saved.items():
                number, _, name = key.removeprefix(f"{prefix}layers.").partition(".")
                state_dict[f"{prefix}layers.{theirs[int(number)]}.{name}"] = value
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[no-untyped-call]


def reversals(codes: Tensor, former: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Return where codes changed against the direction of their last change, and the direction of the last change now.

    codes, former: (*) integers. direction: (*) int8, -1, 0 or 1; 0 for codes that have never changed.
    """
    change = (codes - former).sign().to(torch.int8)
    return change * direction < 0, torch.where(change != 0, change, direction)


def _codes(slot: WeightSlot) -> Tensor:
    """Return the codes of the current weight."""
    assert slot.quantizer is not None
    return slot.quantizer.encode(slot.seen())


def _hold(slot: WeightSlot, seen: _Layer) -> None:
    """Set the frozen elements of the weight to the level of their code."""
    if bool(seen.frozen.any()):
        assert slot.quantizer is not None
        slot.set_weight(slot.quantizer.decode(seen.codes, slot.weight.dtype), where=seen.frozen)


@checked
def dampening_loss(model: nn.Module, weight: float = 1e-3) -> Tensor:
    """Compute `weight * sum of (level - w)**2` over all quantized weights, a term that pulls weights to their levels.

    Add the term to the loss. Only w has a gradient, and none where it is clipped. Source: Nagel et al. 2022,
    arXiv:2203.11086, eq. 5. The weights must have been observed. The term is 0 without quantized weights.

    >>> from torchquant import QWrapper, make_quantizer
    >>> model = QWrapper(nn.Linear(4, 4), make_quantizer("affine:2,symmetric=narrow"), None)
    >>> model.observe_weight()
    >>> dampening_loss(model).requires_grad
    True
    """
    total = torch.zeros(())
    for slot, quantizer in _on_grids(model):
        w = slot.seen()
        with torch.no_grad():
            level = quantizer.quantize(w)
            low, high = quantizer.format().ends(w)
            bounded = torch.minimum(torch.maximum(w, low), high).eq(w).to(w.dtype)
        total = total.to(w.device) + ((level - w) * bounded).square().sum()
    return total * weight
