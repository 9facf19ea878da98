"""NNI's quantizers: what scheme each chooses for the tensors of a config list, and how it trains or calibrates."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchquant.compat.nni.base import Quantizer
from torchquant.compat.nni.config import Target
from torchquant.compat.nni.evaluators import Evaluator
from torchquant.compat.nni.named_targets import OwnHook
from torchquant.errors import ConfigError
from torchquant.ptq import run as run_stages
from torchquant.qmodule import QModule, QModuleState
from torchquant.qmodule.weight_slots import parameter_of
from torchquant.quantizers_functional.dorefa import check_dorefa, dorefa_gradient
from torchquant.utils import observe_any_weights, qmodules, set_qmodule_state, weight_slots


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
        averaged = "" if site in ("weight", "bias") else ",observer=ema,momentum=0.99,init=first"
        return _affine(target, averaged)


class QATQuantizer(QAT_Quantizer):
    """The QAT quantizer of NNI 3.0. `quant_start_step`: the steps of training before it quantizes."""

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        evaluator: Evaluator | torch.optim.Optimizer | None = None,
        quant_start_step: int = 0,
        existed_wrappers: Mapping[str, QModule] | None = None,
        **kwargs: Any,
    ) -> None:
        self.quant_start_step = quant_start_step
        super().__init__(model, config_list, evaluator, existed_wrappers=existed_wrappers, **kwargs)

    def _start_step(self, path: str) -> int:
        return max(super()._start_step(path), self.quant_start_step + 1)


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
    """DoReFa-Net (Zhou et al. 2016): weights by tanh, outputs in [0, 1]; inputs by their range, as in NNI 3.0.

    `gradient_bits`: the gradients of the outputs of layers that quantize their weight and not their output are
    quantized to so many bits; None leaves them real, where NNI 3.0 uses the bits of the weight. Maths:
    `torchquant.quantizers.DoReFaQuantizer`, `torchquant.quantizers_functional.dorefa_gradient`.
    """

    exports = "quantized"

    def __init__(self, *args: Any, gradient_bits: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if gradient_bits is None:
            return
        for path, config in self.layers.items():
            if "weight" in config.targets and "output" not in config.targets:
                self.bound_model.get_submodule(path).register_forward_hook(_QuantizeGradient(gradient_bits))

    def spec(self, site: str, target: Target) -> str:
        if site == "input":
            return _affine(target, ",observer=ema,momentum=0.99,init=first")
        return f"dorefa:{target.n_bits}{target.ending}"


class _QuantizeGradient(OwnHook):
    """Forward hook that quantizes the gradient of an output."""

    def __init__(self, n_bits: int) -> None:
        check_dorefa(n_bits, "gradient_bits")
        self.n_bits = n_bits

    def __call__(self, module: QModule, args: Any, output: Any) -> Any:
        is_quantized = module.training and module.state.is_weight_quantized and isinstance(output, Tensor)
        return dorefa_gradient(output, self.n_bits) if is_quantized else output


class BNNQuantizer(Quantizer):
    """Signs of binarized neural networks (Courbariaux et al. 2016); latent weights are kept in [-1, 1]."""

    exports = "quantized"

    def spec(self, site: str, target: Target) -> str:
        if target.n_bits != 1 and not target.text:
            raise ConfigError(f"quant_bits of BNNQuantizer must be 1, got {target.n_bits}")
        if target.text not in ("", "None", "int1", "uint1"):
            warnings.warn(f"BNNQuantizer quantizes to 1 bit; the quant_dtype {target.text} is not used", stacklevel=6)
        if target.ending:
            raise ConfigError(
                f"BNNQuantizer has no scale that could be one a channel; granularity must be default. torchquant's "
                f"scheme xnor has one: torchquant.quantize(model, [{{'weight': 'xnor{target.ending}'}}])"
            )
        return "bnn" if site in ("weight", "bias") else "bnn@hardtanh"

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
        return f"lsq:{target.n_bits}{target.ending}"


class LsqPlusQuantizer(Quantizer):
    """LSQ with a learned offset for activations (Bhalgat et al. 2020)."""

    def spec(self, site: str, target: Target) -> str:
        return f"lsqplus:{target.n_bits}{target.ending}"


class ObserverQuantizer(Quantizer):
    """Post-training: calibrate by running the model, then `compress()` fixes the ranges and quantizes.

    Weights are symmetric with 8 bits per tensor; activations are asymmetric with 7 of their 8 bits (reduce_range), as
    in NNI.
    """

    exports = "quantized"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._is_compressed = False
        super().__init__(*args, **kwargs)

    def spec(self, site: str, target: Target) -> str:
        if target.n_bits != 8:
            raise ConfigError(
                f"quant_bits of {type(self).__name__} must be 8, got {target.n_bits}; QAT_Quantizer takes others"
            )
        return "affine:8,symmetric=narrow" if site in ("weight", "bias") else "affine:7,observer=running"

    def _state_of(self, path: str, module: QModule) -> QModuleState:
        return QModuleState.QUANT_EVAL if self._is_compressed else QModuleState.CALIBRATION

    def compress(self, max_steps: int | None = None, max_epochs: int | None = None) -> Any:
        """Stop observing, quantize from now on, in evaluation mode. Raises ConfigError if a quantizer saw no data.

        With an evaluator, the model is evaluated first, so that its quantizers see data. An evaluator that cannot
        evaluate trains for `max_steps` or `max_epochs` instead, with real weights.
        """
        if self.evaluator is not None:
            self._observe(max_steps, max_epochs)
        observe_any_weights(self.bound_model)
        unseen = [p for p, m in qmodules(self.bound_model) if not all(q.is_ready for q in m.quantizers().values())]
        if unseen:
            raise ConfigError(f"{', '.join(unseen)} saw no data; run some batches through the model before compress()")
        self._is_compressed = True
        set_qmodule_state(self.bound_model.eval(), QModuleState.QUANT_EVAL)
        return self.bound_model if self.evaluator is None else (self.bound_model, self.get_calibration_config())

    def _observe(self, max_steps: int | None, max_epochs: int | None) -> None:
        evaluator = self.evaluator
        assert evaluator is not None
        if not getattr(evaluator, "evaluating_func", evaluator):
            self._train(max_steps, max_epochs)
            return
        if evaluator.model is not self.bound_model:
            self._bind()
        with torch.no_grad():
            evaluator.evaluate()


class PtqQuantizer(ObserverQuantizer):
    """NNI 3.0's post-training quantizer: any width, ranges over all data seen.

    `is_bias_correction`: the biases take up the mean error of their layers on the inputs of the evaluation
    (`torchquant.ptq`, stage `bias_correction`).
    """

    exports = "float"

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        evaluator: Evaluator | None = None,
        existed_wrappers: Mapping[str, QModule] | None = None,
        is_bias_correction: bool = False,
        **kwargs: Any,
    ) -> None:
        self.is_bias_correction = is_bias_correction
        super().__init__(model, config_list, evaluator, existed_wrappers=existed_wrappers, **kwargs)

    def spec(self, site: str, target: Target) -> str:
        return _affine(target, "" if site in ("weight", "bias") else ",observer=running")

    def compress(self, max_steps: int | None = None, max_epochs: int | None = None) -> Any:
        if not self.is_bias_correction:
            return super().compress(max_steps, max_epochs)
        batches: list[Any] = []
        handle = self.bound_model.register_forward_pre_hook(
            lambda module, args, kwargs: batches.append((args, kwargs) if kwargs else args), with_kwargs=True
        )
        try:
            found = super().compress(max_steps, max_epochs)
        finally:
            handle.remove()
        run_stages(self.bound_model, ["bias_correction"], batches, show_progress=False)
        return found


def _affine(target: Target, observer: str) -> str:
    gradient = target.gradient and f"@{target.gradient}"
    return f"affine:{target.n_bits},symmetric={target.grid}{observer}{target.ending}{gradient}"
