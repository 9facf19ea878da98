"""The base of NNI's quantizers, which compiles a config list to a plan, applies it to a model and follows its modes.

The model is changed in place, as in NNI. A quantizer is a module that runs the model, so that it can be wrapped in
DataParallel or DistributedDataParallel. In training quantizers observe and quantize; in evaluation they quantize.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from torchquant._files import write_whole
from torchquant._shown import shown, some
from torchquant.compat._modes import FollowMode, state_for
from torchquant.compat.nni.calibration import calibration_config, restore_calibration
from torchquant.compat.nni.compiled import compile_config
from torchquant.compat.nni.config import LayerConfig, Target
from torchquant.compat.nni.evaluators import Evaluator
from torchquant.compat.nni.named_targets import is_used
from torchquant.errors import ConfigError, ExportError
from torchquant.plan import QuantPlan
from torchquant.qmodule import QModule, QModuleState, WeightSlot
from torchquant.qmodule.weight_slots import parameter_of
from torchquant.utils import observe_any_weights, quantizer_parameters, set_qmodule_state, weight_slots


class _FollowSteps(FollowMode):
    """Does the same as FollowMode, and keeps modules from quantizing before their `quant_start_step`."""

    def __init__(self, quantizer: Quantizer) -> None:
        self.quantizer = quantizer

    def __call__(self, model: nn.Module, args: Any) -> None:
        self.set_states(model)
        if model.training and self.quantizer._counts_forwards:
            self.quantizer._count_step()

    def set_states(self, model: nn.Module) -> None:
        self.quantizer._before_forward(model)
        super().set_states(model)

    def state_of(self, path: str, module: QModule) -> QModuleState:
        return self.quantizer._state_of(path, module)


class Quantizer(nn.Module):
    """The base of NNI's quantizers. `config_list`: see `config.py` and `config_3.py` here, for both spellings.

    `optimizer`: its steps are counted for `quant_start_step`, and it gets the learned parameters of quantizers; without
    it forwards in training are counted. In NNI 3.0 an `evaluator` is in its place, for `compress(max_steps,
    max_epochs)`. `dummy_input`: an input of the model; with it all batch norms are folded. Raises ConfigError.
    """

    steps: Tensor
    exports: ClassVar[str] = "float"
    """Weights that `export_model` writes: "float" or "quantized"."""

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        optimizer: torch.optim.Optimizer | Evaluator | None = None,
        dummy_input: Any = None,
        *,
        evaluator: Evaluator | None = None,
        existed_wrappers: Mapping[str, QModule] | None = None,
    ) -> None:
        super().__init__()
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            raise ConfigError(
                f"the model must not be wrapped, got a {type(model).__name__}; give the inner one, wrap the quantizer"
            )
        given = optimizer if evaluator is None else evaluator
        if given is not None and not isinstance(given, torch.optim.Optimizer | Evaluator):
            raise ConfigError(f"the third argument must be an optimizer or an evaluator, got {shown(given)}")
        if existed_wrappers:
            raise ConfigError("existed_wrappers is for from_compressor, which keeps what the other quantizer quantizes")
        self.evaluator = given if isinstance(given, Evaluator) else None
        self.optimizer = None if isinstance(given, Evaluator) else given
        self._counts_forwards = given is None
        if dummy_input is not None and self.exports == "quantized":
            raise ConfigError(f"{type(self).__name__} cannot fold batch norms; leave dummy_input out")
        self.config_list = list(config_list)
        self._compiled = compile_config(model, config_list, self.spec, fuse_bn=dummy_input is not None)
        self.bound_model = self._compiled.apply()
        self.register_buffer("steps", torch.tensor(1))
        observe_any_weights(self.bound_model)
        self.bound_model.register_forward_pre_hook(_FollowSteps(self))
        if self.optimizer is not None:
            learned = quantizer_parameters(self.bound_model)
            if learned["params"]:
                self.optimizer.add_param_group(learned)
            self.optimizer.register_step_post_hook(lambda *_: self._count_step())
        if self.evaluator is not None:
            self._bind()

    @property
    def plan(self) -> QuantPlan:
        """The plan that the config list was compiled to."""
        return self._compiled.plan

    @property
    def layers(self) -> dict[str, LayerConfig]:
        """Path of a module -> the settings that the config list has for it."""
        return self._compiled.layers

    @property
    def _module_wrappers(self) -> dict[str, nn.Module]:
        return {path: self.bound_model.get_submodule(path) for path in self.layers}

    @property
    def _target_spaces(self) -> dict[str, dict[str, Any]]:
        return {path: dict(config.targets) for path, config in self.layers.items()}

    def _get_param_names_map(self) -> dict[str, str]:
        return {name: name for name, _ in self.bound_model.named_parameters()}

    @classmethod
    def from_compressor(
        cls, compressor: Any, new_config_list: Sequence[Mapping[str, Any]], *args: Any, **kwargs: Any
    ) -> Any:
        """Make a quantizer for the model of another one, with the same evaluator; both config lists hold.

        The ranges of the other quantizer are measured again. Raises ConfigError for one of another class: its schemes
        are chosen by its class, so give one class both config lists, or use the target settings of one list.
        """
        if type(compressor) is not cls:
            raise ConfigError(
                f"{cls.__name__}.from_compressor continues a {cls.__name__}, got {shown(compressor)}. A model "
                "quantized by several schemes is made by torchquant.quantize(model, rules), with a rule for each"
            )
        model = compressor.release()
        evaluator = compressor.evaluator or kwargs.pop("evaluator", None)
        return cls(model, [*new_config_list, *compressor.config_list], evaluator, *args, **kwargs)

    def release(self) -> nn.Module:
        """Turn the bound model back into the float model, in place, and return it; the evaluator lets go of it."""
        return self._compiled.revert(self.release_hooks(), inplace=True)

    def release_hooks(self) -> nn.Module:
        """Let go of the bound model, which keeps its quantizers and its states, and return it."""
        if self.evaluator is not None:
            self.evaluator.unbind_model()
        for key, hook in list(self.bound_model._forward_pre_hooks.items()):
            if isinstance(hook, FollowMode):
                del self.bound_model._forward_pre_hooks[key]
        return self.bound_model

    def _bind(self) -> None:
        assert self.evaluator is not None
        self.evaluator.bind_model(self.bound_model, self._get_param_names_map())
        self.evaluator.patch_optimizer_step([], [self._count_step])

    def track_forward(self, *args: Any, **kwargs: Any) -> None:
        """Run the model once, so that its quantizers see this input."""
        tensor = next(self.bound_model.parameters(), None)
        device = torch.device("cpu") if tensor is None else tensor.device
        args, kwargs = tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, (args, kwargs))
        with torch.no_grad():
            self.bound_model(*args, **kwargs)

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

    def _start_step(self, path: str) -> int:
        config = self.layers.get(path)
        return 0 if config is None else config.start_step

    def _state_of(self, path: str, module: QModule) -> QModuleState:
        start = self._start_step(path)
        if start > 1 and int(self.steps) < start:
            return QModuleState.CALIBRATION if module.training else QModuleState.BYPASSED
        return state_for(module)

    def compress(self, max_steps: int | None = None, max_epochs: int | None = None) -> Any:
        """Return the quantized model; with a TorchEvaluator, train it first and return (model, calibration config)."""
        if self.evaluator is None:
            return self.bound_model
        if max_steps is None and max_epochs is None:
            raise ConfigError("compress needs max_steps, max_epochs or both, to know how long to train")
        self._train(max_steps, max_epochs)
        observe_any_weights(self.bound_model)
        return self.bound_model, self.get_calibration_config()

    def _train(self, max_steps: int | None, max_epochs: int | None) -> None:
        assert self.evaluator is not None
        if self.evaluator.model is not self.bound_model:
            self._bind()
        self.evaluator.train(max_steps, max_epochs)

    def get_calibration_config(self) -> dict[str, dict[str, Any]]:
        """Return module -> target -> its numbers, with the keys of NNI 3.0."""
        return calibration_config(self.bound_model, self.layers, modern=True)

    def float_model(self) -> nn.Module:
        """Return a float copy of the model with the current weights and unfolded batch norms."""
        model = self._compiled.revert(self.bound_model)
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
        if onnx_path is not None and is_used(self.bound_model):
            raise ExportError(
                "the model has quantizers at further inputs or outputs, or of tensors that are no weight of a layer; "
                "ONNX export has no place for them. Leave them out of the config list"
            )
        observe_any_weights(self.bound_model)
        exported = self.float_model()
        if self.exports == "quantized":
            folded = [slot.key for slot in weight_slots(self.bound_model) if _is_folded(slot)]
            if folded:
                warnings.warn(
                    f"{some(folded, 3)} stay real in {model_path}: they are quantized with a batch norm folded in, "
                    "which is a module of its own in the file",
                    stacklevel=2,
                )
            for slot in weight_slots(self.bound_model):
                if (quantizer := slot.quantizer) is not None and not _is_folded(slot):
                    quantized = slot.stored_layout(quantizer(slot.seen()))
                    stored = parameter_of(exported.get_submodule(slot.path), slot.name)
                    stored.copy_(quantized)
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
        """Restore the ranges of a calibration config of 2.x or 3.0; scales follow from them. Raises ConfigError."""
        restore_calibration(self.bound_model, config)

    update_calibration_config = load_calibration_config


def _is_folded(slot: WeightSlot) -> bool:
    return slot.quantizer is not None and getattr(slot.module, "fold_mode", None) is not None
