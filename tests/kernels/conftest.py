"""The CPU kernels of two builds: for this processor, and the plain form without its special instructions."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable
from typing import Any

import pytest
import torch

from torchquant.kernels import _build, cpu
from torchquant.kernels._compiler import CompileError, find_compiler

GENERIC = ("-DTQ_GENERIC", *(("-march=x86-64",) if platform.machine() == "x86_64" else ()))
Kernels = dict[tuple[str, torch.dtype], Callable[..., Any]]


@pytest.fixture(scope="session", params=[(), GENERIC], ids=["native", "generic"])
def cpu_kernels(request: pytest.FixtureRequest) -> Kernels:
    try:
        library = _build.compiled(find_compiler(), _build.cache_folder(), request.param)
    except CompileError as error:
        pytest.skip(str(error))
    return cpu.kernels(ctypes.CDLL(str(library)))
