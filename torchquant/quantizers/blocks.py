"""Block formats MX and NVFP4. Maths: quantizers_functional/blocks.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchquant.errors import ConfigError
from torchquant.quantizers._base import QUANTIZERS, About, FittedQuantizer, OwnScaleQuantizer
from torchquant.quantizers_functional._gradient import cast_back, compute_dtype, make_gradient
from torchquant.quantizers_functional.blocks import ELEMENTS, MODES, BlockFormat, MXBlocks, NVFP4Blocks, by_blocks
from torchquant.quantizers_functional.formats import FLOAT_BYTES, Format
from torchquant.range_observers._distributed import reduce_max
from torchquant.range_observers._statistics import rows


def _check_block(block: int) -> None:
    if not (isinstance(block, int) and block > 0):
        raise ConfigError(f"block must be a whole number > 0, got {block!r}")


class _BlockQuantizer(OwnScaleQuantizer):
    """The base of block formats: each block computes its scale from its elements at every call, unless pinned."""

    kept = (*OwnScaleQuantizer.kept, "block_scales")
    block: int
    block_axis: int | None
    has_tensor_scale = False
    block_scales: Tensor
    """The block scales (for MX the exponents) of the pinned weight, (*, blocks); exists only while one is pinned."""

    @property
    def _kept_scales(self) -> Tensor | None:
        return self._buffers.get("block_scales")

    def _block_format(self) -> BlockFormat:
        form = self.format()
        assert isinstance(form, BlockFormat)
        return form

    def _numbers_of(self, weight: Tensor) -> dict[str, Tensor]:
        scales = self._block_format().scales_of(weight.detach().to(compute_dtype(weight)))
        return {"block_scales": scales.to(torch.float32)}

    @torch.no_grad()
    def nearest(self, x: Tensor, columns: Tensor) -> Tensor:
        if not self.is_pinned or self.block_axis == 0:
            return super().nearest(x, columns)
        return self.column_rounder()(x, columns)

    def column_rounder(self) -> Callable[[Tensor, Tensor], Tensor]:
        if not self.is_pinned or self.block_axis == 0:
            return super().column_rounder()
        form, shape = self._block_format(), [int(size) for size in self.pinned.tolist()]
        return lambda x, columns: cast_back(form.columns(x.to(compute_dtype(x)), columns, shape), x.dtype)

    def numbers(self) -> dict[str, Tensor]:
        """Return the kept numbers of a weight: the scales of its blocks."""
        return super().numbers() | ({"block_scales": self.block_scales} if self.is_pinned else {})

    def _set_numbers(self, **numbers: Tensor | float) -> None:
        if self.is_pinned:
            self.block_scales.copy_(torch.as_tensor(numbers.pop("block_scales")))
        super()._set_numbers(**numbers)

    def parts(self, x: Tensor) -> list[Tensor]:
        cut: list[Tensor] = []

        def keep(blocks: Tensor) -> Tensor:
            cut.extend(blocks.flatten(0, -2))
            return blocks

        by_blocks(x, self.block, self.block_axis, keep)
        return cut

    def side_bytes(self, x: Tensor) -> int:
        """Return one byte per block, and 4 for a scale of the whole tensor."""
        return len(self.parts(x)) + (FLOAT_BYTES if self.has_tensor_scale else 0)

    def levels(self) -> Tensor:
        """Raises ConfigError: every block has levels of its own."""
        raise ConfigError(f"{type(self).__name__} has no one list of levels; each block has its own")

    def extra_repr(self) -> str:
        return f"block={self.block}, block_axis={self.block_axis}"


def _element_preset(name: str) -> dict[str, Any]:
    return {"n_bits": ELEMENTS[name].n_bits, "element": name}


@QUANTIZERS.register("mx")
class MXQuantizer(_BlockQuantizer):
    """Microscaling: blocks of 32 mini-floats or 8-bit integers that share a power of two (OCP MX v1.0; A12).

    `element`: fp4_e2m1, fp6_e2m3, fp6_e3m2, fp8_e4m3, fp8_e5m2 or int8. `mode` says how the shared exponent follows
    the largest magnitude: "floor" (OCP), "rceil", "ceil" or "even". `block_axis`: the axis cut into blocks; None
    cuts each row of a weight, everything after axis 0. Nothing is observed. A code holds the block's exponent
    above the element's bits. Deviation from OCP: NaN stays in its element and Inf saturates, where OCP makes the
    whole block NaN. Raises ConfigError.

    >>> MXQuantizer(4, "fp4_e2m1")(torch.tensor([[0.1, 0.9, 3.2, -6.9]]))
    tensor([[ 0.,  1.,  3., -6.]])
    """

    typical = "{name}:{n}"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "mxfp4": _element_preset("fp4_e2m1"),
        "mxfp6_e2m3": _element_preset("fp6_e2m3"),
        "mxfp6_e3m2": _element_preset("fp6_e3m2"),
        "mxfp8_e4m3": _element_preset("fp8_e4m3"),
        "mxfp8_e5m2": _element_preset("fp8_e5m2"),
        "mxint8": _element_preset("int8"),
    }
    about = About("2**p * nearest element, p by the block", "OCP Microscaling Formats v1.0", "4, 6, 8", ("block",))

    def __init__(
        self,
        n_bits: int,
        element: str,
        mode: str = "floor",
        block: int = 32,
        block_axis: int | None = None,
    ) -> None:
        super().__init__()
        if element not in ELEMENTS:
            raise ConfigError(f"element must be one of {', '.join(ELEMENTS)}, got {element!r}")
        if n_bits != ELEMENTS[element].n_bits:
            raise ConfigError(f"{element} has {ELEMENTS[element].n_bits} bits, not {n_bits}")
        if mode not in MODES:
            raise ConfigError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        _check_block(block)
        self.n_bits = n_bits
        self.element = ELEMENTS[element]
        self.element_name = element
        self.mode = mode
        self.block = block
        self.block_axis = block_axis

    def format(self) -> Format:
        return MXBlocks(self.block, self.block_axis, self.element, self.mode, scales=self._kept_scales)

    @classmethod
    def examples(cls, axis: int | None = None) -> list[MXQuantizer]:
        """Return the instances on which the laws are checked; there are none per channel."""
        if axis is not None:
            return []
        return [cls(4, "fp4_e2m1"), cls(8, "fp8_e4m3", "rceil", block_axis=1), cls(8, "int8", "even", block=7)]

    def extra_repr(self) -> str:
        return f"{self.element_name}, mode={self.mode!r}, {super().extra_repr()}"


@QUANTIZERS.register("nvfp4")
class NVFP4Quantizer(FittedQuantizer, _BlockQuantizer):
    """Blocks of 16 FP4 numbers with an FP8 E4M3 scale each, and one float scale for the tensor (NVIDIA; A12).

    The tensor's scale is its largest observed magnitude over 6 * 448; `two_level=False` leaves it 1, as in the
    published single-level form. `block_axis`: the axis that is cut into blocks; None cuts each row of a weight. A code
    holds the block's scale above the element's 4 bits. Raises ConfigError.

    >>> quantizer = NVFP4Quantizer(two_level=False)
    >>> quantizer.pre_observe(torch.tensor([[0.1, 0.9, 3.2, -6.0]]))
    >>> quantizer(torch.tensor([[0.1, 0.9, 3.2, -6.0]]))
    tensor([[ 0.,  1.,  3., -6.]])
    """

    n_bits = 4
    code_range = NVFP4Blocks.code_range
    statistics = ("tensor_scale",)
    joined_by = {"tensor_scale": "max"}
    typical = "{name}:{n}"
    about = About("s_tensor * E4M3 * E2M1, scales by absmax", "NVIDIA NVFP4", "4", ("block",))

    def __init__(
        self,
        two_level: bool = True,
        block: int = 16,
        block_axis: int | None = None,
        momentum: float = 0.0,
        nonfinite: str = "raise",
    ) -> None:
        _check_block(block)
        super().__init__(momentum, None, False, nonfinite)
        self.gradient = make_gradient("ste")
        self.two_level = self.has_tensor_scale = two_level
        self.block = block
        self.block_axis = block_axis

    def measure(self, x: Tensor) -> tuple[Tensor, ...]:
        absmax = reduce_max(rows(x, None).abs().amax()).to(torch.float64)
        scale = (absmax / (6 * 448)).clamp_min(2.0**-100)
        scale = scale if self.two_level else torch.ones_like(scale)
        usable = torch.where(absmax > 0, scale, torch.ones_like(scale))
        return (torch.where(absmax.isfinite(), usable, absmax),)

    def format(self) -> Format:
        return NVFP4Blocks(self.block, self.block_axis, self.get()[0], scales=self._kept_scales)

    @classmethod
    def examples(cls, axis: int | None = None) -> list[NVFP4Quantizer]:
        """Return the instances on which the laws are checked; there are none per channel."""
        return [] if axis is not None else [cls(), cls(False, block_axis=1)]

    def extra_repr(self) -> str:
        return f"two_level={self.two_level}, {_BlockQuantizer.extra_repr(self)}"
