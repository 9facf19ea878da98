"""NNI's calibration config: export it beside the weights, and restore it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchquant.compat.nni.config import LayerConfig
from torchquant.errors import ConfigError
from torchquant.qmodule import QModule
from torchquant.quantizers import Quantizer
from torchquant.quantizers._base import UniformQuantizer
from torchquant.quantizers._learned import LearnedUniform
from torchquant.utils import qmodules

MODERN_NAMES = {"input": "_input_", "output": "_output_"}


def calibration_config(
    model: nn.Module, layers: Mapping[str, LayerConfig] | None = None, modern: bool = False
) -> dict[str, dict[str, Any]]:
    """Return module -> numbers of its quantizers, with the keys of NNI 2.x, or of 3.0 if `modern`.

    `layers`: the settings of a config list, whose bits and names are used; None: any quantized model, in 2.x.
    2.x: `weight_bits`, `weight_scale`, `weight_zero_point`, `input_bits`, `tracked_min_input`, `tracked_max_input`,
    the same for `output`. 3.0: target -> scale, zero_point, quant_dtype, quant_scheme, quant_bits, tracked_min,
    tracked_max. Numbers are floats, or tensors (C,) per channel; numbers that a scheme does not have are left out.
    """
    config: dict[str, dict[str, Any]] = {}
    for path, module in qmodules(model):
        asked = layers[path].targets if layers is not None and path in layers else {}
        for site, quantizer in module.quantizers().items():
            target = asked.get(site)
            if layers is not None and target is None:
                continue
            known = _numbers(quantizer)
            bits = quantizer.n_bits if target is None else target.n_bits
            entry = config.setdefault(path, {})
            if modern and target is not None:
                words = {"quant_dtype": f"{target.dtype}{bits}", "quant_scheme": target.scheme.rpartition("_")[2]}
                entry[MODERN_NAMES.get(site, site)] = {**known, **words, "quant_bits": bits}
            else:
                entry[f"{site}_bits"] = bits
                entry.update(_legacy(site, known))
    return config


def _legacy(site: str, known: Mapping[str, Any]) -> dict[str, Any]:
    if site in ("weight", "bias"):
        names = {"scale": f"{site}_scale", "zero_point": f"{site}_zero_point"}
    else:
        names = {"tracked_min": f"tracked_min_{site}", "tracked_max": f"tracked_max_{site}"}
    return {names[name]: value for name, value in known.items() if name in names}


def _numbers(quantizer: Quantizer) -> dict[str, Any]:
    """Return scale, zero point and tracked range of a uniform quantizer that has seen data; {} for another."""
    if not isinstance(quantizer, UniformQuantizer | LearnedUniform) or not quantizer.is_ready:
        return {}
    delta, zero_point, qmin, qmax = quantizer.affine_params()
    low, high = (qmin - zero_point) * delta, (qmax - zero_point) * delta
    if isinstance(quantizer, UniformQuantizer):
        low, high = quantizer.observer.get_ranges()
    found = {"scale": delta, "zero_point": zero_point, "tracked_min": low, "tracked_max": high}
    return {name: _plain(value) for name, value in found.items()}


def _plain(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone() if value.ndim else float(value.detach())


def restore_calibration(model: nn.Module, config: Mapping[str, Mapping[str, Any]]) -> None:
    """Give the activation quantizers the ranges of a 2.x config. Raises ConfigError for a config of another model."""
    known = dict(qmodules(model))
    for path, entry in config.items():
        if path not in known:
            raise ConfigError(
                f"the calibration config has '{path}', which is not quantized here; it belongs to another model"
            )
        for site in ("input", "output"):
            if f"tracked_max_{site}" in entry:
                _restore(known[path], path, site, entry)


def _restore(module: QModule, path: str, site: str, entry: Mapping[str, Any]) -> None:
    quantizer = module.quantizers().get(site)
    if quantizer is None:
        raise ConfigError(f"the calibration config has a range for the {site} of '{path}', which is not quantized here")
    bits = entry.get(f"{site}_bits", quantizer.n_bits)
    reduced = getattr(quantizer, "n_bits", bits) == 7 and bits == 8  # reduce_range
    if bits != quantizer.n_bits and not reduced:
        raise ConfigError(
            f"the calibration config has {bits} bits for the {site} of '{path}', but the model has {quantizer.n_bits}"
        )
    low, high = entry[f"tracked_min_{site}"], entry[f"tracked_max_{site}"]
    if isinstance(quantizer, UniformQuantizer):
        quantizer.observer.force_ranges(low, high)
    elif isinstance(quantizer, LearnedUniform):
        low = torch.as_tensor(low, dtype=torch.float64)
        signed = bool((low < 0).any())
        n_codes = 2 ** (quantizer.n_bits - signed) - 1
        quantizer.force(torch.as_tensor(high, dtype=torch.float64) / n_codes, torch.full_like(low, -float(signed)))
    else:
        raise ConfigError(f"the {site} of '{path}' has no range to restore ({type(quantizer).__name__})")
