"""The quantizer that transformers calls as it loads and saves a model."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from torchquant._shown import some
from torchquant.deploy.packed.weight_codes import coded_tensors, quantized_slots
from torchquant.errors import ConfigError, require
from torchquant.graph.traced import TracedModule, remove
from torchquant.integrations.transformers.carriers import Carriers, entries_of
from torchquant.integrations.transformers.config import METHOD, TorchquantConfig
from torchquant.integrations.transformers.saved_tensors import (
    expect_floats,
    load_quantized,
    tensors_to_save,
    types_of_weights,
)
from torchquant.plan import QuantPlan, quantize
from torchquant.qmodule import QModuleState
from torchquant.qmodule.weight_slots import WeightSlot
from torchquant.utils import observe_weights, qmodules, set_qmodule_state, state_report

GUARD = (
    "of a model that torchquant quantized - run 'import torchquant.integrations.transformers' before from_pretrained"
)
"""The `attn_implementation` in config.json of a saved model. Without the method "torchquant", transformers would warn
and load floats or random numbers; with it, it raises an error with this text. It is removed before a model is made."""

_quantizers: Any = require("transformers.quantizers.auto", "transformers")


@_quantizers.register_quantizer(METHOD)
class TorchquantHfQuantizer(_quantizers.HfQuantizer):  # type: ignore[misc]
    """Quantizes a model after its float weights are loaded, or loads one that was saved quantized.

    transformers makes it for a `TorchquantConfig`; the methods are those of its HfQuantizer.
    """

    requires_calibration = False
    is_trainable = True
    is_qat_trainable = True
    quantization_config: TorchquantConfig
    _carriers: Carriers | None = None

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """Tell that `save_pretrained` works."""
        return True

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """Raise ConfigError for a model that would be spread over devices, or offloaded."""
        places = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
        if len(places) > 1 or "disk" in places:
            raise ConfigError(f"a quantized model is loaded onto one device; got device_map={device_map!r}")

    def update_attn_implementation(self, config: Any) -> Any:
        """Remove the guard from the config, so that the model takes its own default."""
        if config._attn_implementation == GUARD:
            config._attn_implementation = None
        return config

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Raise ConfigError for another type than that of the weights that the codes stand for."""
        kinds = sorted({form[1] for form in self.quantization_config.weights.values()})
        if self.pre_quantized and kinds and str(dtype).removeprefix("torch.") not in kinds:
            raise ConfigError(
                f"the codes of this model stand for weights of {', '.join(kinds)}; got dtype={dtype}. Load it with "
                "dtype='auto'"
            )
        return dtype

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Keep the type of statistics, which may be finer than the weights beside them."""
        kept = hasattr(param, "get_dtype") and param.get_dtype() == "F64"
        found: torch.dtype | None = None if kept else super().get_new_dtype(converter, param, dtype)
        return found

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **_: Any) -> None:
        if isinstance(model, TracedModule):  # from_pretrained of the class of a model that `quantize` made
            remove(model)
        if not self.pre_quantized:
            return
        entries = entries_of(checkpoint_files or [])
        expect_floats(model, entries)
        self._carriers = Carriers(model, entries, types_of_weights(model, self.quantization_config.head))

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
            raise ConfigError("a quantized model is loaded onto one device; it was spread over several by device_map")
        if self._carriers is None:
            _quantize(model, self.quantization_config)
        else:
            carriers, self._carriers = self._carriers, None
            load_quantized(model, self.quantization_config, carriers.take())
        attach(model, self)
        model.eval()  # also what was added after transformers set this
        _tell_unready(model)
        return model

    @torch.no_grad()
    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """Turn the model into a float one, in place, whose weights are the values of their codes.

        A weight that is tied to one of other values, such as that of a float embedding, is untied.
        """
        slots = list(quantized_slots(model).values())
        if _untie(model, slots):
            for config in (model.config, model.config.get_text_config()):
                config.tie_word_embeddings = False
        for slot in slots:
            assert slot.quantizer is not None
            slot.set_weight(slot.quantizer(slot.seen()))
        model.plan.revert(model, inplace=True)
        for module in model.modules():
            module.__dict__.pop("hf_quantizer", None)
        model.hf_quantizer = self  # transformers removes it, with the config
        return model if dtype is None else model.to(dtype)

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """Return the tensors that `save_pretrained` writes; the model's config gets what is needed to load them.

        A model that was turned back into a float one is saved as such. Raises ExportError that names a weight that
        has no codes yet, ConfigError for a part of a model, and for a plan that holds functions.
        """
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # adapters alone are saved
        config = model.config
        if not any(True for _ in qmodules(model)):
            for name in ("quantization_config", "attn_implementation"):
                config.__dict__.pop(name, None)
            return None, {}
        plan = getattr(model, "plan", None)
        if not isinstance(plan, QuantPlan):
            raise ConfigError(
                f"{type(model).__name__} is part of a quantized model, or was quantized without a plan; save the whole "
                "model, quantized with torchquant.quantize"
            )
        if adapted := [path for path, _ in qmodules(model) if path.endswith(".base_layer")]:
            raise ConfigError(
                f"{type(model).__name__} has adapters ({some(adapted)}), which PEFT saves: save the PeftModel, or the "
                "model after merge_and_unload() or unload()"
            )
        own = self.quantization_config
        save_as = own.save_as if own.save_as != "state" else ("codes" if _is_frozen(model) else "float")
        tensors, head = tensors_to_save(model, plan, save_as)
        config.quantization_config, self.quantization_config = own.saved(head, save_as), own.saved(head, own.save_as)
        config.__dict__["attn_implementation"] = GUARD
        model._weight_conversions = []  # names and shapes stay as they are here
        return tensors, {}


def attach(model: nn.Module, hf_quantizer: Any = None) -> None:
    """Let `save_pretrained` of a quantized model of transformers, and of its parts, write what is quantized."""
    base = require("transformers.modeling_utils", "transformers").PreTrainedModel
    if hf_quantizer is None:
        plan: Any = model.plan
        hf_quantizer = TorchquantHfQuantizer(TorchquantConfig(plan, save_as="state"), pre_quantized=False)
    for module in model.modules():
        if isinstance(module, base):
            module.hf_quantizer = hf_quantizer


def _is_frozen(model: nn.Module) -> bool:
    return all(module.state is QModuleState.QUANT_EVAL for _, module in qmodules(model))


def _untie(model: nn.Module, slots: Iterable[WeightSlot]) -> bool:
    """Give slots a weight of their own if others read it as other values. Tells whether there were such slots."""
    coded, found = coded_tensors(model, model.state_dict(keep_vars=True)), False
    first: dict[int, Tensor] = {}
    for slot in slots:
        assert slot.quantizer is not None
        weight, values = slot.weight, slot.quantizer(slot.seen())
        if id(weight) not in coded or not torch.equal(first.setdefault(id(weight), values), values):
            owner, _, leaf = slot.name.rpartition(".")
            own = nn.Parameter(weight.detach().clone(), weight.requires_grad)
            setattr(slot.module.layer.get_submodule(owner), leaf, own)
            found = True
    return found


def _quantize(model: Any, config: TorchquantConfig) -> None:
    """Quantize a float model as the config says, in place; its weights are observed, its activations not yet."""
    rules = config.rules
    if rules is None:
        raise ConfigError("this TorchquantConfig belongs to a saved model; give from_pretrained one with rules")
    if not isinstance(rules, QuantPlan):
        example = _example(model, config.example_inputs)
        if config.trace:
            quantize(model, rules, example, inplace=True)
        else:
            quantize(model, QuantPlan.from_rules(rules, model, example, trace=False), inplace=True)
    else:
        quantize(model, rules, inplace=True)
    observe_weights(model)
    set_qmodule_state(model, QModuleState.QUANT_EVAL)


def _example(model: Any, given: Any) -> Any:
    if given is None and model.main_input_name != "input_ids":
        raise ConfigError(
            f"{type(model).__name__} reads {model.main_input_name}; give TorchquantConfig example_inputs, such as "
            f"{{'{model.main_input_name}': a tensor}}"
        )
    example = model.dummy_inputs if given is None else given
    return tree_map_only(Tensor, lambda x: x.to(model.device), example)


def _tell_unready(model: nn.Module) -> None:
    unready = [f"{row.path} {row.site}" for row in state_report(model) if not row.calibrated]
    if unready:
        warnings.warn(
            f"{len(unready)} quantizers of {type(model).__name__} have seen no data, and raise UnobservedRangeError in "
            f"a forward: {some(unready)}. Run torchquant.calibrate(model, batches)",
            stacklevel=2,
        )
