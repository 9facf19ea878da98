"""Quantization-aware training by the Trainer of Lightning, through one callback."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from torchquant._arguments import Count, checked
from torchquant._modes import in_mode
from torchquant._shown import shown
from torchquant.deploy import Certificate, certify, export_onnx, lower
from torchquant.errors import ConfigError, ExportError, require
from torchquant.integrations._network import is_calibrated, quantized_network
from torchquant.qmodule import QModuleState
from torchquant.training import Monitor, QuantizationSchedule, calibrate
from torchquant.training.batches import inputs_of
from torchquant.training.schedules import check_steps
from torchquant.utils import observe_weights, qmodule_state, qmodules, set_qmodule_state

_lightning: Any = require("lightning.pytorch", "lightning")


@checked
class QuantizationCallback(_lightning.Callback):  # type: ignore[misc]
    """Trains a quantized network inside a LightningModule: `Trainer(callbacks=[QuantizationCallback()])`.

    Before the training it calibrates a network that is not calibrated, on `calibration_batches`: the given ones, or so
    many of the training data. `inputs` makes the network's inputs of a batch; None: as `torchquant.calibrate` does. It
    trains in the states of a `QuantizationSchedule`: from `quant_start_step` optimizer steps on quantized, from
    `freeze_observer_step` on with fixed ranges, from `freeze_bn_step` on with fixed batch norms. `schedules`: functions
    of the calibrated network that make what has `step()`, called after each optimizer step, and a `state_dict`, such as
    `OscillationTracker`. `monitor`: a `Monitor` of the network; a number: look every so many steps, into the loggers of
    the trainer.

    Validation runs in QUANT_EVAL, and so does a model that `load_from_checkpoint` makes of any checkpoint; a resumed
    training (`ckpt_path`) continues in its own state. After the training the weight ranges are updated and the network
    is in QUANT_EVAL. `export`: an ONNX file to write then, on the first rank; `certified` compares it on as many
    batches, and writes FILE.certificate.json. `network`: the name of the network in the LightningModule; "": its one
    attribute with quantizers, else the LightningModule itself.

    Raises ConfigError for a module without quantizers and for steps in the wrong order; ExportError for a file that
    computes something else than the model; MissingDependencyError.

    >>> QuantizationCallback(quant_start_step=100, freeze_observer_step=900, export="model.onnx").certificate is None
    True
    """

    def __init__(
        self,
        calibration_batches: Count | Iterable[Any] = 8,
        inputs: Callable[[Any], Any] | None = None,
        quant_start_step: int = 0,
        freeze_observer_step: int | None = None,
        freeze_bn_step: int | None = None,
        schedules: Sequence[Callable[[nn.Module], Any]] = (),
        monitor: Monitor | Count | None = None,
        export: str | os.PathLike[str] | None = None,
        certified: bool = False,
        network: str = "",
    ) -> None:
        steps: dict[str, Any] = {
            "quant_start_step": quant_start_step,
            "freeze_observer_step": freeze_observer_step,
            "freeze_bn_step": freeze_bn_step,
        }
        check_steps(quant_start_step, freeze_observer_step)
        if made := [one for one in schedules if isinstance(one, nn.Module)]:
            raise ConfigError(
                f"schedules are functions that make them of the calibrated network, got {shown(made[0])}; give "
                f"{type(made[0]).__name__}, or lambda network: {type(made[0]).__name__}(network, ...)"
            )
        if certified and export is None:
            raise ConfigError(
                "certified=True certifies the exported file; say where it goes, as in export='model.onnx'"
            )
        self.certificate: Certificate | None = None
        """The certificate of the exported file, after a training with `certified`."""
        self._batches = calibration_batches if isinstance(calibration_batches, int) else list(calibration_batches)
        self._inputs, self._steps, self._name = inputs, steps, network
        self._makers, self._monitor = tuple(schedules), monitor
        self._export, self._certified = export, certified
        self._schedule: QuantizationSchedule | None = None
        self._schedules: list[Any] = []
        self._watching: Monitor | None = None
        self._loaded: Mapping[str, Any] | None = None
        self._n_steps = 0
        self._hook: Any = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Calibrate the network, unless it is; set its states, those of a checkpoint if the training resumes."""
        network = quantized_network(pl_module, self._name)
        if not is_calibrated(network):
            batches = self._data(trainer)
            with trainer.precision_plugin.forward_context():
                calibrate(network, batches, with_targets=None if self._inputs is None else False)
        with qmodule_state(network, QModuleState.QUANT_EVAL):  # a new schedule must not change what was loaded
            self._schedule = QuantizationSchedule(network, **self._steps)
        self._schedules = [self._schedule, *(make(network) for make in self._makers)]
        every = self._monitor
        self._watching = Monitor(network, every, _to_loggers(trainer)) if isinstance(every, int) else every
        if self._loaded is None:
            self._schedule.apply_at(0)
        else:
            self._load(self._loaded)
        self._hook = pl_module.register_state_dict_post_hook(_save_as_deployed)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Note the number of steps from which the training begins or resumes."""
        self._n_steps = trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Step the monitor and every schedule, if an optimizer stepped."""
        if trainer.global_step == self._n_steps or self._schedule is None:
            return
        self._n_steps = trainer.global_step
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if self._watching is not None:  # first: it looks at the state in which the step was made
            self._watching.step({"loss": loss} if isinstance(loss, Tensor) else None)
        for schedule in self._schedules:
            schedule.step()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Validate the network that will be deployed, also before it trains quantized."""
        if self._schedule is not None:
            set_qmodule_state(self._schedule.model, QModuleState.QUANT_EVAL)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Return to the state of the training."""
        if self._schedule is not None:
            self._schedule.apply_at(int(self._schedule.n_steps))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Fix the ranges of the trained weights, leave the network in QUANT_EVAL, and export it."""
        assert self._schedule is not None
        network, self._schedule = self._schedule.model, None
        observe_weights(network)
        set_qmodule_state(network, QModuleState.QUANT_EVAL)
        if self._watching is not None:
            self._watching.flush()
        if self._export is not None and trainer.is_global_zero:
            self._write(network, Path(self._export), self._data(trainer))

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Take the hooks off the module, also after a training that failed."""
        if self._hook is not None:
            self._hook.remove()
        if self._watching is not None and self._watching is not self._monitor:
            self._watching.close()
        self._hook = self._schedule = self._watching = self._loaded = None
        self._schedules = []

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the schedules and the monitor."""
        return {"states": [one.state_dict() for one in self._stateful()]} if self._schedules else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the states until the training starts."""
        self._loaded = state_dict or None

    def _stateful(self) -> list[Any]:
        return [*self._schedules, *([] if self._watching is None else [self._watching])]

    def _load(self, saved: Mapping[str, Any]) -> None:
        own, states = self._stateful(), saved["states"]
        if len(own) != len(states):
            raise ConfigError(
                f"the checkpoint is of a training with {len(states)} schedules and monitors, and this one has "
                f"{len(own)}; resume with those of the training"
            )
        for one, state in zip(own, states, strict=True):
            one.load_state_dict(state)

    def _data(self, trainer: Any) -> list[Any]:
        """Return the batches to calibrate on, in the precision of the trainer; with `inputs`, what it makes of them."""
        if isinstance(self._batches, int):
            trainer.fit_loop.setup_data()
            batches = list(itertools.islice(trainer.train_dataloader, self._batches))
        else:
            batches = self._batches
        batches = [trainer.precision_plugin.convert_input(batch) for batch in batches]
        return batches if self._inputs is None else [self._inputs(batch) for batch in batches]

    def _write(self, network: nn.Module, path: Path, batches: Sequence[Any]) -> None:
        """Export the network, and certify the file on the batches if that is asked for."""
        if self._inputs is None:
            batches = [inputs_of(network, batch, i, None) for i, batch in enumerate(batches)]
        with in_mode(False, network):
            lowered = lower(network, batches[0])
            export_onnx(lowered, path)
            if self._certified:
                self.certificate = certify(lowered, path, batches, stamp=True)
                self.certificate.save(path.with_name(f"{path.name}.certificate.json"))
                if not self.certificate.passed:
                    raise ExportError(f"{path} computes something else than the model:\n{self.certificate}")


def _to_loggers(trainer: Any) -> Callable[[int, Mapping[str, float]], None]:
    """Make a sink of the loggers of the trainer."""

    def write(step: int, numbers: Mapping[str, float]) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(dict(numbers), step=step)

    return write


def _save_as_deployed(owner: nn.Module, state: dict[str, Any], prefix: str, metadata: object) -> None:
    """Save the network in QUANT_EVAL, whatever the state of its training, which follows from the number of steps."""
    with qmodule_state(owner, QModuleState.QUANT_EVAL):
        for path, module in qmodules(owner):
            state[f"{prefix}{path}{'.' if path else ''}_extra_state"] = module.get_extra_state()
