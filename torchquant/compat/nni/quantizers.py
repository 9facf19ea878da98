"""NNI's quantizers: each compiles a config list to a plan, applies it to the model, and follows its modes.

The model is changed in place, as in NNI. A quantizer is a module that runs the model, so that it can be wrapped in
DataParallel or DistributedDataParallel. In training quantizers observe and quantize; in evaluation they quantize.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchquant._files import write_whole
from torchquant.compat._modes import FollowMode, state_for
from torchquant.compat.nni.calibration import calibration_config, restore_calibration
from torchquant.compat.nni.config import LayerConfig, Target, compile_config
from torchquant.errors import ConfigError
from torchquant.qmodule import QModule, QModuleState
from torchquant.qmodule.weight_slots import parameter_of
from torchquant.utils import observe_any_weights, qmodules, quantizer_parameters, set_qmodule_state, weight_slots


@dataclass
class TorchEvaluator:
    """NNI 3.0's description of how to train a model.

    `training_func(model, optimizers, training_step, lr_schedulers, max_steps, max_epochs)` trains;
    `evaluating_func(model)` evaluates; both are the caller's.
    """

    training_func: Callable[..., Any]
    optimizers: Any = None
    training_step: Any = None
    lr_schedulers: Any = None
    dummy_input: Any = None
    evaluating_func: Callable[[nn.Module], Any] | None = None

    def train(self, model: nn.Module, max_steps: int | None, max_epochs: int | None) -> None:
        """Call the training function."""
        self.training_func(model, self.optimizers, self.training_step, self.lr_schedulers, max_steps, max_epochs)


class _FollowSteps(FollowMode):
    """Does the same as FollowMode, and keeps modules from quantizing before their `quant_start_step`."""

    def __init__(self, quantizer: Quantizer) -> None:
        self.quantizer = quantizer

    def __call__(self, model: nn.Module, args: Any) -> None:
        self.quantizer._before_forward(model)
        super().__call__(model, args)
        if model.training and self.quantizer.optimizer is None:
            self.quantizer._count_step()

    def state_of(self, path: str, module: QModule) -> QModuleState:
        return self.quantizer._state_of(path, module)


class Quantizer(nn.Module):
    """The base of NNI's quantizers. `config_list`: see `compat/nni/config.py`, in both spellings.

    `optimizer`: its steps are counted for `quant_start_step`, and it gets the learned parameters of quantizers; without
    it forwards in training are counted. It may be a TorchEvaluator, for `compress(max_steps, max_epochs)` of NNI 3.0.
    `dummy_input`: an input of the model; with it batch norms are folded. Raises ConfigError.
    """

    steps: Tensor
    exports: ClassVar[str] = "float"
    """Weights that `export_model` writes: "float" or "quantized"."""

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        optimizer: torch.optim.Optimizer | TorchEvaluator | None = None,
        dummy_input: Any = None,
    ) -> None:
        super().__init__()
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            raise ConfigError(
                f"the model must not be wrapped, got a {type(model).__name__}; give the inner one, wrap the quantizer"
            )
        self.evaluator: TorchEvaluator | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        if isinstance(optimizer, TorchEvaluator):
            self.evaluator, self.optimizer, dummy_input = optimizer, optimizer.optimizers, optimizer.dummy_input
        else:
            self.optimizer = optimizer
        if dummy_input is not None and self.exports == "quantized":
            raise ConfigError(f"{type(self).__name__} cannot fold batch norms; leave dummy_input out")
        compiled = compile_config(model, config_list, self.spec, fuse_bn=dummy_input is not None)
        self.plan = compiled.plan
        self.layers: dict[str, LayerConfig] = compiled.layers
        self.bound_model = self.plan.apply(model, inplace=True)
        self.register_buffer("steps", torch.tensor(1))
        observe_any_weights(self.bound_model)
        learned = quantizer_parameters(self.bound_model)
        if self.optimizer is not None:
            if learned["params"]:
                self.optimizer.add_param_group(learned)
            self.optimizer.register_step_post_hook(lambda *_: self._count_step())
        self.bound_model.register_forward_pre_hook(_FollowSteps(self))

    def spec(self, site: str, target: Target) -> str | None:
        """Return the spec string of the quantizer of a tensor."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the model."""
        return self.bound_model(*args, **kwargs)

    def _count_step(self) -> None:
        self.steps += 1

    def _before_forward(self, model: nn.Module) -> None:
        """Prepare the weights before a forward of the model."""

    def _state_of(self, path: str, module: QModule) -> QModuleState:
        config = self.layers.get(path)
        if config is not None and config.start_step > 1 and int(self.steps) < config.start_step:
            return QModuleState.CALIBRATION if module.training else QModuleState.BYPASSED
        return state_for(module)

    def compress(self, max_steps: int | None = None, max_epochs: int | None = None) -> Any:
        """Return the quantized model; with a TorchEvaluator, train it first and return (model, calibration config)."""
        if self.evaluator is None:
            return self.bound_model
        self.evaluator.train(self.bound_model, max_steps, max_epochs)
        observe_any_weights(self.bound_model)
        return self.bound_model, calibration_config(self.bound_model, self.layers, modern=True)

    def float_model(self) -> nn.Module:
        """Return a float copy of the model with the current weights and unfolded batch norms."""
        model = self.plan.revert(self.bound_model)
        model._forward_pre_hooks.clear()
        return model

    @torch.no_grad()
    def export_model(
        self,
        model_path: str | os.PathLike[str],
        calibration_path: str | os.PathLike[str] | None = None,
        onnx_path: str | os.PathLike[str] | None = None,
        input_shape: Sequence[int] | None = None,
        device: Any = None,
    ) -> dict[str, dict[str, Any]]:
        """Write the weights under the keys of the float model, and the calibration; return the calibration config.

        The weights are float or quantized, as in NNI (docs/algorithms.md D4 has the table). `onnx_path` needs
        `input_shape`; the file is QDQ ONNX that computes the same as this model, if its grids are uniform.
        Raises ConfigError, ExportError.
        """
        observe_any_weights(self.bound_model)
        exported = self.float_model()
        if self.exports == "quantized":
            for slot in weight_slots(self.bound_model):
                if (quantizer := slot.quantizer) is not None:
                    quantized = slot.channels_first(quantizer(slot.seen()))
                    stored = parameter_of(exported.get_submodule(slot.path), slot.name)
                    stored.copy_(quantized.view_as(stored))
        state = exported.state_dict()
        write_whole(Path(model_path), lambda temporary: torch.save(state, temporary))
        config = calibration_config(self.bound_model, self.layers)
        if calibration_path is not None:
            write_whole(Path(calibration_path), lambda temporary: torch.save(config, temporary))
        if onnx_path is not None:
            if input_shape is None:
                raise ConfigError("onnx_path needs input_shape, such as (1, 3, 224, 224)")
            self._export_onnx(onnx_path, torch.zeros(tuple(input_shape), device=device))
        return config

    def _export_onnx(self, path: str | os.PathLike[str], example: Tensor) -> None:
        from torchquant.deploy import export_onnx

        model = copy.deepcopy(self.bound_model).eval()
        model._forward_pre_hooks.clear()
        set_qmodule_state(model, QModuleState.QUANT_EVAL)
        export_onnx(model, path, example.cpu())

    def load_calibration_config(self, config: Mapping[str, Mapping[str, Any]]) -> None:
        """Restore the ranges that `export_model` returned; scales follow from them. Raises ConfigError."""
        restore_calibration(self.bound_model, config)


