"""Quantization-aware training with the Trainer of transformers."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator
from typing import Annotated, Any

from torch import nn

from torchquant._arguments import Bounds, checked
from torchquant._shown import some
from torchquant.deploy.packed.weight_codes import CodesQuantizer
from torchquant.errors import ConfigError, require
from torchquant.qmodule import QModuleState
from torchquant.training.bn_stats import reestimate_bn
from torchquant.training.calibration import calibrate
from torchquant.training.monitor import Monitor
from torchquant.training.schedules import BitSchedule, GradientSchedule, QuantizationSchedule, check_steps
from torchquant.utils import (
    observe_weights,
    qmodule_state,
    qmodules,
    quantizer_parameters,
    set_qmodule_state,
    state_report,
)

_trainer: Any = require("transformers.trainer_callback", "transformers")

EVALUATED_IN = {
    QModuleState.CALIBRATION: QModuleState.BYPASSED,
    QModuleState.QUANT_AWARE_TRAIN: QModuleState.QUANT_EVAL,
}
"""State of a step of training -> state in which the model is evaluated: nothing observes what it is evaluated on."""


@checked
class TorchquantCallback(_trainer.TrainerCallback):  # type: ignore[misc]
    """Trains a quantized model with transformers' Trainer: `Trainer(model, args, callbacks=[TorchquantCallback()])`.

    Before the first step, quantizers that have seen no data are calibrated on `calibration_batches` batches of the
    training; 0: the first steps set their ranges. `quant_start_step`, `freeze_observer_step`, `freeze_bn_step`:
    optimizer steps, as in QuantizationSchedule. `schedules`: others of this model, such as GradientSchedule. `monitor`:
    a Monitor of this model, which looks after optimizer steps. `bn_batches`: the batches on which batch norms are
    estimated again at the end.

    Evaluations run in QUANT_EVAL and observe nothing. Checkpoints have the float weights and the state of the
    quantizers, so that `resume_from_checkpoint` resumes the schedules at their step; after the training the model is in
    QUANT_EVAL, and is saved as its config says. Warns if weight decay would shrink learned steps. Raises ConfigError
    for a model without quantizers, and for one that was loaded from codes; MissingDependencyError.

    >>> TorchquantCallback(freeze_observer_step=100).freeze_observer_step
    100
    """

    def __init__(
        self,
        calibration_batches: Annotated[int, Bounds(0)] = 8,
        quant_start_step: int = 0,
        freeze_observer_step: int | None = None,
        freeze_bn_step: int | None = None,
        schedules: Iterable[GradientSchedule | BitSchedule] = (),
        monitor: Monitor | None = None,
        bn_batches: Annotated[int, Bounds(0)] = 0,
    ) -> None:
        check_steps(quant_start_step, freeze_observer_step)
        self.calibration_batches, self.bn_batches = calibration_batches, bn_batches
        self.quant_start_step, self.freeze_observer_step = quant_start_step, freeze_observer_step
        self.freeze_bn_step, self.monitor = freeze_bn_step, monitor
        self._others = list(schedules)
        self._schedules: list[Any] = []
        self._aside: qmodule_state | None = None
        self._save_as: list[tuple[Any, str]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        """Calibrate what has seen no data, and set up the model for the step at which the training begins."""
        _check_trainable(model)
        self._restore()
        if (
            self.calibration_batches
            and not state.global_step
            and any(not row.calibrated for row in state_report(model))
        ):
            calibrate(model, _batches(more["train_dataloader"], self.calibration_batches))
        _warn_of_decay(model, more.get("optimizer"))
        own = QuantizationSchedule(model, self.quant_start_step, self.freeze_observer_step, self.freeze_bn_step)
        self._schedules = [own, *self._others]
        for schedule in self._schedules:
            schedule.n_steps.fill_(state.global_step)
            schedule.apply_at(state.global_step)
        if self.monitor is not None:
            self.monitor.n_steps = state.global_step
        quantizers = {id(m.hf_quantizer): m.hf_quantizer for m in model.modules() if hasattr(m, "hf_quantizer")}
        self._save_as = [(q.quantization_config, q.quantization_config.save_as) for q in quantizers.values()]
        for config, _ in self._save_as:
            config.save_as = "float"
        if args.eval_on_start:
            self._step_aside(model)

    def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Return to the state of the training after an evaluation."""
        self._step_back()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Let the monitor look, and the schedules apply themselves."""
        if self.monitor is not None:
            self.monitor.step()
        for schedule in self._schedules:
            schedule.step()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        """Set up the model for an evaluation, if one follows."""
        if control.should_evaluate:
            self._step_aside(model)

    on_epoch_end = on_step_end

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        """Leave the model in QUANT_EVAL, with batch norms estimated again if so asked."""
        self._step_back()
        if _state_of(model) is QModuleState.QUANT_AWARE_TRAIN:
            observe_weights(model)
        set_qmodule_state(model, QModuleState.QUANT_EVAL)
        if self.bn_batches:
            reestimate_bn(model, _batches(more["train_dataloader"], self.bn_batches))
        if self.monitor is not None:
            self.monitor.flush()
        self._restore()

    def _restore(self) -> None:
        """Undo what a training changes for as long as it runs, also for one that was interrupted."""
        self._step_back()
        for config, save_as in self._save_as:
            config.save_as = save_as
        self._save_as = []

    def _step_aside(self, model: nn.Module) -> None:
        """Put the model in the state in which it is evaluated; `_step_back` undoes this."""
        if self._aside is not None:
            return
        now = _state_of(model)
        if now is QModuleState.QUANT_AWARE_TRAIN:
            observe_weights(model)  # their ranges are one step old
        self._aside = qmodule_state(model, EVALUATED_IN.get(now, now))
        self._aside.__enter__()

    def _step_back(self) -> None:
        if self._aside is not None:
            self._aside.__exit__(None, None, None)
            self._aside = None


def _state_of(model: nn.Module) -> QModuleState:
    """Return the state that a schedule has set for all modules."""
    return next(module.state for _, module in qmodules(model))


def _batches(loader: Iterable[Any], n: int) -> Iterator[Any]:
    """Yield `n` batches of a loader as plain dictionaries of arguments."""
    for batch in itertools.islice(loader, n):
        yield dict(batch) if hasattr(batch, "keys") else batch


def _check_trainable(model: nn.Module) -> None:
    if not any(True for _ in qmodules(model)):
        raise ConfigError(
            f"TorchquantCallback: {type(model).__name__} is a float model. Quantize it before the Trainer is made: "
            "torchquant.quantize, or from_pretrained with a TorchquantConfig"
        )
    if any(isinstance(module, CodesQuantizer) for module in model.modules()):
        raise ConfigError(
            f"TorchquantCallback: {type(model).__name__} was loaded from codes, which are fixed. Train a model that "
            "was saved with save_as='float'; adapters beside the codes are trained without this callback"
        )


def _warn_of_decay(model: nn.Module, optimizer: Any) -> None:
    learned = {id(p) for p in quantizer_parameters(model)["params"]}
    groups = getattr(optimizer, "param_groups", [])
    decayed = [g["weight_decay"] for g in groups if g.get("weight_decay") for p in g["params"] if id(p) in learned]
    if decayed:
        warnings.warn(
            f"weight decay {some(sorted(map(str, set(decayed))))} shrinks {len(decayed)} learned numbers of "
            "quantizers; set weight_decay=0, or give the Trainer an optimizer whose group "
            "torchquant.quantizer_parameters(model) has none",
            stacklevel=2,
        )
