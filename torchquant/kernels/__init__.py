"""Compiled kernels of the inner loops, found by name and tensor; where there is none, the pure PyTorch code runs.

A kernel equals the reference bit for bit, so that nothing but time depends on which of the two runs. `cpu.py` has the
wrappers of the C++ functions beside it, `gpu*.py` the kernels in Triton; docs/decisions/0047, 0049 and 0056 say why
they are built as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from torchquant.kernels.compiled import OPERATORS

Kernel = Callable[..., Any]
_PLAIN = (Tensor, torch.nn.Parameter)
_BY_DEVICE: dict[str, dict[tuple[str, torch.dtype], Kernel]] = {}
_asked: set[str] | None = None


def find(operation: str, x: Tensor, dtype: torch.dtype | None = None) -> Kernel | None:
    """Return the kernel of an operation for tensors such as x; None where the reference has to run.

    `dtype`: the float type of the operation, by default that of x. A kernel returns None for numbers in other shapes
    than it takes; then the reference has to run as well.

    A kernel takes plain tensors that are contiguous or channels-last, outside of autograd, of compiled and traced code,
    and of modes and transforms that watch every operation.
    """
    if torch.compiler.is_compiling() or type(x) not in _PLAIN or _is_watched():
        return None
    if _asked is not None:
        _asked.add(operation)
    device = "cpu" if x.is_cpu else x.device.type
    kernels = _BY_DEVICE.get(device)
    if kernels is None:
        kernels = _BY_DEVICE[device] = load(device)
    kernel = kernels.get((operation, dtype or x.dtype))
    return kernel if kernel is not None and _is_plain(x) else None


@contextmanager
def asked() -> Iterator[set[str]]:
    """Collect, within the context, the operations for which a kernel is looked for, whether there is one or not."""
    global _asked
    outer, _asked = _asked, set()
    try:
        yield _asked
    finally:
        _asked = outer


def find_backward(operation: str, x: Tensor, grad: Tensor) -> Kernel | None:
    """Return the kernel for gradients at x; None where the reference has to run, as in a backward that is recorded.

    Both tensors have one type and lie alike in memory.
    """
    if torch.is_grad_enabled() or grad.dtype != x.dtype or grad.stride() != x.stride() or find(operation, grad) is None:
        return None
    return find(operation, x)


def find_compiled(operation: str, x: Tensor) -> Kernel | None:
    """Return the operator of torch with which code that is being compiled calls a kernel of the CPU.

    None outside of compiled code, in exported programs, and where `find` finds no kernel for such tensors.
    """
    if not torch.compiler.is_compiling() or torch.compiler.is_exporting() or not x.is_cpu or not _is_ordered(x):
        return None
    return OPERATORS[operation] if _is_built(operation, x.dtype) else None


def _is_built(operation: str, dtype: torch.dtype) -> bool:
    return (operation, dtype) in load("cpu")


# As torch.compiler.assume_constant_result does, which would load the compiler when this package is imported.
_is_built._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _is_watched() -> bool:
    return (
        torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def _is_plain(x: Tensor) -> bool:
    """Whether x is numbers in memory without gaps, in an order that kernels know, which autograd does not record."""
    if x.layout is not torch.strided or (x.requires_grad and torch.is_grad_enabled()) or x.is_neg():
        return False
    try:
        return _is_ordered(x) and x.data_ptr() != 0  # 0: an empty tensor, or one without memory
    except RuntimeError:  # a batch of gradients, which is only seen as one tensor
        return False


def _is_ordered(x: Tensor) -> bool:
    return x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))


def load(device: str) -> dict[tuple[str, torch.dtype], Kernel]:
    """Return the kernels of a kind of device, by operation and type, building them if need be."""
    if device == "cpu":
        from torchquant.kernels import cpu

        return cpu.kernels()
    if device == "cuda" and why_not_on_gpu() is None:
        from torchquant.kernels import gpu

        return gpu.kernels()
    return {}


def why_not_on_gpu() -> str | None:
    """Say why no kernels run on the GPU of this process, None if they do."""
    from torchquant.kernels._compiler import SWITCH, is_switched_off

    if is_switched_off():
        return f"{SWITCH}=0 switches them off"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if find_spec("triton") is None:
        return "triton is not installed"
    from torchquant.kernels import gpu

    return gpu.why_not()
