"""The registry of fused kernels, which replace the projection of a format, by its class and the kind of device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from torchquant.errors import NameClashError
from torchquant.quantizers_functional._gradient import Clamp

Kernel = Callable[[Any, Tensor, bool, Clamp | None], tuple[Tensor, Tensor | None]]
"""`kernel(format, x, want_inside, clamp)` returns `format.project(x, want_inside, clamp)`, bit for bit.

The mask may be packed, as `pack_mask` of `_bits.py` does: uint8, one bit an element in the memory order of x.
"""


class KernelTable:
    """The kernel for the projection of a format on a device; without one, the package's own kernel or PyTorch runs.

    A kernel gets float32 or float64 tensors outside of autograd and must not change them. It does not affect a
    format's codes, levels and gradients, nor the schemes that train their own numbers.

    >>> from torchquant.quantizers_functional.formats import UniformGrid
    >>> @KERNELS.register(UniformGrid, "cpu")
    ... def reference(grid, x, want_inside, clamp):
    ...     return grid.project(x, want_inside, clamp)
    >>> KERNELS.find(UniformGrid, "cpu") is reference
    True
    >>> KERNELS.unregister(UniformGrid, "cpu")
    """

    def __init__(self) -> None:
        self._kernels: dict[tuple[type, str], Kernel] = {}

    def register(self, format: type, device: str) -> Callable[[Kernel], Kernel]:
        """Return a decorator that registers a kernel for a class of formats on a kind of device, such as "cuda"."""

        def enter(kernel: Kernel) -> Kernel:
            known = self._kernels.setdefault((format, device), kernel)
            if known is not kernel:
                raise NameClashError(f"{format.__name__} has a kernel for {device!r} already: {known!r}")
            return kernel

        return enter

    def unregister(self, format: type, device: str) -> None:
        """Remove the kernel, for plug-ins and tests that are loaded and unloaded."""
        del self._kernels[format, device]

    def find(self, format: type, device: str) -> Kernel | None:
        """Return the kernel, None if there is none."""
        return self._kernels.get((format, device)) if self._kernels else None


KERNELS = KernelTable()
