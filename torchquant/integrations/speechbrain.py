"""Quantization-aware training by a Brain of SpeechBrain."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from torchquant._registry import did_you_mean
from torchquant._shown import shown
from torchquant.errors import ConfigError, require
from torchquant.integrations._network import is_calibrated, quantized_network
from torchquant.qmodule import QModuleState
from torchquant.training import QuantizationSchedule, calibrate
from torchquant.utils import observe_weights, qmodule_state, set_qmodule_state

_speechbrain: Any = require("speechbrain", "speechbrain")

__all__ = ["QuantizedBrain"]

SETTINGS = {"calibration_batches": 8, "quant_start_step": 0, "freeze_observer_step": None, "freeze_bn_step": None}
RECOVERABLE = "quantization"
"""The name of the schedule in checkpoints, and of the settings in hparams."""


class QuantizedBrain(_speechbrain.Brain):  # type: ignore[misc]
    """Trains quantized modules: `class Recognizer(QuantizedBrain)`, or `class Quantized(QuantizedBrain, Recognizer)`.

    `fit` calibrates modules that are not calibrated, by `compute_forward` of some training batches, and trains in the
    states of a `QuantizationSchedule`, which the checkpointer saves. Validation and `evaluate` run in QUANT_EVAL, and
    so does everything after `fit`. Settings are in hparams, steps being optimizer steps: `quantization:
    {calibration_batches: 8, quant_start_step: 0, freeze_observer_step: None, freeze_bn_step: None}`. Raises ConfigError
    for other settings and for modules without quantizers.
    """

    _calibration_set: Any = None
    _schedule: QuantizationSchedule | None = None

    def fit(
        self,
        epoch_counter: Any,
        train_set: Any,
        valid_set: Any = None,
        progressbar: bool | None = None,
        train_loader_kwargs: Mapping[str, Any] = {},
        valid_loader_kwargs: Mapping[str, Any] = {},
    ) -> None:
        """Train as the Brain does; the modules end in QUANT_EVAL, with the ranges of their last weights."""
        if not isinstance(train_set, DataLoader | _speechbrain.dataio.dataloader.LoopedLoader):
            train_set = self.make_dataloader(train_set, stage=_speechbrain.Stage.TRAIN, **train_loader_kwargs)
        self._calibration_set = train_set
        super().fit(epoch_counter, train_set, valid_set, progressbar, {}, valid_loader_kwargs)
        if self._schedule is not None:
            observe_weights(self._schedule.model)
            set_qmodule_state(self._schedule.model, QModuleState.QUANT_EVAL)

    def on_fit_start(self) -> None:
        """Recover the last checkpoint, calibrate what is not calibrated, and set the states."""
        network, settings = quantized_network(self.modules), self._settings()
        n_batches = settings.pop("calibration_batches")
        self._schedule = QuantizationSchedule(network, **settings)
        if self.checkpointer is not None:
            self.checkpointer.add_recoverable(RECOVERABLE, self._schedule)
        super().on_fit_start()
        if not is_calibrated(network):
            batches = [{"batch": batch} for batch in itertools.islice(self._calibration_set, n_batches)]
            with self.evaluation_ctx:
                calibrate(_Forward(self), batches)
        self._schedule.apply_at(int(self._schedule.n_steps))

    def optimizers_step(self) -> None:
        """Step the optimizers, and the schedule."""
        super().optimizers_step()
        if self._schedule is not None:
            self._schedule.step()

    def _fit_valid(self, valid_set: Any, epoch: int, enable: bool) -> None:
        """Validate the modules that will be deployed, also before they train quantized, and save them so."""
        with qmodule_state(self.modules, QModuleState.QUANT_EVAL):
            super()._fit_valid(valid_set, epoch, enable)

    def on_evaluate_start(self, max_key: str | None = None, min_key: str | None = None) -> None:
        """Recover the best checkpoint, and quantize."""
        super().on_evaluate_start(max_key, min_key)
        set_qmodule_state(self.modules, QModuleState.QUANT_EVAL)

    def _settings(self) -> dict[str, Any]:
        given = getattr(self.hparams, RECOVERABLE, None) or {}
        if not isinstance(given, Mapping) or not given.keys() <= SETTINGS.keys():
            unknown = [str(name) for name in given if name not in SETTINGS] if isinstance(given, Mapping) else []
            hint = did_you_mean(unknown[0], SETTINGS) if unknown else ""
            raise ConfigError(
                f"{RECOVERABLE} in hparams must be a mapping of {', '.join(SETTINGS)}, got {shown(given)};{hint}"
            )
        return {**SETTINGS, **given}


class _Forward(nn.Module):
    """The forward of a Brain as a module."""

    brain: Any

    def __init__(self, brain: Any) -> None:
        super().__init__()
        self.network, self.__dict__["brain"] = brain.modules, brain

    def forward(self, batch: Any) -> Any:
        return self.brain.compute_forward(batch, _speechbrain.Stage.VALID)
