"""NNI's calibration config: export it beside the weights, and restore it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchquant.compat.nni.config import LayerConfig, Target
from torchquant.compat.nni.named_targets import quantizer_at
from torchquant.errors import ConfigError
from torchquant.qmodule import QModule
from torchquant.quantizers import Quantizer
from torchquant.quantizers._base import UniformQuantizer
from torchquant.quantizers._learned import LearnedUniform
from torchquant.quantizers_functional.formats import UniformGrid
from torchquant.quantizers_functional.groups import Groups
from torchquant.utils import qmodules

NUMBERS = ("scale", "zero_point", "tracked_min", "tracked_max")
MOST_BITS = 12
"""Width up to which the levels of a scheme without a uniform grid are listed."""
MODERN_NAMES = {"input": "_input_0", "output": "_output_0"}


def calibration_config(
    model: nn.Module, layers: Mapping[str, LayerConfig] | None = None, modern: bool = False
) -> dict[str, dict[str, Any]]:
    """Return module -> numbers of its quantizers, with the keys of NNI 2.x, or of 3.0 if `modern`.

    `layers`: the settings of a config list, whose bits and names are used; None: any quantized model, in 2.x.
    2.x: `weight_bits`, `weight_scale`, `weight_zero_point`, `input_bits`, `tracked_min_input`, `tracked_max_input`,
    the same for `output`. 3.0: target -> scale, zero_point, quant_dtype, quant_scheme, quant_bits, tracked_min,
    tracked_max. Numbers are floats, or tensors (C,) per channel; real = (code - zero_point) * scale, and codes of one
    bit are -1 and 1. Numbers that a scheme does not have are left out.
    """
    config: dict[str, dict[str, Any]] = {}
    for path, asked in _asked(model, layers).items():
        for name, (quantizer, target) in asked.items():
            known = _numbers(quantizer)
            bits = quantizer.n_bits if target is None else target.n_bits
            entry = config.setdefault(path, {})
            if modern and target is not None:
                bits = quantizer.n_bits if quantizer.n_bits == 1 else bits
                scheme = "symmetric" if target.symmetric else "affine"
                words = {"quant_dtype": f"{target.dtype}{bits}", "quant_scheme": scheme, "quant_bits": bits}
                entry[MODERN_NAMES.get(name, name)] = {**known, **words}
            else:
                entry[f"{name}_bits"] = bits
                entry.update(_legacy(name, known))
    return config


def _asked(
    model: nn.Module, layers: Mapping[str, LayerConfig] | None
) -> dict[str, dict[str, tuple[Quantizer, Target | None]]]:
    """Return path -> name of a target -> its quantizer, and its settings if `layers` has them."""
    if layers is None:
        return {path: {n: (q, None) for n, q in module.quantizers().items()} for path, module in qmodules(model)}
    found: dict[str, dict[str, tuple[Quantizer, Target | None]]] = {}
    for path, config in layers.items():
        module = model.get_submodule(path)
        own = module.quantizers() if isinstance(module, QModule) else {}
        for name, target in config.targets.items():
            weights = module.weight_slots() if name == "weight" and isinstance(module, QModule) else []
            same = [slot.name for slot in weights] or [name]
            for each in same:
                quantizer = own.get(each) or quantizer_at(module, each)
                if quantizer is not None:
                    found.setdefault(path, {})[each] = (quantizer, target)
    return found


def _legacy(site: str, known: Mapping[str, Any]) -> dict[str, Any]:
    if site in ("weight", "bias"):
        names = {"scale": f"{site}_scale", "zero_point": f"{site}_zero_point"}
    else:
        names = {"tracked_min": f"tracked_min_{site}", "tracked_max": f"tracked_max_{site}"}
    return {names[name]: value for name, value in known.items() if name in names}


def _numbers(quantizer: Quantizer) -> dict[str, Any]:
    """Return scale, zero point and tracked range of a quantizer with evenly spaced levels; {} for another."""
    if not quantizer.is_ready:
        return {}
    grid: Any = quantizer.format()
    grid = grid.whole if isinstance(grid, Groups) else grid
    if isinstance(grid, UniformGrid):
        scale, zero_point = torch.as_tensor(grid.scale) / grid.divisor, grid.zero_point
        if grid.offset is not None:
            zero_point = zero_point - torch.as_tensor(grid.offset) / scale
        low, high = (grid.qmin - zero_point) * scale, (grid.qmax - zero_point) * scale
    else:
        if quantizer.n_bits > MOST_BITS:
            return {}
        levels = grid.levels()
        steps = levels.diff(dim=-1)
        if not torch.allclose(steps, steps[..., :1].expand_as(steps), rtol=1e-4):
            return {}
        low, high, scale = levels[..., 0], levels[..., -1], steps[..., 0]
        zero_point = grid.code_range[0] - low / scale
        if levels.shape[-1] == 2:
            scale, zero_point = high, torch.zeros_like(high)
    if isinstance(quantizer, UniformQuantizer):
        low, high = quantizer.observer.get_ranges()
    found = {"scale": scale, "zero_point": zero_point, "tracked_min": low, "tracked_max": high}
    return {name: _plain(value) for name, value in found.items()}


def _plain(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone() if value.ndim else float(value.detach())


def restore_calibration(model: nn.Module, config: Mapping[str, Mapping[str, Any]]) -> None:
    """Give the quantizers the ranges of a config of 2.x or 3.0. Raises ConfigError for a config of another model.

    Weights take theirs from a config of 3.0; one of 2.x has none that would not follow from the weight.
    """
    known = dict(qmodules(model))
    for path, entry in config.items():
        if path not in known:
            raise ConfigError(
                f"the calibration config has '{path}', which is not quantized here; it belongs to another model"
            )
        for site, numbers in _numbers_by_site(entry).items():
            _restore(known[path], path, site, numbers)


def differences(model: nn.Module, config: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Map the modules of a restored config to what their quantizers compute otherwise than NNI's."""
    known, found = dict(qmodules(model)), {}
    for path, entry in config.items():
        for site in _numbers_by_site(entry):
            quantizer = known[path].quantizers()[site]
            if isinstance(quantizer, LearnedUniform) and quantizer.code_range[0] < 0:
                lowest = quantizer.code_range[0]
                found[path] = f"signed codes of LSQ begin at {lowest} here, at {lowest + 1} there"
    return found


