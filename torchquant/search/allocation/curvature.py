"""Estimate degradation by the curvature of the loss: Hessian trace (HAWQ-V2), diagonal of the empirical Fisher."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from torchquant._arguments import checked, one_number
from torchquant._shown import shown
from torchquant.errors import ConfigError
from torchquant.graph.recording import call_with
from torchquant.qmodule import QModuleState
from torchquant.search.allocation.calibrated_supernet import (
    CalibratedSupernet,
    Loss,
    batch_size,
    samples_of,
    scalar_loss,
)
from torchquant.search.cost import SearchPoint
from torchquant.search.learning.mixture import MixtureQuantizer
from torchquant.utils import qmodule_state

STORED = ("weight", "bias")
"""Slots that are the same for every sample."""


@checked
def hessian_trace(
    loss_fn: Callable[[], Tensor],
    parameter: Tensor,
    draws: int = 50,
    tolerance: float = 1e-3,
    patience: int = 5,
    generator: torch.Generator | None = None,
) -> float:
    """Estimate the trace of the Hessian of `loss_fn()` for one tensor by Hutchinson: mean of `z^T H z`, z in {-1, 1}.

    HAWQ-V2 (Dong et al. 2020, arXiv:1911.03852). `parameter`: any shape, requires a gradient, and `loss_fn` computes
    the scalar loss from it; it is called once. At most `draws` vectors are drawn, fewer when the mean has changed by
    less than `tolerance` of itself in `patience` draws in a row. Exact for a diagonal Hessian; 0 where the loss is
    linear.
    `generator`: on the CPU; without one, a new one with seed 0. Raises ConfigError.

    >>> w = torch.ones(3, requires_grad=True)
    >>> hessian_trace(lambda: (torch.tensor([1.0, 2.0, 3.0]) * w.square()).sum() / 2, w)
    6.0
    """
    if draws < 1 or patience < 1 or tolerance < 0.0:
        raise ConfigError(
            f"hessian_trace needs draws >= 1, patience >= 1, tolerance >= 0; got {draws}, {patience}, {tolerance}"
        )
    if not parameter.requires_grad:
        raise ConfigError(
            f"hessian_trace needs a parameter that requires a gradient, got {shown(parameter)} without one"
        )
    generator = generator or torch.Generator().manual_seed(0)
    (gradient,) = torch.autograd.grad(
        one_number(loss_fn(), "the loss"), parameter, create_graph=True, allow_unused=True
    )
    if gradient is None or not gradient.requires_grad:
        return 0.0
    total, mean, steady = 0.0, 0.0, 0
    for drawn in range(1, draws + 1):
        signs = torch.randint(0, 2, tuple(parameter.shape), generator=generator).mul_(2).sub_(1).to(gradient)
        (product,) = torch.autograd.grad(gradient, parameter, signs, retain_graph=True, allow_unused=True)
        if product is None:
            return 0.0
        total += float((product * signs).to(torch.float64).sum())
        before, mean = mean, total / drawn
        steady = steady + 1 if drawn > 1 and abs(mean - before) <= tolerance * abs(mean) else 0
        if steady == patience:
            break
    return mean


class _ErrorProbes:
    """Add zeros to the outputs of mixtures that quantize nothing; the gradient of a zero is that of an error there.

    A weight has one tensor of zeros however often it is used; an activation has one per call. `seen`: the values and
    the zeros, by mixture.
    """

    def __init__(self, mixtures: Sequence[MixtureQuantizer], stored: bool) -> None:
        self.mixtures, self.stored = mixtures, stored
        self.seen: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def _tap(self, mixture: nn.Module, args: Any, output: Tensor) -> Tensor:
        known = self.seen.setdefault(id(mixture), [])
        if not (self.stored and known):
            known.append((output.detach(), torch.zeros_like(output).requires_grad_()))
        return output + known[-1][1]

    @contextmanager
    def placed(self) -> Iterator[None]:
        handles = [mixture.register_forward_hook(self._tap) for mixture in self.mixtures]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _squared_errors(
    probe: CalibratedSupernet, point: SearchPoint, mixture: MixtureQuantizer, x: Tensor
) -> Iterator[Tensor]:
    """Yield `(Q(x) - x)**2` for each option of a search point."""
    for option in range(len(probe.options(point))):
        with torch.no_grad(), probe.using(point, option):
            yield (mixture(x) - x).square()


def hessian_degradations(
    probe: CalibratedSupernet, point: SearchPoint, loss: Loss, draws: int, seed: int
) -> list[float]:
    """Compute `Tr(H) / n * ||Q(W) - W||**2` of each option, summed over the weights of the search point.

    The curvature is that of the float model's loss on the batches, for the weight as its quantizer sees it.
    """
    degradations = [0.0] * len(probe.options(point))
    for index, mixture in enumerate(probe.mixtures[point]):
        probes = _ErrorProbes([mixture], stored=True)
        generator = torch.Generator().manual_seed(seed + index)
        trace = 0.0
        with probes.placed(), _float_but(probe, point), _twice_differentiable():
            with torch.no_grad():
                call_with(probe.model, probe.batches[0][0], "a batch")
            if id(mixture) not in probes.seen:
                continue
            weight, zeros = probes.seen[id(mixture)][0]
            for batch in probe.batches:

                def batch_loss(batch: Any = batch) -> Tensor:
                    return scalar_loss(loss, call_with(probe.model, batch[0], "a batch"), batch[1])

                trace += batch_size(batch) * hessian_trace(batch_loss, zeros, draws, generator=generator)
        trace /= sum(map(batch_size, probe.batches))
        if trace < 0.0:
            warnings.warn(
                f"the Hessian of '{point[0]}' has the trace {trace:.3g}, below 0: the model is not at a minimum, "
                "so the degradation counts as 0. Use more batches or draws, or the method 'mse'",
                stacklevel=4,
            )
        for option, squared in enumerate(_squared_errors(probe, point, mixture, weight)):
            degradations[option] += max(trace, 0.0) / weight.numel() * float(squared.to(torch.float64).sum())
    return degradations


@contextmanager
def _float_but(probe: CalibratedSupernet, point: SearchPoint) -> Iterator[None]:
    """Quantize nothing; the weight of the search point passes through its mixture unchanged."""
    with qmodule_state(probe.model, QModuleState.BYPASSED), ExitStack() as stack:
        for module in probe.owners(point):
            stack.enter_context(qmodule_state(module, QModuleState.QUANT_EVAL_WEIGHT_ONLY))
        yield


@contextmanager
def _twice_differentiable() -> Iterator[None]:
    """Switch off the fused kernels that have no second derivative."""
    flags = torch.backends.cudnn.flags(enabled=False)
    with sdpa_kernel(SDPBackend.MATH), flags, torch.enable_grad():
        yield


def fisher_degradations(
    probe: CalibratedSupernet, points: Sequence[SearchPoint], loss: Loss
) -> dict[SearchPoint, list[float]]:
    """Compute `1/2 sum g**2 (Q(x) - x)**2` of each option; g**2: mean squared gradient of the loss of one sample.

    One backward pass per sample serves all points; the rest of the plan quantizes with straight-through gradients. For
    weights, the sum of g**2 over the samples is kept, one tensor of the weight's shape.
    """
    degradations = {point: [0.0] * len(probe.options(point)) for point in points}
    stored = [point for point in points if point[1] in STORED]
    passing = [point for point in points if point[1] not in STORED]
    weights = _ErrorProbes([m for point in stored for m in probe.mixtures[point]], stored=True)
    values = _ErrorProbes([m for point in passing for m in probe.mixtures[point]], stored=False)
    squares: dict[int, Tensor] = {}
    n_samples = sum(map(batch_size, probe.batches))
    for sample in (sample for batch in probe.batches for sample in samples_of(batch)):
        values.seen.clear()
        with torch.enable_grad(), weights.placed(), values.placed():
            found = scalar_loss(loss, call_with(probe.model, sample[0], "a batch"), sample[1])
            zeros = [zero for probes in (weights, values) for seen in probes.seen.values() for _, zero in seen]
            gradients = torch.autograd.grad(found, zeros, allow_unused=True)
        square = {id(zero): g.square() for zero, g in zip(zeros, gradients, strict=True) if g is not None}
        for key, seen in weights.seen.items():
            if id(seen[0][1]) in square:
                squares[key] = squares.get(key, 0.0) + square[id(seen[0][1])]
        for point in passing:
            _add_degradations(degradations[point], probe, point, values, square, 2.0 * n_samples)
    kept = {id(weights.seen[key][0][1]): value for key, value in squares.items()}
    for point in stored:
        _add_degradations(degradations[point], probe, point, weights, kept, 2.0 * n_samples)
    return degradations


def _add_degradations(
    degradations: list[float],
    probe: CalibratedSupernet,
    point: SearchPoint,
    probes: _ErrorProbes,
    squares: dict[int, Tensor],
    divisor: float,
) -> None:
    for mixture in probe.mixtures[point]:
        for x, zeros in probes.seen.get(id(mixture), []):
            if id(zeros) not in squares:
                continue
            weight = squares[id(zeros)].to(torch.float64)
            for option, squared in enumerate(_squared_errors(probe, point, mixture, x)):
                degradations[option] += float((weight * squared.to(torch.float64)).sum()) / divisor
