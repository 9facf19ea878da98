"""How the tests of Triton kernels run: on a GPU, or in Triton's interpreter, or only through the compiler."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from torchquant import kernels

triton = pytest.importorskip("triton", reason="triton is not installed", exc_type=ImportError)
HAS_GPU, IS_INTERPRETED = torch.cuda.is_available(), os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if HAS_GPU else "cpu"
FLOATS = (torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow))
"""Types of numbers; Triton's interpreter takes milliseconds for each small tensor."""
on_device = pytest.mark.skipif(not (HAS_GPU or IS_INTERPRETED), reason="run by test_kernels_in_the_interpreter")
not_interpreted = pytest.mark.skipif(IS_INTERPRETED, reason="the kernels are interpreted, not compiled")


def use(monkeypatch: pytest.MonkeyPatch, wanted: bool = True) -> None:
    """Let the Triton kernels run, or nothing but PyTorch's operators."""
    from torchquant.kernels import gpu

    monkeypatch.setattr(kernels, "_BY_DEVICE", {DEVICE: gpu.kernels() if wanted else {}})


def have_equal_signs(found: Tensor, expected: Tensor) -> bool:
    """Tell whether signs are equal, but on a GPU, where PyTorch's own clamp(-0.0, 0.0) need not be -0.0."""
    numbers = ~expected.isnan()
    return HAS_GPU or torch.equal(found.signbit()[numbers], expected.signbit()[numbers])
