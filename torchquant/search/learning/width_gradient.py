"""Compute the gradient of a bit width where the forward quantizes at one rounded width."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchquant.errors import ConfigError, NoAffineViewError
from torchquant.quantizers import Quantizer
from torchquant.range_observers._statistics import per_channel_view

MIXING_FORMS = ("interp", "secant")
FORMS = (*MIXING_FORMS, "step", "stat")


class _WidthGradient(torch.autograd.Function):
    """Returns y unchanged; the gradient of the width is `sum(grad * slope)`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, width: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (slope,) = ctx.saved_tensors
        return grads[0], (grads[0] * slope).sum().to(torch.float32), None


def attach_width_gradient(
    y: Tensor,
    x: Tensor,
    width: Tensor,
    neighbours: Sequence[tuple[Quantizer, Quantizer, int]],
    shares: Tensor,
    form: str,
) -> Tensor:
    """Give y the gradient `<grad, sum_o share_o dQ_o/db>` for the width. `neighbours`: option, its neighbour, width.

    "step": the range is fixed, so `dQ/db = (Q(x) - x) / delta * d delta/db` inside the range and 0 outside, where
    `d delta/db = -ln 2 * 2**b / (qmax - qmin) * delta`. "stat": the step and the largest level follow the width as
    the two neighbours' do: `(Q(x) - x) * d ln(step)/db` inside, `d level/db` outside. docs/algorithms.md F3.
    """
    with torch.no_grad():
        slope = torch.zeros_like(x)
        for (option, other, n_bits), share in zip(neighbours, shares, strict=True):
            if option is not other:
                slope = slope + share * (_step_slope if form == "step" else _stat_slope)(x, option, other, n_bits)
    return _WidthGradient.apply(y, width, slope)


def delta_slope(n_bits: int, qmin: int, qmax: int) -> float:
    """Compute `d delta/db / delta` of a grid over a fixed range, in closed form.

    >>> round(delta_slope(4, -7, 7), 6)
    -0.792168
    """
    return -math.log(2.0) * 2.0**n_bits / (qmax - qmin)


def _step_slope(x: Tensor, option: Quantizer, other: Quantizer, n_bits: int) -> Tensor:
    try:
        _, _, qmin, qmax = option.affine_params()
    except NoAffineViewError as error:
        raise ConfigError(f"the form 'step' needs a uniform grid with a range; {error}. Use 'interp'") from error
    low, high = option.format().ends(x)
    inside = (x >= low) & (x <= high)
    return torch.where(inside, (option(x) - x) * delta_slope(n_bits, qmin, qmax), torch.zeros_like(x))


def _stat_slope(x: Tensor, option: Quantizer, other: Quantizer, n_bits: int) -> Tensor:
    ours, theirs = (q.levels().to(x.dtype) for q in (option, other))
    sign = 1.0 if theirs.shape[-1] >= ours.shape[-1] else -1.0

    def seen(value: Tensor) -> Tensor:
        return per_channel_view(value, x.ndim, option.axis)

    gap_slope = seen(sign * (_gap(theirs).log() - _gap(ours).log()))
    ends = [(ours[..., i], seen(sign * (theirs[..., i] - ours[..., i]))) for i in (0, -1)]
    (low, low_slope), (high, high_slope) = ends
    slope = (option(x) - x) * gap_slope
    half = seen(_gap(ours)) / 2
    slope = torch.where(x > seen(high) + half, high_slope, slope)
    return torch.where(x < seen(low) - half, low_slope, slope)


def _gap(levels: Tensor) -> Tensor:
    """Return the smallest distance between two levels."""
    return levels.diff(dim=-1).amin(-1).clamp_min(torch.finfo(levels.dtype).tiny)
