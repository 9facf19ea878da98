"""`python -m torchquant.info`: versions, which kernels are active on which device, and why not."""

from __future__ import annotations

import os
import platform
import shlex
from collections.abc import Iterator
from contextlib import suppress
from itertools import product

import torch

from torchquant import __version__, kernels
from torchquant.errors import ConfigError
from torchquant.kernels import why_not_on_gpu
from torchquant.kernels._build import built, cache_folder
from torchquant.kernels._compiler import SWITCH, CompileError, find_compiler
from torchquant.kernels.compiled import OPERATORS
from torchquant.quantizers import Quantizer, make_quantizer
from torchquant.quantizers._spec import schemes

NO_KERNEL = "none"


def report() -> str:
    """Return what is installed and which kernels are active, as lines of text. It compiles them, if need be."""
    lines = {
        "torchquant": __version__,
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        "python": f"{platform.python_version()} on {platform.platform()}",
        "kernels on cpu": f"active, {built().path}" if built().library else f"not active: {built().reason}",
        "in compiled code": _in_compiled_code(),
        "kernels on cuda": _on_gpu(),
        "by operation": _by_operation(),
        "compiler": _compiler(),
        "cache": _cache(),
        SWITCH: os.environ.get(SWITCH, "not set; 0 switches the kernels off"),
    }
    width = max(map(len, lines))
    return "\n".join(
        f"{name:<{width}}  " + text.replace("\n", "\n" + " " * (width + 2)) for name, text in lines.items()
    )


def _in_compiled_code() -> str:
    if not built().library:
        return "PyTorch's operators, since there are no kernels on cpu"
    return f"{', '.join(f'torchquant::{name}' for name in OPERATORS)} on cpu, where a mask is kept for backward"


def _on_gpu() -> str:
    reason = why_not_on_gpu()
    if reason is not None:
        return f"not active: {reason}"
    from torchquant.kernels.gpu import LEFT_TO_PYTORCH

    return f"active, but for {', '.join(f'{name} ({why})' for name, why in LEFT_TO_PYTORCH.items())}"


def _by_operation() -> str:
    """List the devices on which each operation has a kernel, and the schemes that use it in training."""
    active = {device: {name for name, _ in kernels.load(device)} for device in ("cpu", "cuda")}
    users: dict[str, list[str]] = {}
    for scheme, cls in schemes():
        quantizer = next(_made(scheme, cls), None)
        for operation in () if quantizer is None else _asked_by(quantizer) or {NO_KERNEL}:
            users.setdefault(operation, []).append(scheme)
    width = max(map(len, users))
    return "\n".join(
        f"{name:<{width}}  {' '.join(d for d in active if name in active[d]) or 'PyTorch':<8}  {', '.join(users[name])}"
        for name in sorted(users, key=lambda name: (name == NO_KERNEL, name))
    )


def _made(scheme: str, cls: type[Quantizer]) -> Iterator[Quantizer]:
    """Make quantizers of a scheme, for activations or else weights, or those of its presets."""
    for name in (scheme, *cls.presets):
        typical = [cls.typical.format(name=name, n=n_bits, k=1) for n_bits in (4, 2, 1)]
        specs = [spec for spec in typical if spec.startswith(name)] or [f"{name}:4", f"{name}:1"]
        for spec, slot in product((*specs, name), ("output", "weight")):
            with suppress(ConfigError):
                yield make_quantizer(spec, slot)


def _asked_by(quantizer: Quantizer) -> set[str]:
    """Return the operations for which a quantizer looks for kernels as it measures and quantizes a small tensor."""
    x = torch.linspace(-1.0, 1.0, 64).view(4, 16).requires_grad_()
    with kernels.asked() as found:
        quantizer.pre_observe(x.detach())
        quantizer(x).sum().backward()
    return found


def _compiler() -> str:
    try:
        return shlex.join(find_compiler())
    except CompileError as error:
        return str(error)


def _cache() -> str:
    try:
        return str(cache_folder())
    except ConfigError as error:
        return str(error)


if __name__ == "__main__":
    import sys

    sys.stdout.write(report() + "\n")
