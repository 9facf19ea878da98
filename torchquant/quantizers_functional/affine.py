"""Affine (uniform integer) quantization: `x_hat = (clamp(RHE(x / delta) + z) - z) * delta`."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor

from torchquant import kernels
from torchquant._arguments import explained
from torchquant._tensors import divided
from torchquant.errors import ConfigError
from torchquant.quantizers_functional._gradient import Clamp, Gradient
from torchquant.quantizers_functional.formats import AffineParams as AffineParams
from torchquant.quantizers_functional.formats import UniformGrid

SYMMETRIES = (False, True, "narrow", "full", "torch", "asymmetric-narrow")
MAX_BITS = 24


def check_affine(n_bits: int, symmetric: bool | str) -> None:
    """Raise ConfigError unless the pair names a grid of docs/algorithms.md A1."""
    if symmetric not in SYMMETRIES:
        raise ConfigError(f"symmetric must be one of {SYMMETRIES}, got {symmetric!r}")
    fewest = 2 if symmetric in ("narrow", "asymmetric-narrow") else 1
    if not (isinstance(n_bits, int) and fewest <= n_bits <= MAX_BITS):
        kind = f" with symmetric={symmetric!r}" if symmetric else ""
        raise ConfigError(f"n_bits must be a whole number from {fewest} to {MAX_BITS}{kind}, got {n_bits!r}")


def step(span: Tensor, n_steps: float) -> Tensor:
    """Compute `span / n_steps`, 1 for an empty span, at least 2**-126 otherwise (docs/algorithms.md 0.3).

    The step is at most the largest bfloat16, below that of float32: a level of one step must not overflow in bfloat16.
    """
    largest = torch.finfo(torch.bfloat16 if span.dtype == torch.float32 else span.dtype).max
    delta = divided(span, n_steps).clamp(2.0**-126, largest)
    return torch.where(span > 0, delta, torch.ones_like(delta))


@explained
def affine_params(range_min: Tensor, range_max: Tensor, n_bits: int, symmetric: bool | str = False) -> AffineParams:
    """Compute step, zero point and code bounds of the grid that covers [range_min, range_max] and real 0.

    range_min, range_max: () or (C,), same unit as the tensor to quantize. `symmetric`:

    * `False`: codes 0 .. 2**n_bits - 1, `delta = (max - min) / (2**n_bits - 1)`.
    * `True`: the published torchquant grid, `delta = 2 * absmax / (2**n_bits - 1)` on signed codes
      -2**(n_bits-1) .. 2**(n_bits-1) - 1; the positive end saturates by half a step.
    * `"narrow"`: `delta = absmax / (2**(n_bits-1) - 1)`, one code fewer, symmetric about 0.
    * `"full"`: all 2**n_bits signed codes, no saturation at either end.
    * `"torch"`: the step of `True` on codes 0 .. 2**n_bits - 1 with zero point 2**(n_bits-1), as torch and NNI >= 3.0
      store symmetric ranges on unsigned types.
    * `"asymmetric-narrow"`: `delta = (max - min) / (2**n_bits - 2)` and a zero point on the codes of "narrow", as NNI
      stores asymmetric ranges on signed types.

    Source: docs/algorithms.md A1; Jacob et al. 2018 for the asymmetric rule. Deviation: an empty range
    gives `delta = 1` and `zero_point = 0`; delta is at least 2**-126; ranges stop at half the
    largest float, so that no grid value overflows.

    >>> affine_params(torch.tensor(-10.0), torch.tensor(7.2), 4)[:2]
    (tensor(1.1467), tensor(9.))
    """
    check_affine(n_bits, symmetric)
    return affine_grid(range_min, range_max, n_bits, symmetric)


class AffineRule(NamedTuple):
    """How the grid over a range follows from it: `n_steps` steps are the range, or its larger magnitude if centred.

    `zero_point`: that of a centred grid; None: it follows from the range.
    """

    n_steps: float
    qmin: int
    qmax: int
    zero_point: int | None


def affine_rule(n_bits: int, symmetric: bool | str) -> AffineRule | None:
    """Return the rule of a grid; None for "full", whose ends follow rules of their own."""
    half = 2 ** (n_bits - 1)
    if symmetric is False:
        return AffineRule(2 * half - 1, 0, 2 * half - 1, None)
    if symmetric == "narrow":
        return AffineRule(half - 1, 1 - half, half - 1, 0)
    if symmetric == "asymmetric-narrow":
        return AffineRule(2 * half - 2, 1 - half, half - 1, None)
    if symmetric == "full":
        return None
    return (
        AffineRule(half - 0.5, 0, 2 * half - 1, half)
        if symmetric == "torch"
        else AffineRule(half - 0.5, -half, half - 1, 0)
    )


def affine_grid(range_min: Tensor, range_max: Tensor, n_bits: int, symmetric: bool | str) -> AffineParams:
    """Compute `affine_params` of arguments that have been checked."""
    rule = affine_rule(n_bits, symmetric)
    if rule is None:
        half = 2 ** (n_bits - 1)
        low, high = _ends(range_min, range_max)
        span = -low / half if half == 1 else torch.maximum(-low / half, high / (half - 1))
        return AffineParams(step(span, 1.0), 0, -half, half - 1)
    n_steps, *codes, zero_point = rule
    if zero_point is None:
        return AffineParams(*_shifted(range_min, range_max, *codes), *codes)
    return AffineParams(_centred(range_min, range_max, n_steps), zero_point, *codes)


def _ends(range_min: Tensor, range_max: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ends of ranges that contain 0 and whose levels do not overflow."""
    limit = torch.finfo(range_max.dtype).max / 2
    return range_min.clamp(-limit, 0.0), range_max.clamp(0.0, limit)


