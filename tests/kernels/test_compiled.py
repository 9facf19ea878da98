"""Kernels as operators of torch: what torch says of them, and compiled code against eager code, bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

import torchquant as tq
from torchquant import kernels
from torchquant.kernels import compiled
from torchquant.kernels._build import built
from torchquant.quantizers_functional import UniformGrid

pytestmark = pytest.mark.skipif(built().library is None, reason=f"no kernels are built here: {built().reason}")

SHAPES = ((7, 9), (2, 16, 6, 6))
WAYS = ("clipped", "clamp", "channel", "channels last", "inside")


def sample(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return 3.0 * torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def with_gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = function(x)
    y.backward(sample(tuple(x.shape), x.dtype).add(1.0))
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("clamp", [(None, None), (0.0, None), (-1.0, 2.0)])
def test_torch_accepts_the_operators(dtype: torch.dtype, clamp: tuple[float | None, float | None]) -> None:
    x = sample((5, 7), dtype)
    step, low, high, zero = (torch.tensor(n, dtype=dtype) for n in (0.1, -8.0, 7.0, 2.0))
    strict = clamp != (None, None)
    torch.library.opcheck(torch.ops.torchquant.uniform.default, (x, step, low, high, zero, *clamp, strict, True))
    bits = torch.arange(5, dtype=torch.uint8)
    torch.library.opcheck(torch.ops.torchquant.masked.default, (x, bits))


def graphs(function: Callable[..., object], x: Tensor) -> tuple[Callable[..., object], list[str]]:
    """Compile, and keep the names of the operators that the forward and the backward call."""
    called: list[str] = []

    def look(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        called.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=look, bw_compiler=look)
    return torch.compile(function, fullgraph=True, backend=backend), called


CASES = [(way, shape, torch.float32) for way in WAYS for shape in SHAPES]
CASES += [("clipped", (40,), torch.float64), ("clamp", (2, 16, 6, 6), torch.bfloat16)]


@pytest.mark.parametrize(("way", "shape", "dtype"), CASES)
def test_compiled_code_calls_them_and_equals_eager_code(way: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, axis, clamp, step = sample(shape, dtype), None, None, torch.tensor(0.1)
    if way == "channel":
        axis, step = 0, torch.linspace(0.05, 0.2, shape[0])
    elif way == "channels last":
        x = x.to(memory_format=torch.channels_last) if x.ndim == 4 else x.t()
    elif way == "clamp":
        clamp = (0.0, None)
    elif way == "inside":
        x = x / 1e3  # nothing is clipped, and the kernel of eager code leaves the mask out

    def quantize(x: Tensor) -> Tensor:
        return UniformGrid(step, 3, -8, 7, axis=axis).quantize(x, "clipped", clamp)

    expected = with_gradient(quantize, x)
    function, called = graphs(quantize, x)
    found = with_gradient(function, x)  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    is_ordered = x.is_contiguous() or x.ndim == 4
    assert ("torchquant.uniform.default" in called) == is_ordered
    assert "torchquant.masked.default" in called


def test_code_without_a_mask_is_the_compilers_own() -> None:
    x = sample((5, 7))
    function, called = graphs(lambda x: UniformGrid(torch.tensor(0.1), 0, -8, 7).quantize(x), x)
    with torch.no_grad():
        assert torch.equal(function(x), UniformGrid(torch.tensor(0.1), 0, -8, 7).quantize(x))  # type: ignore[arg-type]
    assert not any("torchquant" in name for name in called)


def test_exported_programs_hold_none_of_them() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4))
    x = torch.randn(2, 3, 6, 6)
    model = tq.quantize(net, [{"weight": "affine:8/channel@clipped", "output": "affine:8@clipped"}], x)
    tq.calibrate(model, [x])
    tq.set_qmodule_state(model, tq.QModuleState.QUANT_EVAL)
    program = torch.export.export(model, (x,))
    assert "torchquant" not in "".join(str(node.target) for node in program.graph.nodes if node.op == "call_function")


def test_without_kernels_compiled_code_is_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kernels._BY_DEVICE, "cpu", {})
    monkeypatch.setattr(kernels, "load", lambda device: {})

    def quantize(x: Tensor) -> Tensor:
        return UniformGrid(torch.tensor(0.1), 3, -8, 7).quantize(x, "clipped")

    x = sample((5, 7))
    function, called = graphs(quantize, x)
    with_gradient(function, x)  # type: ignore[arg-type]
    assert not any("torchquant" in name for name in called)


def test_wrong_numbers_are_refused() -> None:
    x, varying = sample((5, 7)), torch.ones(5, 7)
    one = torch.tensor(1.0)
    with pytest.raises(RuntimeError, match="vary along one axis"):
        torch.ops.torchquant.uniform(x, varying, one, one, one, None, None, False, True)
    assert set(compiled.OPERATORS) == {"uniform", "masked"}
