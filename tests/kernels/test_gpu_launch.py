"""Every Triton kernel compiles from the call that a GPU gets, with its arguments and each of its blocks.

Triton makes constants of arguments that are 1 and picks types by the values of others, which the tests in
test_gpu_code.py do not see. A stand-in for the driver of a GPU compiles, and launches nothing.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.on_gpu import HAS_GPU, not_interpreted, triton
from tests.kernels.test_mixtures import SPECS
from tests.kernels.test_projections import formats
from torchquant import kernels
from torchquant.quantizers import make_quantizer
from torchquant.search.learning._members import members_of

pytestmark = [not_interpreted, pytest.mark.skipif(HAS_GPU, reason="the other tests launch the kernels")]


class Driver:
    """A GPU of compute capability 8.0 that is not there."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 80, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the kernels that were compiled, for each block, instead of launched."""
    from torchquant.kernels import gpu, gpu_observers

    names: set[str] = set()

    def run(kernel: Any, x: Tensor, grid: Any, *arguments: Any, **constants: Any) -> None:
        for block in getattr(kernel, "configs", (None,)):
            function = kernel if block is None else kernel.fn
            options = {} if block is None else {**block.kwargs, "num_warps": block.num_warps}
            function.warmup(*arguments, grid=(1,), WIDE=False, enable_fp_fusion=False, **constants, **options)
        names.add(function.__name__)

    for file in (gpu, gpu_observers):
        monkeypatch.setattr(file, "run", run)
    monkeypatch.setattr(kernels, "_BY_DEVICE", {"cpu": {}})
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    return names


def call_all(x: Tensor, other: Tensor) -> None:
    """Call every operation on a vector, with and without what is optional, and on channels next to each other."""
    from torchquant.kernels import gpu

    found = {name: function for (name, dtype), function in gpu.kernels().items() if dtype == x.dtype}
    clamp, three, two = (0.0, 0.7), (True, True, True), (True, True)
    found["affine"](x, x, 127.5)
    found["affine"](x, x, 255, (0, 255))
    _, bits = found["uniform"](x, other, -8, 7, 0, clamp, True, True)
    found["masked"](x, bits)
    codes, _ = found["to_codes"](x, other, -8)
    found["from_codes"](codes, other, -8, x.dtype)
    found["learned_step"](x, other, -8, 7, other)
    found["learned_step_backward"](x, x, other, -8, 7, other, other, three)
    found["rounded_step_backward"](x, x, other, -8, 7, two)
    found["calibrated_clip_backward"](x, x, other, 15, two)
    _, inside, above = found["clip"](x, other, other, 15)
    found["clip_backward"](x, inside, above, other, two)
    found["min_max"](x[:1].expand(3, 40).contiguous(), -1)
    found["track"](x, *(torch.zeros_like(other) for _ in range(3)), None, clamp, 0.9, True, True)
    found["histogram"](x[None], other.view(1, 1), other.view(1, 1), 16, False, True)
    calls = [] if x.dtype != torch.float32 else [form.kernel_call() for form in formats(other, other)[::3]]
    for name, numbers, constants in calls:  # type: ignore[misc]
        found[name](x, numbers, clamp, True, True, *constants)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 1000])
def test_calls_compile(n: int, dtype: torch.dtype, compiled: set[str]) -> None:
    call_all(torch.randn(n, dtype=dtype), torch.tensor(0.1, dtype=dtype))
    assert {"_uniform", "_masked", "_differentiate", "_clip", "_ends", "_average", "_histogram"} <= compiled


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_calls_of_mixtures_compile(granularity: str, compiled: set[str]) -> None:
    from torchquant.kernels import gpu

    x, shares = torch.randn(4, 30), torch.rand(len(SPECS))
    quantizers = [make_quantizer(spec.replace("@", f"/{granularity}@")) for spec in SPECS]
    for quantizer in quantizers:
        quantizer.pre_observe(x)
    gathered = members_of(quantizers, (0.0, 0.7))
    assert gathered is not None
    found = gpu.kernels()
    found["mixture", x.dtype](x, shares, gathered.members)
    found["mixture_backward", x.dtype](x, x, shares, gathered.members, (True, True))
    assert compiled == {"_mix", "_differentiate_mix"}
