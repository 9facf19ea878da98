"""Learned step size: a uniform grid through 0 whose step has a gradient. docs/algorithms.md B5."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from torchquant._arguments import explained
from torchquant.errors import ConfigError
from torchquant.quantizers_functional._gradient import cast_back, compute_dtype
from torchquant.quantizers_functional.uniform import integer_codes, like

# n_bits -> step of -2**(n-1) .. 2**(n-1) - 1 that minimises the squared error on N(0, 1); docs/algorithms.md H1.
FULL_STEP = {
    2: 1.048385262,
    3: 0.6018242267,
    4: 0.3386079357,
    5: 0.1887922229,
    6: 0.104179447,
    7: 0.05688734457,
    8: 0.03076557854,
    9: 0.01649946002,
    10: 0.008785541311,
    11: 0.004649853339,
    12: 0.002448412778,
}
# The same for -(2**(n-1) - 1) .. 2**(n-1) - 1; its row n + 1 is optimal for n unsigned bits on the positive half.
NARROW_STEP = {
    2: 1.224006362,
    3: 0.650769704,
    4: 0.3534113156,
    5: 0.1932485244,
    6: 0.1054875861,
    7: 0.05726128072,
    8: 0.03087008604,
    9: 0.01652815283,
    10: 0.008793311935,
    11: 0.004651935789,
    12: 0.002448966319,
}


def lsq_codes(n_bits: int, signed: bool) -> tuple[int, int]:
    """Return the smallest and largest code. Raises ConfigError."""
    least, most = (2, max(FULL_STEP)) if signed else (1, max(NARROW_STEP) - 1)
    if not (isinstance(n_bits, int) and least <= n_bits <= most):
        kind = "signed" if signed else "unsigned"
        raise ConfigError(f"n_bits must be a whole number from {least} to {most} ({kind}), got {n_bits!r}")
    return integer_codes(n_bits, signed)


class _LearnedStep(torch.autograd.Function):
    """Computes `step * round(clamp(x / step, qmin, qmax))` with the gradients of docs/algorithms.md B5."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, step: Tensor, qmin: int, qmax: int, gradient_scale: float, delta: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, step, delta)
        ctx.codes = (qmin, qmax)
        ctx.gradient_scale = gradient_scale
        return torch.div(x, step).clamp_(qmin, qmax).round_().mul_(step)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        (grad,) = grads
        x, step, delta = ctx.saved_tensors
        qmin, qmax = ctx.codes
        scaled = torch.div(x, step)
        clamped = scaled.clamp(qmin, qmax)
        for_step = for_x = None
        if ctx.needs_input_grad[1]:
            # round(v) - v inside; at and beyond an end the end itself, where the last term vanishes.
            inside = torch.ops.aten.hardtanh_backward(scaled, scaled, float(qmin), float(qmax))
            for_step = clamped.round().sub_(inside).mul_(grad).sum_to_size(step.shape) * ctx.gradient_scale
        if ctx.needs_input_grad[0]:
            passed = grad
            if delta is not None:
                # x and its level, in an interval of length 2, as the paper normalizes them.
                lean = (clamped - clamped.round()) * (2.0 / (qmax - qmin))
                passed = grad * (1.0 + delta * grad.sign() * lean)
            for_x = torch.ops.aten.hardtanh_backward(passed, scaled, float(qmin), float(qmax))
        return for_x, for_step, None, None, None, None


@explained
def lsq_quantize(
    x: Tensor,
    step: Tensor,
    n_bits: int,
    signed: bool = True,
    gradient_scale: float = 1.0,
    offset: Tensor | None = None,
    delta: Tensor | None = None,
) -> Tensor:
    """Quantize x to `step * {codes} + offset`, differentiable in all three.

    x: (*) float. step, offset: () or broadcastable to x, same unit as x; step > 0. Returns (*). Gradient of x: 1
    strictly inside the codes, else 0. Gradient of step: `round(v) - v` inside with v = (x - offset) / step, the end
    code outside, summed over the elements that share a step, times `gradient_scale`. Gradient of offset: 0 inside,
    1 outside. `delta` (): the gradient of x is scaled element by element, `g (1 + delta sign(g) (x_n - x_q))` with
    x_n and x_q normalized to an interval of length 2. Source: Esser et al. 2020, arXiv:1902.08153; the offset Bhalgat
    et al. 2020, arXiv:2004.09576; delta Lee et al. 2021, arXiv:2104.00903.
    Raises ConfigError.

    >>> step = torch.tensor(0.5, requires_grad=True)
    >>> lsq_quantize(torch.tensor([0.74, 9.0]), step, 3).sum().backward()
    >>> step.grad
    tensor(2.5200)
    """
    qmin, qmax = lsq_codes(n_bits, signed)
    real = x.to(compute_dtype(x))
    if offset is not None:
        shift = like(offset, real)
        value = cast(Tensor, _LearnedStep.apply(real - shift, like(step, real), qmin, qmax, gradient_scale, delta))
        return cast_back(value + shift, x.dtype)
    value = cast(Tensor, _LearnedStep.apply(real, like(step, real), qmin, qmax, gradient_scale, delta))
    return cast_back(value, x.dtype)
