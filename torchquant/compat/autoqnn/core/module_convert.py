"""AutoQNN's `convert`: every layer of a model gets quantizers, and what stays float is said."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from torchquant._shown import some
from torchquant._tables import text_table
from torchquant.compat.autoqnn.modules import LAYERS, MORE_LAYERS, QuantLayer, layer_class
from torchquant.compat.autoqnn.quantizers import Quantization
from torchquant.compat.autoqnn.quantizers.quantization import without_data
from torchquant.errors import ConfigError, StaysFloatWarning
from torchquant.graph import Site, SitePlan, Unquantized, capture
from torchquant.graph.sites import NORM_WHY
from torchquant.plan import QuantPlan
from torchquant.plan.quant_plan import what_is_at
from torchquant.qmodule import QModule
from torchquant.qmodule.patterns import stock_type
from torchquant.quantizers import Quantizer

DEFAULT_QUANTIZE_MODULE_MAPPINGS: dict[type[nn.Module], type[nn.Module]] = {
    layer.kind: layer for layer in (*LAYERS, *MORE_LAYERS)
}
SLOTS = {"weight_quant": "weight", "bias_quant": "bias", "act_quant": "input"}
NOT_MAPPED = "its class is not in the mapping"
NO_QUANTIZER = "no quantizer is given for it"
BIASES_FLOAT = "its biases stay float: bias_quant quantizes those of convolutions and Linear"
WANTED = (NORM_WHY, NOT_MAPPED)


def convert(
    module: nn.Module,
    mapping: Mapping[type[nn.Module], type[nn.Module]] | None = None,
    inplace: bool = False,
    quantize_config_dict: Mapping[str, Quantizer | None] | None = None,
) -> nn.Module:
    """Copy a module so that its layers quantize, also if it is a layer itself. Weights, device and mode are kept.

    `mapping`: torch class -> class of `autoqnn.modules`, for the layers to convert; by default every layer that
    torchquant can quantize, those of `register_pattern` too. `quantize_config_dict`: "weight_quant", "bias_quant",
    "act_quant" (at the input of the layer) -> a quantizer, your own or a shipped one, or None; every layer gets a new
    clone of it. The `plan` of the result lists what is quantized and what stays float, and why; the latter is printed,
    with a StaysFloatWarning unless it is a normalization or not in your mapping. Raises ConfigError.

    >>> from torchquant.compat import autoqnn
    >>> model = convert(
    ...     nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)),
    ...     quantize_config_dict={
    ...         "weight_quant": autoqnn.quantizers.FixedQuant(bitwidth=4),
    ...         "act_quant": autoqnn.quantizers.FixedQuantAct(bitwidth=4),
    ...     },
    ... )
    left float  what       why
    ----------  ---------  ---------------------------
    1           LayerNorm  a normalization stays float
    >>> type(model[0]).__name__, len(model.plan.sites)
    ('Linear', 1)
    """
    given = dict(quantize_config_dict or {})
    for key, quantizer in given.items():
        if key not in SLOTS:
            raise ConfigError(f"the keys of quantize_config_dict must be among {', '.join(SLOTS)}; got {key!r}")
        if quantizer is not None and not isinstance(quantizer, Quantizer):
            raise ConfigError(f"quantize_config_dict['{key}'] must be a quantizer or None, got {quantizer!r}")
    for kind, target in (mapping or {}).items():
        if not (isinstance(target, type) and issubclass(target, QuantLayer)) or target.kind is not kind:
            raise ConfigError(
                f"mapping must map a torch layer to the autoqnn.modules layer of the same name, got {kind} -> {target}"
            )
    plan = _plan(
        module, mapping, {SLOTS[key]: q for key, q in given.items() if q is not None and type(q) is not Quantization}
    )
    converted = plan.apply(module, inplace)
    planned = {site.path for site in plan.sites}
    for path, part in list(converted.named_modules()):
        if path in planned and isinstance(part, QModule):
            found: Any = (mapping or {}).get(stock_type(part.layer)) or layer_class(part)  # type: ignore[arg-type]
            part.__class__ = found
    converted.plan = plan  # type: ignore[assignment]
    _say_what_stays_float(plan)
    return converted


def _plan(
    module: nn.Module, mapping: Mapping[type[nn.Module], type[nn.Module]] | None, given: Mapping[str, Quantizer]
) -> QuantPlan:
    captured = capture(module, trace=False, fuse=False)
    sites: list[SitePlan] = []
    norms = [site for site in captured.sites if site.module is not None and not site.is_layer]
    floats = [*captured.floats, *(_float(site, NORM_WHY) for site in norms)]
    layers = [site for site in captured.sites if site.module is not None and site.is_layer]
    for site in layers:
        assert site.module is not None
        if mapping is not None and stock_type(site.module) not in mapping:
            floats.append(_float(site, NOT_MAPPED))
            continue
        fields: dict[str, Any] = {slot: Clones(q) for slot, q in given.items() if slot in site.fields}
        sites.append(SitePlan(site.path, **fields))
        if not fields:
            floats.append(_float(site, NO_QUANTIZER))
        if "bias" in given and "bias" not in site.fields and "input" in site.fields and _has_bias(site.module):
            floats.append(_float(site, BIASES_FLOAT))
    types = {site.path: what_is_at(site) for site in layers}
    return QuantPlan(tuple(sites), tuple(floats), trace=False, fuse=False, types=types)


def _float(site: Site, why: str) -> Unquantized:
    return Unquantized(site.path, site.types[-1], why)


def _has_bias(layer: nn.Module) -> bool:
    return any("bias" in name.rpartition(".")[2] for name, _ in layer.named_parameters())


def _say_what_stays_float(plan: QuantPlan) -> None:
    if plan.floats:
        print(text_table(["left float", "what", "why"], ([f.path or "(root)", f.type, f.why] for f in plan.floats)))
    unwanted = [f"{left.path or '(root)'} ({left.why})" for left in plan.floats if left.why not in WANTED]
    told = f"convert leaves float: {some(unwanted, 5, '; ')}" if unwanted else ""
    if not plan.sites:
        told = "convert found no layer to quantize: all of the model stays float"
    if told:
        warnings.warn(f"{told}. print(model.plan) lists everything", StaysFloatWarning, stacklevel=3)


@dataclass(frozen=True)
class Clones:
    """Makes a new clone of a quantizer for every layer, as a plan takes it for a slot; it can be pickled."""

    quantizer: Quantizer

    def __call__(self, layer: nn.Module) -> Quantizer:
        return clone_quantizer(self.quantizer)

    def __getattr__(self, name: str) -> str:
        if name != "__name__":
            raise AttributeError(name)
        return f"{type(self.quantizer).__name__}:{self.quantizer.n_bits}"


def clone_quantizer(quantizer: Quantizer) -> Quantizer:
    """Copy a quantizer without its observed data; one of AutoQNN copies itself."""
    return quantizer.clone_quantizer() if isinstance(quantizer, Quantization) else without_data(quantizer)