class QAT_Quantizer(Quantizer):  # noqa: N801 - published name
    """Quantization-aware training (Jacob et al. 2018): weights by their current range, activations by an average.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU6())
    >>> config_list = [
    ...     {"quant_types": ["weight"], "quant_bits": 8, "op_types": ["Linear"]},
    ...     {"quant_types": ["output"], "quant_bits": 8, "quant_start_step": 7000, "op_types": ["ReLU6"]},
    ... ]
    >>> quantizer = QAT_Quantizer(model, config_list)
    >>> model = quantizer.compress()
    """

    def spec(self, site: str, target: Target) -> str:
        ending = "/channel" if target.per_channel else ""
        averaged = "" if site in ("weight", "bias") else ",observer=ema,momentum=0.99,init=first"
        return f"affine:{target.n_bits},symmetric={target.grid}{averaged}{ending}"


class NaiveQuantizer(Quantizer):
    """8-bit weights by rounding to nearest; without a config list, for every layer with weights.

    NNI truncates toward zero, which has four times the error (docs/algorithms.md I-30).
    """

    def __init__(
        self, model: nn.Module, config_list: Sequence[Mapping[str, Any]] | None = None, optimizer: Any = None
    ) -> None:
        everything = [{"quant_types": ["weight"], "quant_bits": 8, "op_types": ["default"]}]
        given = everything if config_list is None else config_list
        found = [entry for entry in given if entry.get("quant_bits", 8) not in (8, {"weight": 8})]
        if found:
            raise ConfigError(
                f"quant_bits of NaiveQuantizer must be 8, got {found[0]['quant_bits']!r}; QAT_Quantizer takes others"
            )
        super().__init__(model, given, optimizer)

    def spec(self, site: str, target: Target) -> str | None:
        if site != "weight":
            raise ConfigError(f"NaiveQuantizer quantizes weights only, got quant_types with '{site}'")
        return "affine:8,symmetric=narrow"


