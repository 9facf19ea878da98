"""DoReFa: weights through tanh, activations in [0, 1], gradients with noise. docs/algorithms.md B7."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from torchquant._arguments import explained
from torchquant.errors import ConfigError
from torchquant.quantizers_functional._gradient import cast_back, compute_dtype, pass_through
from torchquant.quantizers_functional.uniform import like


def check_dorefa(n_bits: int, what: str = "n_bits") -> None:
    """Raise ConfigError unless n_bits is 1..16."""
    if not (isinstance(n_bits, int) and 1 <= n_bits <= 16):
        raise ConfigError(f"{what} must be a whole number from 1 to 16, got {n_bits!r}")


def unit_codes(x: Tensor, n_bits: int) -> Tensor:
    """Compute `RHE((2**n_bits - 1) * clamp(x, 0, 1))`, in x's type; NaN stays NaN."""
    n_steps = int(2**n_bits - 1)
    return x.clamp(0.0, 1.0).mul_(n_steps).round_()


def unit_values(codes: Tensor, n_bits: int) -> Tensor:
    """Compute `codes / (2**n_bits - 1)`."""
    return codes / int(2**n_bits - 1)


def squashed(w: Tensor, absmax: Tensor) -> Tensor:
    """Compute `tanh(w) / (2 tanh(absmax)) + 1/2`, in [0, 1]; 1/2 where absmax is 0."""
    largest = absmax.tanh()
    return w.tanh() / (2.0 * torch.where(largest > 0, largest, torch.ones_like(largest))) + 0.5


def signed_values(unit: Tensor, absmax: Tensor) -> Tensor:
    """Compute `2 unit - 1`; 0 where absmax is 0."""
    values = unit.mul(2.0).sub(1.0)
    return torch.where(absmax > 0, values, values * 0.0)


def dorefa_preimage(values: Tensor, absmax: Tensor) -> Tensor:
    """Return weights, float64, in the middle of the intervals that `dorefa_weight_quantize` maps to these levels."""
    largest = absmax.to(torch.float64)
    return (values.to(torch.float64) * largest.tanh()).atanh().clamp(-largest, largest)


@explained
def dorefa_weight_quantize(w: Tensor, absmax: Tensor | float, n_bits: int) -> Tensor:
    """Quantize weights to `2 quantize(tanh(w) / (2 max|tanh w|) + 1/2) - 1`, in [-1, 1] whatever their scale.

    w: (*) float. absmax: () or broadcastable to w, the largest |w|, a constant for the gradient. n_bits 2..16.
    Returns (*). Gradient: straight through the rounding, `(1 - tanh(w)**2) / max|tanh w|`.
    Source: Zhou et al. 2016, arXiv:1606.06160. Raises ConfigError.

    >>> dorefa_weight_quantize(torch.tensor([-1.0, -0.2, 0.1, 0.5]), 1.0, 2)
    tensor([-1.0000, -0.3333,  0.3333,  0.3333])
    """
    check_dorefa(n_bits)
    real = w.to(compute_dtype(w))
    scale = like(absmax, real)
    unit = squashed(real, scale)
    rounded = pass_through(unit, unit_values(unit_codes(unit.detach(), n_bits), n_bits))
    return cast_back(signed_values(rounded, scale), w.dtype)


@explained
def sat_gain(w_hat: Tensor) -> Tensor:
    """Compute `1 / sqrt(n_out Var(w_hat))`, by which SAT multiplies the weight of a layer without batch norm; ().

    w_hat: (out, in, ...), quantized; n_out: its outputs times the positions of the kernel. 1 where all numbers are
    equal. Source: Jin et al. 2019, SAT, arXiv:1912.10207, eq. 8.

    >>> sat_gain(torch.tensor([[1.0, -1.0], [1.0, -1.0]]))
    tensor(0.7071)
    """
    n_out = w_hat.numel() // (w_hat.shape[1] if w_hat.ndim > 1 else 1)
    size = w_hat.var(correction=0) * n_out
    return torch.where(size > 0, size, torch.ones_like(size)).rsqrt()


@explained
def dorefa_act_quantize(x: Tensor, n_bits: int) -> Tensor:
    """Quantize `clamp(x, 0, 1)` to 2**n_bits levels. Gradient 1 where 0 <= x <= 1, else 0.

    >>> dorefa_act_quantize(torch.tensor([-0.1, 0.2, 0.5, 0.9, 1.3]), 2)
    tensor([0.0000, 0.3333, 0.6667, 1.0000, 1.0000])
    """
    check_dorefa(n_bits)
    with torch.no_grad():
        real = x.to(compute_dtype(x))
        value = cast_back(unit_values(unit_codes(real, n_bits), n_bits), x.dtype)
        mask = real.clamp(0.0, 1.0).eq(real).to(real.dtype)
    return pass_through(x, value, mask)


class _QuantizedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, n_bits: int, generator: torch.Generator | None) -> Tensor:
        ctx.n_bits = n_bits
        ctx.generator = generator
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        n_steps = int(2**ctx.n_bits - 1)
        # Not rand_like: that takes no generator.
        noise = torch.rand(grad.shape, generator=ctx.generator, dtype=torch.float32, device=grad.device)
        return quantized_gradient(grad, ctx.n_bits, noise.sub_(0.5).div_(n_steps)), None, None


def quantized_gradient(grad: Tensor, n_bits: int, noise: Tensor | float) -> Tensor:
    """Compute `2M (quantize(g / (2M) + 1/2 + noise) - 1/2)`, M the largest |g| per sample (axis 0); 0 where M is 0."""
    real = grad.to(compute_dtype(grad))
    largest = real.abs().flatten(1).amax(1) if real.ndim > 1 else real.abs()
    largest = largest.view(-1, *[1] * (real.ndim - 1)) if real.ndim else largest
    safe = torch.where(largest > 0, largest, torch.ones_like(largest))
    unit = real / (2.0 * safe) + 0.5 + noise
    values = (unit_values(unit_codes(unit, n_bits), n_bits) - 0.5) * (2.0 * largest)
    return values.to(grad.dtype)


@explained
def dorefa_gradient(x: Tensor, n_bits: int, generator: torch.Generator | None = None) -> Tensor:
    """Return x; in backward its gradient is quantized to n_bits, with uniform noise of one step before rounding.

    x: (N, *), N samples, each with a scale of its own. `generator` makes the noise repeatable. The noise is
    independent for every element, as in the paper. Source: Zhou et al. 2016, arXiv:1606.06160, eq. 12.
    Raises ConfigError.

    >>> x = torch.zeros(1, 3, requires_grad=True)
    >>> (dorefa_gradient(x, 8) * torch.tensor([0.4, -0.1, 0.05])).sum().backward()
    >>> (x.grad - torch.tensor([0.4, -0.1, 0.05])).abs().max() < 0.8 / 255
    tensor(True)
    """
    check_dorefa(n_bits)
    return cast(Tensor, _QuantizedGradient.apply(x, n_bits, generator))
