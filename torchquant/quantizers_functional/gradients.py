"""The gradient estimators: one small class each. Formulas: docs/algorithms.md B.

`_gradient.py` has the contract of estimators. Estimators with learned parameters are quantizers of their own (LSQ,
PACT and others).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from torchquant.errors import ConfigError
from torchquant.quantizers_functional._bits import is_channels_last, pack_mask, unpack_mask
from torchquant.quantizers_functional._gradient import GRADIENTS, Gradient, Projected, owned, pass_through

WAVE = math.sqrt(2.0) * math.pi
"""The factor of the amplitude in `rdfs`."""


@GRADIENTS.register("ste")
@dataclass(frozen=True, repr=False)
class STE(Gradient):
    """B1, straight through: the gradient passes unchanged."""

    name = "ste"
    packs = True


@GRADIENTS.register("clipped")
@dataclass(frozen=True, repr=False)
class ClippedSTE(Gradient):
    """B2: straight through where the format did not clip, else 0."""

    name = "clipped"
    wants_inside = True
    packs = True


@GRADIENTS.register("hardtanh")
@dataclass(frozen=True, repr=False)
class HardTanh(Gradient):
    """B3, for 1-bit formats: straight through where |x| <= 1, else 0 (Courbariaux et al. 2016, arXiv:1602.02830)."""

    name = "hardtanh"
    needs = frozenset({"sign"})

    def attach(self, projected: Projected) -> Tensor:
        with torch.no_grad():
            mask = _times(projected.x.detach().abs().le_(1.0), projected.inside)
        return pass_through(projected.x, projected.value, mask)


@GRADIENTS.register("approxsign")
@dataclass(frozen=True, repr=False)
class ApproxSign(Gradient):
    """B3, for 1-bit formats: the gradient times `max(0, 2 - 2|x|)` (Liu et al. 2018, Bi-Real Net, arXiv:1808.00278)."""

    name = "approxsign"
    needs = frozenset({"sign"})

    def attach(self, projected: Projected) -> Tensor:
        with torch.no_grad():
            factor = _times((2.0 - 2.0 * projected.x.detach().abs()).clamp_min_(0.0), projected.inside)
        return cast(Tensor, _Scaled.apply(projected.x, owned(projected.value, projected.x), factor))


@GRADIENTS.register("ede")
@dataclass(frozen=True, repr=False)
class ErrorDecay(Gradient):
    """B13, error decay estimator, for 1-bit formats: the gradient times `k t (1 - tanh(t x)**2)`, `k = max(1 / t, 1)`.

    Small t is nearly straight through, large t nearly the sign itself. Schedule it from 0.1 to 10, as the paper does:
    `GradientSchedule(model, "ede", t=Ramp(0.1, 10.0, n_steps, "geometric"))`. Source: Qin et al. 2020, IR-Net,
    arXiv:1909.10788, eq. 9-10.
    """

    name = "ede"
    needs = frozenset({"sign"})
    t: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 < self.t < math.inf:
            raise ConfigError(f"t must be above 0 and finite, got {self.t!r}")

    def attach(self, projected: Projected) -> Tensor:
        with torch.no_grad():
            slope = 1.0 - torch.tanh(self.t * projected.x.detach()).square_()
            factor = _times(slope.mul_(max(1.0, self.t)), projected.inside)
        return cast(Tensor, _Scaled.apply(projected.x, owned(projected.value, projected.x), factor))


@GRADIENTS.register("rdfs")
@dataclass(frozen=True, repr=False)
class DampedFourier(Gradient):
    """B14, rotated damped Fourier surrogate: the gradient times `(1 - S) / (1 + S)`, for uniform formats.

    `S = sqrt(2) pi amplitude cos(pi d)` with d the distance to the level in steps: 1 on a threshold, smallest on a
    level, so that weights near a threshold move most. 0 where the format clips. `amplitude` 0 is the clipped
    straight-through; below `1 / (sqrt(2) pi)` the factor stays positive. Source: StableQAT, arXiv:2601.19320.
    """

    name = "rdfs"
    needs = frozenset({"step"})
    wants_inside = True
    amplitude: float = 0.21

    def __post_init__(self) -> None:
        if not 0.0 <= self.amplitude * WAVE < 1.0:
            raise ConfigError(
                f"amplitude must be at least 0 and below {1.0 / WAVE:.4f}, where the factor is positive everywhere, "
                f"got {self.amplitude!r}"
            )

    def attach(self, projected: Projected) -> Tensor:
        with torch.no_grad():
            distance = (projected.x.detach() - projected.value).div_(_step(self, projected)).clamp_(-0.5, 0.5)
            wave = distance.mul_(math.pi).cos_().mul_(WAVE * self.amplitude)
            factor = (1.0 - wave).div_(1.0 + wave).to(projected.value.dtype).nan_to_num_(0.0)
            factor = _times(factor, projected.inside)
        return cast(Tensor, _Scaled.apply(projected.x, owned(projected.value, projected.x), factor))


@GRADIENTS.register("ewgs")
@dataclass(frozen=True, repr=False)
class EWGS(Gradient):
    """B8, element-wise scaling: `g * (1 + delta * sign(g) * (x - value) / half)` where not clipped, else 0.

    `half` is half the distance of the outermost levels: x and its discretisation are normalised to an
    interval of length 2. `delta` 0 is the clipped straight-through. Source: Lee et al. 2021, arXiv:2104.00903.
    """

    name = "ewgs"
    wants_inside = True
    delta: float = 1e-3

    def __post_init__(self) -> None:
        if not self.delta >= 0.0:
            raise ConfigError(f"delta must be a number >= 0, got {self.delta!r}")

    def attach(self, projected: Projected) -> Tensor:
        with torch.no_grad():
            low, high = _ends(self, projected)
            half = ((high - low) / 2).to(projected.value.dtype)
            safe = torch.where(half > 0, half, torch.ones_like(half))
            # Outside, where the mask removes it, it may be infinite, and 0 times infinity is not 0.
            lean = (projected.x.detach() - projected.value).div_(safe).nan_to_num_(0.0).clamp_(-1.0, 1.0)
            mask = torch.ones_like(projected.value) if projected.inside is None else projected.inside
        value = owned(projected.value, projected.x)
        return cast(Tensor, _Leaning.apply(projected.x, value, lean.mul_(self.delta), mask))


@GRADIENTS.register("dsq")
@dataclass(frozen=True, repr=False)
class DSQ(Gradient):
    """B11: the slope of a staircase of tanh pieces; the forward stays hard. For uniform formats.

    `alpha` in (0, 0.5): how far the pieces are from steps; towards 0 the slope gathers in spikes between the
    levels. 0 outside the outermost levels. Source: Gong et al. 2019, arXiv:1908.05033. Deviation: alpha is
    fixed and the range comes from the quantizer, where the paper learns both.
    """

    name = "dsq"
    needs = frozenset({"step"})
    alpha: float = 0.2

    def __post_init__(self) -> None:
        if not 0.0 < self.alpha < 0.5:
            raise ConfigError(f"alpha must be between 0 and 0.5, got {self.alpha!r}")

    def attach(self, projected: Projected) -> Tensor:
        with torch.no_grad():
            x, step = projected.x.detach(), _step(self, projected)
            low, high = _ends(self, projected)
            clamped = torch.minimum(torch.maximum(x, low), high)
            from_low = (clamped - low) / step
            n_cells = torch.round((high - low) / step)
            cell = torch.minimum(from_low.floor(), n_cells - 1)
            steepness = math.log(2.0 / self.alpha - 1.0)  # k * step
            slope = 1.0 - torch.tanh(steepness * (from_low - cell - 0.5)).square()
            factor = slope * (0.5 * steepness / (1.0 - self.alpha)) * (clamped == x)
            factor = _times(factor.to(projected.value.dtype).nan_to_num_(0.0), projected.inside)
        return cast(Tensor, _Scaled.apply(projected.x, owned(projected.value, projected.x), factor))


@GRADIENTS.register("pwl")
@dataclass(frozen=True, repr=False)
class PWL(Gradient):
    """B9: in training the output is `value + rho * (x - value)`, a leaky staircase; in eval the value.

    `exact` False: the gradient is straight through, as published (AutoQNN); True: it is the slope rho.
    Deviation from the published code: there the output stays soft in eval too.
    """

    name = "pwl"
    softens = True
    rho: float = 0.1
    exact: bool = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.rho <= 1.0:
            raise ConfigError(f"rho must be in [0, 1], got {self.rho!r}")

    def attach(self, projected: Projected) -> Tensor:
        if not projected.training:
            return pass_through(projected.x, projected.value, projected.inside)
        with torch.no_grad():
            lead = (projected.x.detach() - projected.value).mul_(self.rho)
            # Where the format clips, the lead of a far x would undo it.
            lead = lead if projected.inside is None else (lead * projected.inside).nan_to_num_(0.0)
            soft = projected.value + lead
        if not self.exact:
            return pass_through(projected.x, soft, projected.inside)
        factor = _times(torch.full_like(soft, self.rho), projected.inside)
        return cast(Tensor, _Scaled.apply(projected.x, owned(soft, projected.x), factor))


@GRADIENTS.register("pwlc")
@dataclass(frozen=True, repr=False)
class PWLC(PWL):
    """B9: `pwl` inside the range of the format; where it clips, the hard value and no gradient."""

    name = "pwlc"
    wants_inside = True


@GRADIENTS.register("noise")
@dataclass(frozen=True, repr=False)
class AdditiveNoise(Gradient):
    """B12: in training, uniform noise of one step instead of rounding, on x clamped to the levels.

    For uniform formats. Straight through where x was not clamped, else 0; in eval the value. The noise comes
    from torch's generator of the device: `torch.manual_seed` repeats it. Source: Defossez et al. 2021,
    arXiv:2104.09987; Baskin et al. 2018.
    """

    name = "noise"
    needs = frozenset({"step"})
    wants_inside = True
    softens = True

    def attach(self, projected: Projected) -> Tensor:
        if not projected.training:
            return pass_through(projected.x, projected.value, projected.inside)
        with torch.no_grad():
            low, high = _ends(self, projected)
            clamped = torch.minimum(torch.maximum(projected.x.detach().to(low.dtype), low), high)
            noisy = clamped + _step(self, projected) * (torch.rand_like(clamped) - 0.5)
        return pass_through(projected.x, noisy.to(projected.value.dtype), projected.inside)


def _times(factor: Tensor, inside: Tensor | None) -> Tensor:
    return factor if inside is None else factor.mul_(inside)


def _ends(gradient: Gradient, projected: Projected) -> tuple[Tensor, Tensor]:
    if projected.ends is None:
        raise ConfigError(
            f"the gradient {gradient.name!r} needs the ends of the grid; use the quantizer of this format"
        )
    return projected.ends()


def _step(gradient: Gradient, projected: Projected) -> Tensor:
    if projected.step is None:
        raise ConfigError(f"the gradient {gradient.name!r} needs the step of a uniform format")
    return projected.step()


class _Scaled(torch.autograd.Function):
    """Returns `value`; the gradient of x is the incoming one times `factor`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        ctx.mark_dirty(value)
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (factor,) = ctx.saved_tensors
        return factor.to(grads[0].dtype) * grads[0], None, None


class _Leaning(torch.autograd.Function):
    """Returns `value`; the gradient of x is `g + |g| * lean` where `mask` is 1, else 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, lean: Tensor, mask: Tensor) -> Tensor:
        ctx.channels_last = is_channels_last(mask)
        ctx.save_for_backward(lean, pack_mask(mask))
        ctx.mark_dirty(value)
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = grads
        lean, bits = ctx.saved_tensors
        leaned = torch.addcmul(grad, grad.abs(), lean.to(grad.dtype))
        return unpack_mask(bits, grad.shape, grad.dtype, ctx.channels_last) * leaned, None, None, None