class DoReFaQuantizer(Quantizer):
    """Weights of DoReFa-Net (Zhou et al. 2016); for activations and gradients see `torchquant.DoReFa`."""

    exports = "quantized"

    def spec(self, site: str, target: Target) -> str:
        return f"dorefa:{target.n_bits}"


class BNNQuantizer(Quantizer):
    """Signs of binarized neural networks (Courbariaux et al. 2016); latent weights are kept in [-1, 1]."""

    exports = "quantized"

    def spec(self, site: str, target: Target) -> str:
        if target.n_bits != 1:
            raise ConfigError(f"quant_bits of BNNQuantizer must be 1, got {target.n_bits}")
        return "bnn" if site == "weight" else "bnn@hardtanh"

    def _before_forward(self, model: nn.Module) -> None:
        if not model.training:
            return
        with torch.no_grad():
            for slot in weight_slots(model):
                if slot.quantizer is not None:
                    parameter_of(slot.module.layer, slot.name).clamp_(-1.0, 1.0)


class LsqQuantizer(Quantizer):
    """Learned step size (Esser et al. 2020). Codes are signed where the first tensor goes below 0 (I-27)."""

    def spec(self, site: str, target: Target) -> str:
        return f"lsq:{target.n_bits}" + ("/channel" if target.per_channel else "")


class LsqPlusQuantizer(Quantizer):
    """LSQ with a learned offset for activations (Bhalgat et al. 2020)."""

    def spec(self, site: str, target: Target) -> str:
        ending = "/channel" if target.per_channel else ""
        return f"lsqplus:{target.n_bits}{ending}"


class ObserverQuantizer(Quantizer):
    """Post-training: calibrate by running the model, then `compress()` fixes the ranges and quantizes.

    Weights are symmetric with 8 bits per tensor; activations are asymmetric with 7 of their 8 bits (reduce_range), as
    in NNI.
    """

    exports = "quantized"

    def __init__(
        self, model: nn.Module, config_list: Sequence[Mapping[str, Any]], optimizer: Any = None, dummy_input: Any = None
    ) -> None:
        self._is_compressed = False
        super().__init__(model, config_list, optimizer, dummy_input)

    def spec(self, site: str, target: Target) -> str:
        if target.n_bits != 8:
            raise ConfigError(
                f"quant_bits of {type(self).__name__} must be 8, got {target.n_bits}; QAT_Quantizer takes others"
            )
        return "affine:8,symmetric=narrow" if site in ("weight", "bias") else "affine:7,observer=running"

    def _state_of(self, path: str, module: QModule) -> QModuleState:
        return QModuleState.QUANT_EVAL if self._is_compressed else QModuleState.CALIBRATION

    def compress(self, max_steps: int | None = None, max_epochs: int | None = None) -> Any:
        """Stop observing, quantize from now on, in evaluation mode. Raises ConfigError if a quantizer saw no data."""
        if self.evaluator is not None and self.evaluator.evaluating_func is not None:
            with torch.no_grad():
                self.evaluator.evaluating_func(self.bound_model)
        observe_any_weights(self.bound_model)
        unseen = [p for p, m in qmodules(self.bound_model) if not all(q.is_ready for q in m.quantizers().values())]
        if unseen:
            raise ConfigError(f"{', '.join(unseen)} saw no data; run some batches through the model before compress()")
        self._is_compressed = True
        set_qmodule_state(self.bound_model.eval(), QModuleState.QUANT_EVAL)
        if self.evaluator is None:
            return self.bound_model
        return self.bound_model, calibration_config(self.bound_model, self.layers, modern=True)


class PtqQuantizer(ObserverQuantizer):
    """NNI 3.0's post-training quantizer: any width, ranges over all data seen."""

    exports = "float"

    def spec(self, site: str, target: Target) -> str:
        ending = "/channel" if target.per_channel else ""
        seen = "" if site in ("weight", "bias") else ",observer=running"
        return f"affine:{target.n_bits},symmetric={target.grid}{seen}{ending}"


QATQuantizer = QAT_Quantizer
