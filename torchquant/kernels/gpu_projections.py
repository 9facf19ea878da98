"""The kernels on a GPU of formats that are a few fixed numbers times a scale: `gpu_forms.py`."""

# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator, no-untyped-def"
# ruff: noqa: N803
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchquant.kernels._bounds import Clamp
from torchquant.kernels.cpu import parts
from torchquant.kernels.gpu import FLAGS, OPERATIONS, launch, read, tuned
from torchquant.kernels.gpu_forms import FORMS
from torchquant.kernels.gpu_math import at_least, at_most, block, number, store_bits


@tuned
@triton.jit(do_not_specialize=["size"])
def _project(
    x, value, bits, scale, other, third, low, high, n, inner, channels, size,
    FORM: tl.constexpr, CONSTANTS: tl.constexpr, SCALE: tl.constexpr, OTHER: tl.constexpr, THIRD: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, STRICT: tl.constexpr, INSIDE: tl.constexpr, PACKS: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows, place, exists, channel = block(n, inner, channels, WIDE, ROWS)
    real = tl.load(x + place, mask=exists, other=0.0)
    clamped = real
    if LOW != -2:
        clamped = at_least(clamped, number(low, real, channel, LOW))
    if HIGH != -2:
        clamped = at_most(clamped, number(high, real, channel, HIGH))
    level, within = FORM(
        clamped, number(scale, real, channel, SCALE), number(other, real, channel, OTHER),
        number(third, real, channel, THIRD), CONSTANTS,
    )  # fmt: skip
    tl.store(value + place, level, mask=exists)
    if PACKS:
        inside = exists
        if INSIDE:
            inside = inside & within
        if STRICT and LOW != -2:
            inside = inside & ((real <= number(low, real, channel, LOW)) == 0)
        if STRICT and HIGH != -2:
            inside = inside & ((real >= number(high, real, channel, HIGH)) == 0)
        store_bits(bits, rows, inside, n)


def _projection(name: str) -> Any:
    """Return the function of an operation; see `_project` of cpu_projections.py, which has the same arguments."""

    def project(
        x: Tensor,
        numbers: tuple[Tensor, ...],
        clamp: Clamp | None,
        is_strict: bool,
        wants_inside: bool,
        *constants: float,
    ) -> tuple[Tensor, Tensor | None] | None:
        shape = parts(x, *numbers)
        if shape is None:
            return None
        (scale, other, third), (low, high) = (*numbers, None, None)[:3], clamp or (None, None)
        given, kinds = read(x, scale=scale, other=other, third=third, low=low, high=high)
        value, packs = torch.empty_like(x), wants_inside or (is_strict and clamp is not None)
        bits = x.new_empty(-(-x.numel() // FLAGS), dtype=torch.uint8) if packs else None
        arguments = x, value, value if bits is None else bits, *given, x.numel(), shape[2], shape[1]
        asked = {"STRICT": is_strict, "INSIDE": wants_inside, "PACKS": packs}
        launch(_project, x, *arguments, FORM=FORMS[name], CONSTANTS=tuple(map(float, constants)), **asked, **kinds)
        return value, bits

    return project


OPERATIONS |= {name: (_projection(name), (torch.float32,)) for name in FORMS}
