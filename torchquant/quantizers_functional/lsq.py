"""Learned step size: a uniform grid through 0 whose step has a gradient. docs/algorithms.md B5."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from torchquant import kernels
from torchquant._arguments import explained
from torchquant._tensors import in_layout_of
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
    """Computes `step * round(clamp(v, qmin, qmax)) + offset`, v = (x - offset) / step.

    The gradients are those of docs/algorithms.md B5. x itself is kept for backward, because the gradient of the step
    needs the distance of each element to its level.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        step: Tensor,
        offset: Tensor | None,
        delta: Tensor | None,
        codes: tuple[int, int],
        gradient_scale: float,
    ) -> Tensor:
        ctx.save_for_backward(x, step, offset, delta)
        ctx.codes = codes
        ctx.gradient_scale = gradient_scale
        kernel = kernels.find("learned_step", x)
        value = None if kernel is None else kernel(x, step, *codes, offset)
        if value is None:
            value = torch.div(_centred(x, offset), step).clamp_(*codes).round_().mul_(step)
            value = value if offset is None else value.add_(offset)
        return cast(Tensor, value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, step, offset, delta = ctx.saved_tensors
        wanted, codes = ctx.needs_input_grad[:3], ctx.codes
        grad = in_layout_of(grads[0], x)
        kernel = kernels.find_backward("learned_step_backward", x, grad)
        found = None if kernel is None else kernel(x, grad, step, *codes, offset, delta, wanted)
        for_x, for_step, for_offset = (
            _gradients(x, grad, step, offset, delta, codes, wanted) if found is None else found
        )
        for_step = None if for_step is None else for_step * ctx.gradient_scale
        return for_x, for_step, for_offset, None, None, None


def _centred(x: Tensor, offset: Tensor | None) -> Tensor:
    return x if offset is None else x - offset


def _gradients(
    x: Tensor,
    grad: Tensor,
    step: Tensor,
    offset: Tensor | None,
    delta: Tensor | None,
    codes: tuple[int, int],
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, step and offset, those that are wanted."""
    low, high = (float(code) for code in codes)
    scaled = torch.div(_centred(x, offset), step)
    clamped = scaled.clamp(*codes)
    for_x = for_step = for_offset = None
    if wanted[1]:
        # round(v) - v inside; at and beyond an end the end itself, where the last term vanishes.
        inside = torch.ops.aten.hardtanh_backward(scaled, scaled, low, high)
        for_step = (grad * clamped.round().sub_(inside)).sum_to_size(step.shape)
    if wanted[0] or wanted[2]:
        passed = grad
        if delta is not None:
            # x and its level, in an interval of length 2, as the paper normalizes them.
            lean = (clamped - clamped.round()) * (2.0 / (high - low))
            passed = grad * (1.0 + delta * grad.sign() * lean)
        for_x = torch.ops.aten.hardtanh_backward(passed, scaled, low, high)
    if wanted[2] and offset is not None and for_x is not None:
        for_offset = (grad - for_x).sum_to_size(offset.shape)
    return for_x, for_step, for_offset


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
    real = x.to(compute_dtype(x))
    numbers = [None if n is None else like(n, real) for n in (step, offset, delta)]
    value = _LearnedStep.apply(real, *numbers, lsq_codes(n_bits, signed), gradient_scale)
    return cast_back(cast(Tensor, value), x.dtype)
