"""AutoQNN's counts of a model: multiply-adds, parameters, memory, the roofline, zeros."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from torchquant.compat.autoqnn.utils.module_ios import ModuleIO as ModuleIO
from torchquant.compat.autoqnn.utils.module_ios import ModuleIOs as ModuleIOs
from torchquant.errors import ConfigError
from torchquant.plan import QuantPlan
from torchquant.utils import weight_slots

devices: dict[str, tuple[float, float, float]] = {
    "QS-855+": (1.032e12, 34.1 * 2**30, 10.0),
    "QS-888+": (1.72e12, 51.2 * 2**30, 10.0),
    "1080ti": (10.616e12, 484.0 * 2**30, 250.0),
    "2080ti": (11.75e12, 616.0 * 2**30, 250.0),
    "3090": (29.28e12, 936.2 * 2**30, 350.0),
    "A6000": (31.29e12, 768.0 * 2**30, 300.0),
    "Xeon E5-2678 v3": (0.95e12, 68.0 * 2**30, 120.0),
    "Apple A14 Bionic": (1.536e12, 34.1 * 2**30, 10.0),
    "Kirin 9000": (2.332e12, 44.0 * 2**30, 10.0),
}
"""Device -> (operations per second, bytes per second, watts), as AutoQNN lists them."""


def get_flops_params_mems(
    module: nn.Module,
    input_shape: Sequence[int],
    w_bit: int,
    a_bit: int,
    name: str = "module",
    verbose: int = 1,
) -> tuple[float, int, float]:
    """Count multiply-adds of one sample, parameters, and bytes of parameters and layer outputs at these widths.

    AutoQNN calls multiply-adds FLOPs. Outputs are counted for layers and operators that compute, as in `plan.cost`.
    """
    cost = QuantPlan(()).cost(module, torch.randn(*input_shape))
    macs = float(cost.macs)
    n_params = sum(parameter.numel() for parameter in module.parameters())
    memory = n_params * w_bit / 8 + cost.activation_bytes / 4 * a_bit / 8
    if verbose:
        print(
            f"Flops, Params and Mems of {name} is [{macs / 1e9:.2f}GFLOPs,{n_params / 1e6:.2f}M, {memory / 2**20:.2f}M]"
        )
    return macs, n_params, memory


def get_attainable_FLOPS(  # noqa: N802 - published name
    model: nn.Module,
    input_shape: Sequence[int],
    device_key: str,
    w_bit: int = 32,
    a_bit: int = 32,
    model_name: str = "model",
) -> float:
    """Compute the operations per second of a device with a model by the roofline: its peak, or the memory bound.

    Source: Williams et al. 2009. AutoQNN ignores `w_bit` and `a_bit`; here they count. Raises ConfigError.
    """
    if device_key not in devices:
        raise ConfigError(f"device_key must be one of {', '.join(devices)}; got {device_key!r}")
    macs, _, memory = get_flops_params_mems(model, input_shape, w_bit, a_bit, model_name, verbose=0)
    peak, bandwidth, _ = devices[device_key]
    attainable = macs / memory * bandwidth
    kind = "Compute-bound" if attainable >= peak else "IO-bound"
    print(f"{model_name} is {kind} model on {device_key}")
    return min(peak, attainable)


def count_zero(w: Tensor) -> int:
    """Count the elements that are 0."""
    return int((w == 0).sum())


def stats_module_sparsity(module: nn.Module, name: str) -> float:
    """Compute the share of zeros in one parameter of a module."""
    w = getattr(module, name)
    return count_zero(w) / w.numel()


def stats_sparsity(
    parameters_to_prune: Iterable[tuple[nn.Module, str]], verbose: int = 1
) -> tuple[tuple[float, ...], float]:
    """Compute the share of zeros in each (module, name of a parameter), and in all together."""
    pairs = list(parameters_to_prune)
    each = tuple(stats_module_sparsity(module, name) for module, name in pairs)
    sizes = [getattr(module, name).numel() for module, name in pairs]
    total = sum(share * n for share, n in zip(each, sizes, strict=True)) / max(sum(sizes), 1)
    if verbose:
        for i, ((_, name), share) in enumerate(zip(pairs, each, strict=True)):
            print(f"Sparsity in submodule[{i}].{name}: {share:.2%}")
        print(f"Global sparsity: {total:.2%}")
    return each, total


@torch.no_grad()
def stats_quantized_sparsity(model: nn.Module) -> dict[str, float]:
    """Compute the share of weights that quantize to 0, for every quantized layer that has observed its weight."""
    found = {}
    for slot in weight_slots(model):
        if (quantizer := slot.quantizer) is not None and quantizer.is_ready:
            found[slot.key] = count_zero(quantizer(slot.seen())) / slot.weight.numel()
    return found
