"""Weights that jump to and fro between two levels: see them, damp them, freeze them (Nagel et al. 2022)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchquant._arguments import checked
from torchquant.errors import ConfigError
from torchquant.qmodule import QWrapper
from torchquant.quantizers import GridQuantizer
from torchquant.quantizers_functional.bn_fold import channel_view
from torchquant.utils import qmodules

OSCILLATING = 0.005
"""Share of steps at which a weight turns back from which on the paper calls it oscillating."""


@dataclass(frozen=True)
class OscillationReport:
    """One layer: its number of weights, and the shares of them that oscillate and that are frozen, 0..1."""

    path: str
    n_weights: int
    oscillating: float
    frozen: float


def _sites(model: nn.Module) -> Iterator[tuple[str, QWrapper, GridQuantizer]]:
    for path, module in qmodules(model):
        if isinstance(module, QWrapper) and isinstance(module.weight_quantizer, GridQuantizer):
            yield path or "(root)", module, module.weight_quantizer


class _Layer(nn.Module):
    """What is remembered of one weight; all with its output channel on axis 0."""

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
    """Watches the codes of every quantized weight; freezes those that turn back too often.

    Call `step()` after each `optimizer.step()`. A weight turns back when its code changes against the direction of its
    last change; `frequency` is the exponential average of that with `momentum`. With `freeze_above` (a number, or a
    function of the step such as a `Ramp`) a weight above it is set to the level its codes were at on average and held
    there. Its state is in `state_dict`. Source: Nagel et al. 2022, arXiv:2203.11086, sections 3.2 and 4.3. Raises
    ConfigError if the model has no quantized weight, UnobservedRangeError before calibration.

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
        self._watched = list(_sites(model))
        computed = [path for path, wrapper, _ in self._watched if wrapper.weights()[0][1].grad_fn is not None]
        if computed and freeze_above is not None:
            raise ConfigError(
                f"the weight of {computed[0]} is computed from other parameters, so it cannot be held at a level; "
                "watch without freeze_above"
            )
        if not self._watched:
            raise ConfigError("the model has no weight quantizer with codes; there is nothing to watch")
        self.layers = nn.ModuleList(_Layer(quantizer.encode(w.float_weight())) for _, w, quantizer in self._watched)
        self.register_buffer("n_steps", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def step(self) -> None:
        """Look at the weights after an optimizer step, and put the frozen ones back."""
        self.n_steps += 1
        threshold = self.freeze_above
        if callable(threshold):
            threshold = threshold(int(self.n_steps))
        for (_, wrapper, quantizer), seen in zip(self._watched, self.layers, strict=True):
            assert isinstance(seen, _Layer)
            self._hold(wrapper, quantizer, seen)
            codes = quantizer.encode(wrapper.float_weight())
            codes = torch.where(seen.frozen, seen.codes, codes)
            direction = (codes - seen.codes).sign().to(torch.int8)
            turned = (direction * seen.direction < 0).to(torch.float32)
            seen.frequency.lerp_(turned, self.momentum)
            seen.average.lerp_(codes.to(torch.float32), self.momentum)
            seen.direction.copy_(torch.where(direction != 0, direction, seen.direction))
            if threshold is not None:
                newly = (seen.frequency > threshold) & ~seen.frozen
                codes = torch.where(newly, seen.average.round().to(codes.dtype), codes)
                seen.frozen |= newly
            seen.codes.copy_(codes)
            self._hold(wrapper, quantizer, seen)

    def _hold(self, wrapper: QWrapper, quantizer: GridQuantizer, seen: _Layer) -> None:
        """Set the frozen weights to the level of their code."""
        if not bool(seen.frozen.any()):
            return
        weight = wrapper.layer.weight
        levels = quantizer.decode(seen.codes, weight.dtype)
        factor = wrapper.fold_factor()
        if factor is not None:
            levels = levels / channel_view(torch.where(factor == 0, torch.ones_like(factor), factor), levels.ndim, 0)
        now = wrapper.row.channels_first(wrapper.layer, weight)
        weight.copy_(wrapper.row.channels_first(wrapper.layer, torch.where(seen.frozen, levels, now)))

    def report(self) -> list[OscillationReport]:
        """One entry a layer, in the order of the model."""
        entries = []
        for (path, _, _), seen in zip(self._watched, self.layers, strict=True):
            assert isinstance(seen, _Layer)
            oscillating = float((seen.frequency > OSCILLATING).double().mean())
            entries.append(OscillationReport(path, seen.codes.numel(), oscillating, float(seen.frozen.double().mean())))
        return entries


@checked
def dampening_loss(model: nn.Module, weight: float = 1e-3) -> Tensor:
    """`weight * sum of (level - w)**2` over all quantized weights, to add to the loss: it draws weights off the edges.

    Only w has a gradient, and none where it is clipped. Source: Nagel et al. 2022, arXiv:2203.11086, eq. 5. The
    weights must have been observed. 0 if there are none.

    >>> from torchquant import QWrapper, make_quantizer
    >>> model = QWrapper(nn.Linear(4, 4), make_quantizer("affine:2,symmetric=narrow"), None)
    >>> model.observe_weight()
    >>> dampening_loss(model).requires_grad
    True
    """
    total = torch.zeros(())
    for _, wrapper, quantizer in _sites(model):
        w = wrapper.folded_weight()
        with torch.no_grad():
            level = quantizer.quantize(w)
            low, high = quantizer._ends(w, *quantizer.grid_for(w))
            bounded = torch.minimum(torch.maximum(w, low), high).eq(w).to(w.dtype)
        total = total.to(w.device) + ((level - w) * bounded).square().sum()
    return total * weight