def _shifted(range_min: Tensor, range_max: Tensor, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
    """Return the step and the zero point of the codes over a range."""
    kernel = kernels.find("affine", range_max)
    if kernel is not None and (found := kernel(range_max, range_min, qmax - qmin, (qmin, qmax))) is not None:
        return cast("tuple[Tensor, Tensor]", found)
    low, high = _ends(range_min, range_max)
    delta = step(high - low, qmax - qmin)
    return delta, (qmin + torch.round(-low / delta)).clamp(qmin, qmax)


def _centred(range_min: Tensor, range_max: Tensor, n_steps: float) -> Tensor:
    """Return the step of which `n_steps` are the larger magnitude of a range."""
    kernel = kernels.find("affine", range_max)
    if kernel is not None and (found := kernel(range_max, range_min, n_steps)) is not None:
        return cast(Tensor, found[0])
    low, high = _ends(range_min, range_max)
    return step(torch.maximum(-low, high), n_steps)


@explained
def affine_quantize(
    x: Tensor,
    delta: Tensor | float,
    zero_point: Tensor | int,
    n_levels: int,
    gradient: str = "ste",
    clamp: Clamp | None = None,
) -> Tensor:
    """Quantize x to `(q - zero_point) * delta` with codes q in 0 .. n_levels - 1.

    x: (*) float16, bfloat16, float32 or float64. delta: () or broadcastable to x, > 0, same unit
    as x. zero_point: whole number(s) of the same shape. Returns (*), x's type and memory format.
    Per channel through the shape of delta and zero_point, e.g. (C, 1, 1, 1).

    Source: docs/algorithms.md A1: divide, round half to even, then add the zero point, as ONNX
    QuantizeLinear does. `gradient`: "ste" or "clipped" (0 where the code saturates).
    `clamp=(low, high)` quantizes `x.clamp(low, high)` in the same pass. Raises ConfigError, for a delta not above 0
    only where the check is free: for a number, or a tensor on a CPU outside of compiled code.

    >>> affine_quantize(torch.tensor([3.9, 7.2, -10.0]), 17.2 / 15, 9, 16)
    tensor([  3.4400,   6.8800, -10.3200])
    """
    if not (isinstance(n_levels, int) and n_levels >= 2):
        raise ConfigError(f"n_levels must be a whole number of at least 2, got {n_levels!r}")
    is_known = not isinstance(delta, Tensor) or (delta.device.type == "cpu" and not torch.compiler.is_compiling())
    if is_known and not bool((torch.as_tensor(delta) > 0).all()):
        least = float(torch.as_tensor(delta).min())
        raise ConfigError(f"delta must be above 0, got {least!r}; a constant tensor takes any delta, such as 1")
    return UniformGrid(delta, zero_point, 0, n_levels - 1).quantize(x, gradient, clamp)


def quantize_uniform(
    x: Tensor,
    params: AffineParams,
    gradient: str | Gradient = "ste",
    clamp: Clamp | None = None,
    training: bool = True,
) -> Tensor:
    """Quantize x on the grid of `params`; shapes as in `affine_quantize`."""
    return UniformGrid(*params).quantize(x, gradient, clamp, training)
