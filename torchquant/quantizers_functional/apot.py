"""Additive powers of two: magnitudes that are sums of a few powers of two. docs/algorithms.md A6."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any, cast

import torch
from torch import Tensor

from torchquant._arguments import explained
from torchquant._tensors import constant, like
from torchquant.errors import ConfigError
from torchquant.quantizers_functional._gradient import cast_back, compute_dtype
from torchquant.quantizers_functional._levels import level_values, nearest_level
from torchquant.quantizers_functional.formats import ScaledFormat

# n_bits, with sign -> clip in rms that minimises the squared error on N(0, 1); docs/algorithms.md H3.
APOT_ALPHA = {2: 1.224006362, 3: 2.072508852, 4: 2.627913393, 5: 3.357734171, 6: 6.910640403, 7: 4.193584941}


def check_apot(n_bits: int, signed: bool) -> None:
    """Raise ConfigError unless the levels are defined: 2..7 bits with sign, 1..6 without."""
    least, most = (2, 7) if signed else (1, 6)
    if not (isinstance(n_bits, int) and least <= n_bits <= most):
        kind = "signed" if signed else "unsigned"
        raise ConfigError(f"n_bits must be a whole number from {least} to {most} ({kind}), got {n_bits!r}")


def apot_magnitudes(bits: int) -> tuple[float, ...]:
    """Return the 2**bits magnitudes, sorted, from 0 to 1. bits 1..6.

    >>> apot_magnitudes(3)
    (0.0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)
    """
    if bits % 2 == 0:
        n = bits // 2
        terms = [[0.0] + [2.0 ** -(i + j * n) for j in range(3)] for i in range(n)]
    else:
        terms = {
            1: [[0.0, 1.0]],
            3: [[0.0, 2.0**-1, 2.0**-2, 2.0**-4], [0.0, 2.0**-3]],
            5: [[0.0, 2.0**-1, 2.0**-3, 2.0**-6], [0.0, 2.0**-2, 2.0**-4, 2.0**-7], [0.0, 2.0**-5]],
        }[bits]
    sums = sorted(sum(chosen) for chosen in product(*terms))
    return tuple(value / sums[-1] for value in sums)


APOT_MAGNITUDES = {bits: apot_magnitudes(bits) for bits in range(1, 7)}


def apot_code_range(n_bits: int, signed: bool) -> tuple[int, int]:
    """Return the smallest and largest code."""
    largest = int(2 ** (n_bits - signed) - 1)
    return (-largest if signed else 0), largest


def _magnitudes(n_bits: int, signed: bool, like: Tensor) -> Tensor:
    return constant(APOT_MAGNITUDES[n_bits - 1 if signed else n_bits], like.dtype, like.device)


def apot_codes(u: Tensor, n_bits: int, signed: bool) -> Tensor:
    """Return the signed index of the magnitude nearest to |u|, midpoints down; in u's type, NaN stays NaN."""
    magnitude = u.abs() if signed else u.clamp_min(0.0)
    index = nearest_level(magnitude, _magnitudes(n_bits, signed, u)).to(u.dtype)
    return (index * u.sign() if signed else index) + u.clamp(0.0, 0.0)


def apot_values(codes: Tensor, n_bits: int, signed: bool, dtype: torch.dtype) -> Tensor:
    """Return the levels, in [-1, 1], of codes of any type; NaN stays NaN."""
    real = codes.to(dtype)
    values = level_values(real.nan_to_num(0.0).abs().to(torch.int64), _magnitudes(n_bits, signed, real)) * real.sign()
    return values + real.clamp(0.0, 0.0)


@dataclass(frozen=True, eq=False)
class AdditivePowers(ScaledFormat):
    """Sums of powers of two, the largest 1, times a scale. A code is the index of a magnitude, with its sign."""

    n_bits: int
    signed: bool

    @property
    def code_range(self) -> tuple[int, int]:
        return apot_code_range(self.n_bits, self.signed)

    def codes(self, x: Tensor) -> Tensor:
        return apot_codes(x / self.shaped(self.scale, x), self.n_bits, self.signed)

    def unit_values(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        return apot_values(codes, self.n_bits, self.signed, dtype)


class _LearnedClip(torch.autograd.Function):
    """`clip * level(x / clip)` with the reparameterized clipping function's gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, clip: Tensor, n_bits: int, signed: bool) -> Tensor:
        ctx.save_for_backward(x, clip)
        ctx.form = (n_bits, signed)
        return apot_values(apot_codes(x / clip, n_bits, signed), n_bits, signed, x.dtype).mul_(clip)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (grad,) = grads
        x, clip = ctx.saved_tensors
        n_bits, signed = ctx.form
        u = x / clip
        bounded = u.clamp(-1.0 if signed else 0.0, 1.0)
        inside = bounded.eq(u).to(grad.dtype)
        for_clip = None
        if ctx.needs_input_grad[1]:
            levels = apot_values(apot_codes(u, n_bits, signed), n_bits, signed, u.dtype)
            for_clip = (grad * levels.sub_(bounded * inside)).sum_to_size(clip.shape)
        return grad * inside if ctx.needs_input_grad[0] else None, for_clip, None, None


@explained
def apot_quantize(x: Tensor, clip: Tensor, n_bits: int, signed: bool = True) -> Tensor:
    """Quantize x to `clip` times the nearest sum of powers of two.

    x: (*) float. clip: () or broadcastable to x, > 0, same unit as x: the largest level. Returns (*). Gradient of x:
    1 where |x| <= clip (unsigned: 0 <= x <= clip). Gradient of clip: `sign(x)` beyond it, `level(u) - u` inside with
    u = x / clip. Source: Li et al. 2020, arXiv:1909.13144. Raises ConfigError.

    >>> apot_quantize(torch.tensor([-0.3, 0.52, 9.0]), torch.tensor(1.0), 4)
    tensor([-0.3000,  0.6000,  1.0000])
    """
    check_apot(n_bits, signed)
    real = x.to(compute_dtype(x))
    return cast_back(cast(Tensor, _LearnedClip.apply(real, like(clip, real), n_bits, signed)), x.dtype)
