"""The kernels on a GPU, written in Triton: the operations of `cpu.py`, one pass over memory each.

Tensors are contiguous or channels-last, and are taken in the order of memory: `outer` times `channels` times `inner`.
No function here waits for the device. docs/decisions/0049 and 0056 say how they equal the PyTorch code bit for bit.
"""

# mypy: disable-error-code="import-untyped, import-not-found"
from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from torchquant.kernels.cpu import Number

FLAGS = 8
"""How many elements share a byte of a mask: the length of a row of a block."""
ABSENT, PLAIN, SINGLE, EACH = -2, -1, 0, 1
"""How a kernel reads a number: not at all, as an argument, from memory, from memory for each channel."""
MOST_IN_32_BITS = 2**31 - 2**16
"""The largest number of elements whose places a kernel counts in 32 bits, which is faster."""
BLOCKS = ((64, 2), (128, 4), (512, 8))
"""Rows of a block and warps that compute it; the fastest for a size of tensors is found at its first call."""
OPERATIONS: dict[str, tuple[Callable[..., Any], tuple[torch.dtype, ...]]] = {}

_SUMS = "the order of PyTorch's own sums sets scales"
LEFT_TO_PYTORCH = {
    **dict.fromkeys(("plain_sums", "magnitude_sums", "square_sums", "centred_square_sums"), _SUMS),
    **dict.fromkeys(("cell_sums", "left_sums", "sums_above", "wide_sums", "distance_sums", "cut_sums"), _SUMS),
    "rebinned": "the order of PyTorch's own cumulative sum moves the counts",
    "batch": "it decides on the host, which would wait for the device",
    "observed": "the grid needs the range that all programs find together: track, then uniform",
}
"""Operations with a kernel on a CPU and none here, and why."""


def operation(dtypes: tuple[torch.dtype, ...]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator for the function of an operation, which takes tensors of these types."""

    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        OPERATIONS[function.__name__] = function, dtypes
        return function

    return enter


def kernels() -> dict[tuple[str, torch.dtype], Callable[..., Any]]:
    """Return the function for each operation and type."""
    # These enter their operations.
    from torchquant.kernels import gpu_affine, gpu_learned, gpu_mixtures, gpu_observers, gpu_projections, gpu_uniform  # noqa: F401

    return {(name, dtype): function for name, (function, dtypes) in OPERATIONS.items() for dtype in dtypes}


def tuned(kernel: Any, resets: tuple[str, ...] = ()) -> Any:
    """Return the kernel with the fastest of `BLOCKS` for each `size`; trials zero the tensors named in `resets`."""
    blocks = BLOCKS if isinstance(kernel, triton.JITFunction) else BLOCKS[:1]  # Triton's interpreter is not timed
    configs = [triton.Config({"ROWS": rows}, num_warps=warps) for rows, warps in blocks]
    return triton.autotune(configs, key=["size"], reset_to_zero=list(resets))(kernel)


def run(kernel: Any, x: Tensor, grid: Any, *arguments: Any, **constants: Any) -> None:
    """Run a kernel on the device of x and its current stream, without fused multiply-adds."""
    with torch.cuda.device_of(x):
        kernel[grid](*arguments, WIDE=x.numel() > MOST_IN_32_BITS, enable_fp_fusion=False, **constants)


def launch(kernel: Any, x: Tensor, *arguments: Any, **constants: Any) -> None:
    """Run a kernel over the elements of x, eight for each row of a block; its last argument is their `size`."""
    n = x.numel()
    run(kernel, x, lambda chosen: (triton.cdiv(n, FLAGS * chosen["ROWS"]),), *arguments, n.bit_length(), **constants)


def _readable(number: Number | None, x: Tensor) -> tuple[Number, int]:
    """Return what a kernel gets for a number, and how it reads it: an argument of a kernel has 32 bits."""
    if number is None:
        return 0.0, ABSENT
    if isinstance(number, Tensor):
        return number.contiguous(), EACH if number.numel() > 1 else SINGLE
    if x.dtype == torch.float32 or number == torch.tensor(number, dtype=torch.float32).item():
        return float(number), PLAIN
    return x.new_full((), number), SINGLE


def read(x: Tensor, **numbers: Number | None) -> tuple[list[Number], dict[str, int]]:
    """Return the arguments of a kernel on x for these numbers, and the constants that say how it reads them."""
    found = {name.upper(): _readable(number, x) for name, number in numbers.items()}
    return [number for number, _ in found.values()], {name: kind for name, (_, kind) in found.items()}


@cache
def why_not() -> str | None:
    """Say why the kernels are not used on the GPU of this process: Triton fails there, or computes other numbers."""
    x, found = torch.linspace(-1.0, 1.0, 10_001, device="cuda"), kernels()
    try:
        value, bits = found["uniform", x.dtype](x, 0.1, -8, 7, wants_inside=True)
        product = found["masked", x.dtype](x, bits)
    except Exception as error:  # of its compiler, of the driver, of the linker: PyTorch's operators need none of them
        return f"Triton fails on {torch.cuda.get_device_name()}: {error}"
    rounded = torch.div(x, torch.full_like(x, 0.1)).round_()
    code = rounded.clamp(-8, 7)
    expected = code * torch.full_like(x, 0.1), x * (rounded == code)
    is_same = all(map(torch.equal, (value, product), expected))
    return None if is_same else f"Triton computes other numbers than PyTorch on {torch.cuda.get_device_name()}"
