"""The CPU kernels of two builds: for this processor, and the plain form without its special instructions."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable
from typing import Any

import pytest
import torch

from torchquant.kernels import _build, cpu

GENERIC = ("-DTQ_GENERIC", *(("-march=x86-64",) if platform.machine() == "x86_64" else ()))
Kernels = dict[tuple[str, torch.dtype], Callable[..., Any]]


@pytest.fixture(scope="session", params=[(), GENERIC], ids=["native", "generic"])
def cpu_kernels(request: pytest.FixtureRequest) -> Kernels:
    compiler = _build.find_compiler()
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    library = _build.compiled(compiler, _build.cache_folder(), request.param)
    return cpu.kernels(ctypes.CDLL(str(library)))
