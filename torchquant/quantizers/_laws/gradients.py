"""Laws of the backward pass."""

from __future__ import annotations

import copy

import torch

from torchquant.quantizers._laws.case import Case, require


def gradient(case: Case) -> None:
    """A finite gradient reaches x and every learned parameter."""
    quantizer = copy.deepcopy(case.observed)
    x = case.sample.clone().requires_grad_()
    y = quantizer(x)
    require(y.requires_grad, "the output does not require grad although x does")
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)))
    require(x.grad is not None and bool(torch.isfinite(x.grad).all()), "the gradient of x is missing or not finite")
    reached = float((x.grad != 0).float().mean()) if x.grad is not None else 0.0
    require(reached > 0.5, f"only {reached:.0%} of in-range elements got a gradient")
    for name, parameter in quantizer.named_parameters():
        found = parameter.grad is not None and bool(torch.isfinite(parameter.grad).all())
        require(found, f"parameter {name} got no finite gradient")


def gradient_size(case: Case) -> None:
    """On the whole the gradient of x is the slope of the staircase, neither twice nor minus that."""
    quantizer = copy.deepcopy(case.observed)
    x, middle = case.sample, torch.zeros_like(case.sample)
    if quantizer.is_idempotent:
        reach = torch.full_like(x, 40.0 * float(x.abs().max()))
        low, high = (quantizer(end).detach() for end in (-reach, reach))
        middle = (low + high) / 2
        x = low + (high - low) * torch.rand(x.shape, generator=torch.Generator().manual_seed(1))
    x = x.detach().clone().requires_grad_()
    y = quantizer(x)
    y.sum().backward()
    require(x.grad is not None, "x got no gradient")
    assert x.grad is not None
    around = (x - middle).detach()
    slope = float(((y.detach() - middle) * around).sum() / around.square().sum())
    ratio = float(x.grad.mean()) / slope
    # One step rises by 1.5 of what straight-through says, more of them come close to it.
    require(0.5 < ratio < 1.8, f"the gradient of x is {ratio:.2f} of the slope of its quantized value")
