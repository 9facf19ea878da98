"""Each Triton kernel equals the pure PyTorch code that it stands for, bit for bit.

On a machine with a GPU the files test_gpu*.py prove it there. On any other one, the kernels run on the CPU in Triton's
interpreter, in a process of their own, and the code that is made for a GPU is read.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import torchquant as tq
from tests.kernels.on_gpu import DEVICE, FLOATS, HAS_GPU, IS_INTERPRETED, on_device, use
from tests.kernels.tensors import hard, is_same, shifted
from tests.kernels.test_cpu import CLAMPS, IMAGES, codes_and_values, reference
from torchquant import kernels
from torchquant.quantizers_functional import UniformGrid
from torchquant.quantizers_functional._bits import masked, pack_mask, unpack_mask

ROOT = Path(__file__).parents[2]


def check(grid: UniformGrid, x: Tensor, clamp: Any = None) -> None:
    """Compare values and masks; a mask is there if it was asked for."""
    for want_inside, is_strict in ((False, False), (True, False), (False, True), (True, True)):
        found = grid.fused(x, want_inside, clamp, is_strict)
        assert found is not None
        value, bits = reference(grid, x, want_inside, clamp, is_strict)
        assert is_same(found[0], value)
        assert (found[1] is None) == (bits is None)
        assert bits is None or (found[1] is not None and torch.equal(found[1], bits))


@pytest.fixture
def active(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch)


@pytest.mark.parametrize("marked", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_kernels_in_the_interpreter(marked: str) -> None:
    if HAS_GPU or IS_INTERPRETED:
        pytest.skip("the tests of these files run here")
    files = [str(path) for path in sorted(Path(__file__).parent.glob("test_gpu*.py"))]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", marked, *files]
    command += ["-W", "ignore::RuntimeWarning"]  # numpy, in which the interpreter computes, warns of infinity and NaN
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-2000:]
    assert re.search(r"[1-9]\d* passed", found.stdout)


@on_device
@pytest.mark.usefixtures("active")
@pytest.mark.parametrize("dtype", FLOATS)
def test_uniform_grid_per_tensor(dtype: torch.dtype) -> None:
    scale, zero_point = torch.tensor(0.1, device=DEVICE), torch.tensor(3.0, device=DEVICE)
    for n in (1, 7, 8, 9, 33, 5000):
        check(UniformGrid(scale, zero_point, 0, 15), shifted(hard((n,), dtype=dtype).to(DEVICE)))
    for clamp in CLAMPS:
        check(UniformGrid(0.1, 0, -8, 7), hard((777,), dtype=dtype).to(DEVICE), clamp)
    check(UniformGrid(scale[None], 0, 0, 2**24 - 1), hard((777,), dtype=dtype).to(DEVICE))
    check(UniformGrid(torch.tensor(2.0**-126, device=DEVICE), 128, 0, 255), hard((777,), dtype=dtype).to(DEVICE))


@on_device
@pytest.mark.usefixtures("active")
@pytest.mark.parametrize("dtype", FLOATS)
def test_uniform_grid_per_channel(dtype: torch.dtype) -> None:
    for axis, shape in ((0, (5, 3, 3, 3)), (1, IMAGES), (-1, (6, 70))):
        scale = torch.linspace(0.05, 0.3, shape[axis], device=DEVICE)
        zero_point = torch.arange(shape[axis], device=DEVICE).float()
        x = hard(shape, dtype=dtype).to(DEVICE)
        for layout in (x, x.contiguous(memory_format=torch.channels_last)) if x.ndim == 4 else (x,):
            check(UniformGrid(scale, zero_point, 0, 15, axis=axis), layout, (-0.3, 0.7))
            check(UniformGrid(scale, 0, -8, 7, axis=axis), layout)


@on_device
@pytest.mark.usefixtures("active")
def test_numbers_of_nan_make_nan() -> None:
    nan, one = torch.tensor([1.0, torch.nan, 1.0], device=DEVICE), torch.ones(3, device=DEVICE)
    check(UniformGrid(nan, 0, -8, 7, axis=0), hard((3, 40)).to(DEVICE))
    check(UniformGrid(one, nan, 0, 15, axis=0), hard((3, 40)).to(DEVICE))


@on_device
@pytest.mark.parametrize("dtype", FLOATS)
def test_codes_of_levels(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    scale, zero_point = torch.linspace(0.05, 0.3, 5, device=DEVICE), torch.arange(5, device=DEVICE).float()
    for grid, shape in (
        (UniformGrid(scale[0] * 2.0, zero_point[3], 0, 255), (500,)),
        (UniformGrid(0.1, 0, -128, 127), (9,)),
        (UniformGrid(scale, zero_point, 0, 15, axis=1), IMAGES),
    ):
        x = hard(shape, dtype=dtype).nan_to_num(0.3).to(DEVICE)
        use(monkeypatch)
        found = codes_and_values(grid, x)
        use(monkeypatch, wanted=False)
        assert all(map(is_same, found, codes_and_values(grid, x)))


@on_device
@pytest.mark.usefixtures("active")
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float16, torch.bfloat16])
def test_mask_times_gradient(dtype: torch.dtype) -> None:
    for n in (1, 7, 8, 9, 1025):
        grad = hard((n,), dtype=dtype).to(DEVICE)
        mask = torch.rand(n, generator=torch.Generator().manual_seed(n)).gt(0.5).float().to(DEVICE)
        found = masked(grad, pack_mask(mask))
        assert is_same(found, unpack_mask(pack_mask(mask), grad.shape, dtype).mul_(grad))
        assert torch.equal(found.signbit()[~found.isnan()], (mask.to(dtype) * grad).signbit()[~found.isnan()])


@on_device
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_quantize_is_the_same_with_and_without_kernels(
    layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    def results(dtype: torch.dtype) -> list[Tensor]:
        x = hard(IMAGES, dtype=dtype).nan_to_num(0.3, 9.0, -9.0).to(DEVICE).contiguous(memory_format=layout)
        x.requires_grad_()
        y = UniformGrid(torch.tensor(0.1, device=DEVICE), 9, 0, 31).quantize(x, "clipped", (0.0, 6.0))
        return [y.detach(), *torch.autograd.grad(y, x, x.detach().flip(0).contiguous(memory_format=layout))]

    for dtype in (torch.float32, torch.float16):
        use(monkeypatch)
        found = results(dtype)
        use(monkeypatch, wanted=False)
        assert all(map(is_same, found, results(dtype)))


def test_what_has_a_kernel_on_a_cpu_has_one_on_a_gpu_or_a_reason() -> None:
    from torchquant.kernels import cpu, gpu

    found, reasons = gpu.kernels(), gpu.LEFT_TO_PYTORCH
    if cpu.kernels():
        assert {name for name, _ in found} | set(reasons) == set(cpu.OPERATIONS)
    assert not {name for name, _ in found} & set(reasons)
    missing = [(name, t) for name, (_, ts, _) in cpu.OPERATIONS.items() for t in ts if (name, t) not in found]
    assert {name for name, _ in missing} <= set(reasons)


@on_device
def test_layers_find_every_kernel_they_look_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of calibration and one of training with quantized weights and activations fall back nowhere silently."""
    from torchquant.kernels import gpu

    use(monkeypatch)
    kernel_of, missed = kernels.find, set()

    def find(operation: str, x: Tensor, *others: Any) -> Any:
        found = kernel_of(operation, x, *others)
        missed.update({operation} if found is None else ())
        return found

    monkeypatch.setattr(kernels, "find", find)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3)).to(DEVICE)
    for weight, output in (("lsq:4/channel", "affine:8"), ("esb:4,k=1/channel@clipped", "lsqplus:4")):
        model = tq.quantize(net, [{"weight": weight, "output": output}])
        for state in (tq.QModuleState.CALIBRATION, tq.QModuleState.QUANT_AWARE_TRAIN):
            tq.set_qmodule_state(model, state)
            with kernels.asked() as asked:
                model(torch.randn(2, 3, 8, 8, device=DEVICE)).square().sum().backward()
            assert asked
    assert missed <= set(gpu.LEFT_TO_PYTORCH)


def test_reasons_why_no_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    if HAS_GPU:
        assert kernels.why_not_on_gpu() is None
    else:
        assert kernels.why_not_on_gpu() == "torch sees no GPU"
    monkeypatch.setenv("TORCHQUANT_KERNELS", "0")
    assert kernels.why_not_on_gpu() == "TORCHQUANT_KERNELS=0 switches them off"
    assert kernels.load("cuda") == {}
