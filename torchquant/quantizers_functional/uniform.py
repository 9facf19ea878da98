"""The one body of every uniform format: affine and Q-format differ in their numbers only."""

from __future__ import annotations

import torch
from torch import Tensor

from torchquant.errors import ConfigError
from torchquant.quantizers_functional._gradient import Clamp, Gradient, apply_projection, compute_dtype

Bound = Tensor | int
MOST_BITS = 32


def like(value: Tensor | float, x: Tensor) -> Tensor:
    """`value` as a tensor of x's type on x's device."""
    return torch.as_tensor(value, dtype=x.dtype, device=x.device)


def _clamp(codes: Tensor, code_min: Bound, code_max: Bound) -> Tensor:
    """A new tensor. Two binary passes for tensor bounds: `torch.clamp` with two tensors is not vectorised."""
    if isinstance(code_min, int) and isinstance(code_max, int):
        return codes.clamp(code_min, code_max)
    return codes.clamp_min(like(code_min, codes)).clamp_max_(like(code_max, codes))


def integer_codes(n_bits: int, signed: bool) -> tuple[int, int]:
    """Smallest and largest of the n-bit integers, two's complement if signed. Raises ConfigError.

    >>> integer_codes(4, True), integer_codes(4, False)
    ((-8, 7), (0, 15))
    """
    if not 1 <= n_bits <= MOST_BITS:
        raise ConfigError(f"n_bits must be a whole number from 1 to {MOST_BITS}, got {n_bits}")
    return (-(2 ** (n_bits - 1)), 2 ** (n_bits - 1) - 1) if signed else (0, 2**n_bits - 1)


def uniform_codes(x: Tensor, delta: Tensor | float, code_min: Bound, code_max: Bound) -> Tensor:
    """`clamp(round_half_even(x / delta), code_min, code_max)` in x's type: codes counted from real 0.

    x: (*). delta: () or broadcastable, > 0. code_min, code_max: whole numbers, () or broadcastable.
    """
    return _clamp(torch.div(x, like(delta, x)).round_(), code_min, code_max)


def _absorb(clamp: Clamp, x: Tensor, delta: Tensor, code_min: Bound, code_max: Bound) -> tuple[Bound, Bound]:
    """Code bounds that clamp x as well: rounding and dividing keep order, so bounds go through them exactly."""
    low, high = clamp
    if low is not None:
        lowest = 0 if low == 0.0 else torch.round(like(low, x) / delta)
        both_whole = isinstance(lowest, int) and isinstance(code_min, int)
        code_min = max(lowest, code_min) if both_whole else torch.maximum(like(code_min, x), like(lowest, x))
    if high is not None:
        highest = torch.minimum(like(code_max, x), torch.round(like(high, x) / delta))
        code_max = torch.maximum(highest, like(code_min, x))
    return code_min, code_max


def uniform_quantize(
    x: Tensor,
    delta: Tensor | float,
    code_min: Bound,
    code_max: Bound,
    gradient: str | Gradient = "ste",
    clamp: Clamp | None = None,
    training: bool = True,
) -> Tensor:
    """Quantize x, or `x.clamp(*clamp)`, on `delta * {code_min .. code_max}`, differentiable.

    `inside` follows docs/algorithms.md A1: 1 where the rounded code was not clamped.
    """

    def project(real: Tensor, want_inside: bool) -> tuple[Tensor, Tensor | None]:
        step = like(delta, real)
        bounds = (code_min, code_max) if clamp is None else _absorb(clamp, real, step, code_min, code_max)
        rounded = torch.div(real, step).round_()
        value = _clamp(rounded, *bounds)
        inside = rounded.eq_(value) if want_inside else None
        return value.mul_(step), inside

    def step() -> Tensor:
        return like(delta, x.to(compute_dtype(x)))

    def ends() -> tuple[Tensor, Tensor]:
        return like(code_min, step()) * step(), like(code_max, step()) * step()

    return apply_projection(x, project, gradient, clamp, project_clamps=True, training=training, ends=ends, step=step)
