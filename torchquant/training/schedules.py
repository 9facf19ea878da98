"""Schedules over optimizer steps: when to quantize, when to stop observing, bit widths, gradient options."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from torchquant._arguments import checked
from torchquant.errors import ConfigError
from torchquant.qmodule import QModuleState
from torchquant.quantizers import GridQuantizer, Quantizer, make_quantizer
from torchquant.quantizers_functional import GRADIENTS, Gradient
from torchquant.utils import freeze_bn, observe_weights, qmodules, set_qmodule_state

SHAPES = ("linear", "cosine", "geometric")


@checked
@dataclass(frozen=True)
class Ramp:
    """A number that changes from `start` to `end` in `n_steps` steps and stays there.

    `shape`: "linear", "cosine", or "geometric", which multiplies by the same factor at every step.

    >>> ramp = Ramp(1.0, 0.0, 100)
    >>> ramp(0), ramp(25), ramp(500)
    (1.0, 0.75, 0.0)
    """

    start: float
    end: float
    n_steps: int
    shape: str = "linear"

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ConfigError(f"shape must be one of {', '.join(SHAPES)}, got {self.shape!r}")
        if self.n_steps < 1:
            raise ConfigError(f"n_steps must be at least 1, got {self.n_steps!r}")
        if self.shape == "geometric" and not (self.start > 0 and self.end > 0):
            raise ConfigError(f"a geometric ramp goes between numbers above 0, got {self.start!r} and {self.end!r}")

    def __call__(self, step: int) -> float:
        done = min(max(step / self.n_steps, 0.0), 1.0)
        if self.shape == "geometric":
            return float(self.start * (self.end / self.start) ** done)
        done = done if self.shape == "linear" else (1.0 - math.cos(math.pi * done)) / 2.0
        return self.start + (self.end - self.start) * done


class _Schedule(nn.Module):
    """Counts optimizer steps, in a buffer, and applies itself after each; call `step()` after `optimizer.step()`."""

    n_steps: torch.Tensor

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = [model]  # in a list, so that the model is not part of the schedule's checkpoint
        self.register_buffer("n_steps", torch.zeros((), dtype=torch.int64))

    @property
    def model(self) -> nn.Module:
        """The model of the schedule."""
        return self._model[0]

    def step(self) -> None:
        """Count an optimizer step and apply the schedule."""
        self.n_steps += 1
        self.apply_at(int(self.n_steps))

    def apply_at(self, step: int) -> None:
        """Set up the model for that number of steps."""
        raise NotImplementedError

    def load_state_dict(self, *args: object, **options: object) -> object:  # type: ignore[override]
        """Load the state, and set up the model for the loaded step."""
        result = super().load_state_dict(*args, **options)  # type: ignore[arg-type]
        self.apply_at(int(self.n_steps))
        return result


@checked
class QuantizationSchedule(_Schedule):
    """Schedules when quantization begins, and when ranges and batch norms are frozen (docs/algorithms.md D3).

    Until `quant_start_step` optimizer steps the model only observes; then it trains quantized. From
    `freeze_observer_step` on ranges are fixed (in the state QUANT_EVAL, which also trains, since train mode decides
    that). From `freeze_bn_step` on batch norms use their running statistics. The schedule counts optimizer steps, not
    forwards; the count is in `state_dict`. Raises ConfigError.

    >>> from torchquant import QWrapper, make_quantizer
    >>> model = QWrapper(nn.Linear(4, 4), make_quantizer("affine:4"), None)
    >>> schedule = QuantizationSchedule(model, quant_start_step=1, freeze_observer_step=2)
    >>> states = [model.state.name]
    >>> for _ in range(2):
    ...     schedule.step()
    ...     states.append(model.state.name)
    >>> states
    ['CALIBRATION', 'QUANT_AWARE_TRAIN', 'QUANT_EVAL']
    """

    def __init__(
        self,
        model: nn.Module,
        quant_start_step: int = 0,
        freeze_observer_step: int | None = None,
        freeze_bn_step: int | None = None,
    ) -> None:
        super().__init__(model)
        check_steps(quant_start_step, freeze_observer_step)
        self.quant_start_step = quant_start_step
        self.freeze_observer_step = freeze_observer_step
        self.freeze_bn_step = freeze_bn_step
        self.apply_at(0)

    def apply_at(self, step: int) -> None:
        """Set the states for that number of optimizer steps."""
        if step < self.quant_start_step:
            state = QModuleState.CALIBRATION
        elif self.freeze_observer_step is None or step < self.freeze_observer_step:
            state = QModuleState.QUANT_AWARE_TRAIN
        else:
            if any(module.state is not QModuleState.QUANT_EVAL for _, module in qmodules(self.model)):
                observe_weights(self.model)
            state = QModuleState.QUANT_EVAL
        set_qmodule_state(self.model, state)
        freeze_bn(self.model, self.freeze_bn_step is not None and step >= self.freeze_bn_step)


def check_steps(quant_start_step: int, freeze_observer_step: int | None) -> None:
    """Raise ConfigError for steps that QuantizationSchedule cannot have."""
    if quant_start_step < 0:
        raise ConfigError(f"quant_start_step must be at least 0, got {quant_start_step!r}")
    if freeze_observer_step is not None and freeze_observer_step <= quant_start_step:
        raise ConfigError(
            f"freeze_observer_step must come after quant_start_step {quant_start_step}, got {freeze_observer_step}"
        )


@checked
class GradientSchedule(_Schedule):
    """Changes the options of a gradient estimator: `GradientSchedule(model, "pwl", rho=Ramp(1.0, 0.0, 8000))`.

    Every quantizer of the model that supports the estimator gets it. Options are numbers or functions of the step.
    A changed option makes compiled code compile again. Raises ConfigError, UnknownNameError.

    >>> from torchquant import QWrapper, make_quantizer
    >>> model = QWrapper(nn.Linear(4, 4), make_quantizer("affine:4"), None)
    >>> schedule = GradientSchedule(model, "pwl", rho=Ramp(1.0, 0.0, 2))
    >>> schedule.step()
    >>> model.weight_quantizer.gradient.rho
    0.5
    """

    def __init__(self, model: nn.Module, gradient: str, **options: object) -> None:
        super().__init__(model)
        self.gradient = gradient
        self.options = options
        self.apply_at(0)

    def apply_at(self, step: int) -> None:
        """Give every quantizer the estimator for that number of optimizer steps."""
        values = {name: value(step) if callable(value) else value for name, value in self.options.items()}
        made: Gradient = GRADIENTS[self.gradient](**values)
        takers = [m for m in self.model.modules() if isinstance(m, GridQuantizer) and made.name in m.gradients()]
        if not takers:
            raise ConfigError(f"no quantizer of the model supports the gradient {made.name!r}; see: torchquant schemes")
        for quantizer in takers:
            quantizer.set_gradient(made)


@checked
class BitSchedule(_Schedule):
    """Lowers bits step by step: `BitSchedule(model, {0: 8, 1000: 6, 2000: 4}, "affine:{n},symmetric=narrow/channel")`.

    `bits`: optimizer step -> width from then on. At each, every quantized weight gets a new quantizer of the spec
    `weight` at that width, and, if `acts` is given, new activation quantizers; the next batch they see sets their
    ranges. Learned numbers start anew: if the spec has any, build the optimizer again. Raises ConfigError.

    >>> from torchquant import QWrapper
    >>> model = QWrapper(nn.Linear(4, 4), make_quantizer("affine:8"), None)
    >>> schedule = BitSchedule(model, {0: 8, 2: 4}, "affine:{n},symmetric=narrow/channel")
    >>> schedule.step(), schedule.step()
    (None, None)
    >>> model.weight_quantizer.n_bits
    4
    """

    def __init__(self, model: nn.Module, bits: Mapping[int, int], weight: str, acts: str | None = None) -> None:
        super().__init__(model)
        if 0 not in bits or min(bits) < 0:
            raise ConfigError(f"bits must begin with the width at step 0, got the steps {sorted(bits)}")
        self.bits = dict(bits)
        self.weight = weight
        self.acts = acts
        for n_bits in self.bits.values():
            make_quantizer(weight.format(n=n_bits))
            if acts is not None:
                make_quantizer(acts.format(n=n_bits), site="output")
        self._now: int | None = None
        self.apply_at(0)

    def apply_at(self, step: int) -> None:
        """Put the quantizers for that number of optimizer steps in place, if they are not there yet."""
        n_bits = self.bits[max(start for start in self.bits if start <= step)]
        if n_bits == self._now:
            return
        self._now = n_bits
        for _, module in qmodules(self.model):
            for slot in module.weight_slots():
                if slot.quantizer is not None:
                    if slot.quantizer.is_pinned:
                        raise ConfigError(
                            f"{slot.key} is pinned, and a quantizer of another width would lose what was rounded; call "
                            "unpin() on its quantizer first, or schedule widths before rounding"
                        )
                    new = self._made(self.weight, "weight", slot.quantizer)
                    new.allocate_for(slot.seen())
                    slot.replace_quantizer(new)
            module.observe_weight()
            for site in ("input_quantizer", "acts_quantizer") if self.acts is not None else ():
                known = getattr(module, site, None)
                if known is not None:
                    assert self.acts is not None
                    setattr(module, site, self._made(self.acts, "output", known))

    def _made(self, spec: str, site: str, known: Quantizer) -> Quantizer:
        device = next((tensor.device for tensor in (*known.parameters(), *known.buffers())), torch.device("cpu"))
        return make_quantizer(spec.format(n=self._now), site).to(device).train(known.training)