def _numbers_by_site(entry: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the numbers of each quantizer of a module, with the keys of 3.0."""
    if all(isinstance(value, Mapping) for value in entry.values()):
        names = {name: site for site, name in MODERN_NAMES.items()}
        return {names.get(name, name): value for name, value in entry.items() if "scale" in value}
    keys = ("tracked_min", "tracked_max")
    return {
        site: {"quant_bits": entry.get(f"{site}_bits"), "scale": None, **{key: entry[f"{key}_{site}"] for key in keys}}
        for site in MODERN_NAMES
        if f"tracked_max_{site}" in entry
    }


def _restore(module: QModule, path: str, site: str, numbers: Mapping[str, Any]) -> None:
    quantizer = module.quantizers().get(site)
    if quantizer is None:
        raise ConfigError(f"the calibration config has a range for the {site} of '{path}', which is not quantized here")
    bits = quantizer.n_bits if numbers.get("quant_bits") is None else numbers["quant_bits"]
    reduced = getattr(quantizer, "n_bits", bits) == 7 and bits == 8  # reduce_range
    if bits != quantizer.n_bits and not reduced:
        raise ConfigError(
            f"the calibration config has {bits} bits for the {site} of '{path}', but the model has {quantizer.n_bits}"
        )
    low, high = _range(numbers, bits)
    if isinstance(quantizer, UniformQuantizer):
        quantizer.observer.force_ranges(low, high)
    elif isinstance(quantizer, LearnedUniform):
        signed = bool((low < 0).any())
        n_codes = 2 ** (quantizer.n_bits - signed) - 1
        quantizer.force(high / n_codes, torch.full_like(low, -float(signed)))
    elif site not in ("weight", "bias"):
        raise ConfigError(f"the {site} of '{path}' has no range to restore ({type(quantizer).__name__})")
    found = _numbers(quantizer).get("scale")
    if numbers["scale"] is not None and found is not None:
        theirs = torch.as_tensor(numbers["scale"], dtype=torch.float64).flatten()
        if not torch.allclose(torch.as_tensor(found, dtype=torch.float64).flatten(), theirs, rtol=1e-4):
            raise ConfigError(
                f"the {site} of '{path}' has the scale {float(theirs[0]):.6g} in the calibration config, which "
                f"{type(quantizer).__name__} cannot have with that range; quantize the model with the config list and "
                "the quantizer that made the config"
            )


def _range(numbers: Mapping[str, Any], n_bits: int) -> tuple[Tensor, Tensor]:
    """Return the range of a quantizer; without one, that of the signed codes of NNI, such as -127 .. 127."""
    given = {
        name: torch.as_tensor(value, dtype=torch.float64).flatten()
        for name, value in numbers.items()
        if name in NUMBERS and value is not None
    }
    largest = 2 ** (n_bits - 1) - 1
    ends = (given.get("zero_point", torch.zeros(1)), given.get("scale", torch.zeros(1)))
    low = given.get("tracked_min", (-largest - ends[0]) * ends[1])
    high = given.get("tracked_max", (largest - ends[0]) * ends[1])
    return (low.squeeze(0), high.squeeze(0)) if low.numel() == 1 else (low, high)
