"""Low-rank adapters of PEFT beside the layers of a quantized model."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from torchquant._arguments import checked
from torchquant._shown import shown, some
from torchquant.deploy.packed.weight_codes import CodesQuantizer
from torchquant.errors import ConfigError, require
from torchquant.qmodule import QModule, QModuleState
from torchquant.utils import qmodules

_peft: Any = require("peft", "peft")
_lora: Any = require("peft.tuners.lora", "peft")

STARTS = (True, False, "gaussian", "orthogonal")
"""Values of `init_lora_weights` that leave the weight of the layer as it is."""


@checked
def quantized_lora(model: nn.Module, config: Any) -> Any:
    """Let a LoraConfig target the quantized Linear and Conv1D layers of a model; returns the config.

    Use it where PEFT takes a config: `peft.get_peft_model(model, quantized_lora(model, config))`, and
    `PeftModel.from_pretrained(model, folder, config=quantized_lora(model, PeftConfig.from_pretrained(folder)))`. The
    adapters read and add to real values beside the layer; they train, and the model stays quantized and frozen, also
    one that was loaded from codes.

    Merging adds the adapters to the float weights, which are then quantized anew, with a warning: rounding changes the
    outputs, and what is finer than a step of the grid is lost. Codes are fixed, so that merging into them raises
    ConfigError. Raises ConfigError for a model that is not in QUANT_EVAL, for layers with fused parts, and for
    options that read or change the weight of a layer; MissingDependencyError.

    >>> import peft, torchquant as tq
    >>> model = tq.quantize(nn.Sequential(nn.Linear(4, 4)), [{"weight": "affine:4/channel"}])
    >>> tq.observe_weights(model)
    >>> tq.set_qmodule_state(model, tq.QModuleState.QUANT_EVAL)
    >>> adapted = peft.get_peft_model(model, quantized_lora(model, peft.LoraConfig(r=2, target_modules=["0"])))
    >>> [name for name, p in adapted.named_parameters() if p.requires_grad]
    ['base_model.model.0.lora_A.default.weight', 'base_model.model.0.lora_B.default.weight']
    """
    if not isinstance(config, _peft.LoraConfig):
        raise ConfigError(f"quantized_lora: config must be a peft.LoraConfig, got {shown(config)}")
    if config.init_lora_weights not in STARTS:
        raise ConfigError(
            f"init_lora_weights={config.init_lora_weights!r} changes the weights of the model, which are quantized; "
            f"use one of {', '.join(map(repr, STARTS))}"
        )
    if not (found := list(qmodules(model))):
        raise ConfigError(f"quantized_lora: {type(model).__name__} is a float model; PEFT takes it as it is")
    if other := [path for path, module in found if module.state is not QModuleState.QUANT_EVAL]:
        raise ConfigError(
            f"the model under adapters is frozen, in QUANT_EVAL, but {some(other)} are not. Calibrate it, or call "
            "torchquant.set_qmodule_state(model, QModuleState.QUANT_EVAL)"
        )
    for module in model.modules():
        if isinstance(module, CodesQuantizer):
            module.trains_beside = True
    config._register_custom_module({QModule: QuantizedLora})
    return config


class QuantizedLora(_lora.Linear):  # type: ignore[misc]
    """The adapters of one quantized layer; made by PEFT for a config of `quantized_lora`."""

    def __init__(self, base_layer: Any, adapter_name: str, config: Any, **options: Any) -> None:
        layer = base_layer.held
        is_conv1d = type(layer).__name__ == "Conv1D"
        if not (is_conv1d or isinstance(layer, nn.Linear)):
            raise ConfigError(
                f"{base_layer.path}: adapters beside a quantized {type(layer).__name__} are not supported; target "
                "Linear and Conv1D layers"
            )
        if fused := [part for part in (base_layer.bn, base_layer.activation) if part is not None]:
            raise ConfigError(
                f"{base_layer.path}: {type(fused[-1]).__name__} is fused into the quantized layer, and an adapter adds "
                "before it. Quantize layers one by one: QuantPlan.from_rules(rules, model, example, trace=False)"
            )
        config.fan_in_fan_out = is_conv1d
        super().__init__(base_layer, adapter_name, config=config, is_target_conv_1d_layer=is_conv1d, **options)
        if adapter_name in self.lora_variant:
            raise ConfigError(
                f"{base_layer.path}: a {type(self.lora_variant[adapter_name]).__name__} reads the weight of the layer, "
                "which is quantized; use plain LoRA"
            )

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        found: tuple[int, int] = super()._get_in_out_features(module.held)
        return found

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters to the float weight, and let its quantizer observe it. Raises ConfigError for codes."""
        base = self.get_base_layer()
        if any(isinstance(quantizer, CodesQuantizer) for quantizer in base.quantizers().values()):
            raise ConfigError(
                f"{base.path}: adapters cannot be merged into codes, which are fixed. Keep them beside the model, or "
                "load them onto a model that was saved with save_as='float'"
            )
        super().merge(safe_merge, adapter_names)
        base.observe_weight()
        warnings.warn(
            "adapters were merged into weights that are quantized anew: outputs change by the rounding to the grid",
            stacklevel=2,
        )

    def unmerge(self) -> None:
        """Take the adapters out of the float weight again, and let its quantizer observe it."""
        super().unmerge()
        self.get_base_layer().observe_weight()
