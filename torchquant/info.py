"""`python -m torchquant.info`: versions, which kernels are active on which device, and why not."""

from __future__ import annotations

import os
import platform
import shlex

import torch

from torchquant import __version__
from torchquant.errors import ConfigError
from torchquant.kernels import why_not_on_gpu
from torchquant.kernels._build import built, cache_folder
from torchquant.kernels._compiler import SWITCH, CompileError, find_compiler
from torchquant.kernels.compiled import OPERATORS


def report() -> str:
    """Return what is installed and which kernels are active, as lines of text. It compiles them, if need be."""
    lines = {
        "torchquant": __version__,
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        "python": f"{platform.python_version()} on {platform.platform()}",
        "kernels on cpu": f"active, {built().path}" if built().library else f"not active: {built().reason}",
        "in compiled code": _in_compiled_code(),
        "kernels on cuda": _on_gpu(),
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
    return "active" if reason is None else f"not active: {reason}"


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
