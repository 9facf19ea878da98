"""Set the delta of EWGS from the curvature of the loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.backends.cudnn import flags as cudnn_flags
from torch.nn.attention import SDPBackend, sdpa_kernel

from torchquant._arguments import checked, one_number
from torchquant.errors import ConfigError
from torchquant.quantizers import EWGSQuantizer, GridQuantizer
from torchquant.quantizers_functional.gradients import EWGS


@checked
def adapt_ewgs(
    model: nn.Module, loss: Callable[[], Tensor], samples: int = 1, generator: torch.Generator | None = None
) -> dict[str, float]:
    """Set delta of every EWGS quantizer to `max(0, (Tr(H) / N) / (3 std(g)))`; return path -> delta.

    `loss()` runs the model on a batch and returns the loss; it is called once. g is its gradient for the N quantized
    values of a site, Tr(H) the trace of its Hessian there, estimated with `samples` vectors of random signs
    (Hutchinson). Call this function every one to ten epochs. Lee et al. 2021, arXiv:2104.00903, eq. 9-10. Raises
    ConfigError if there is no such quantizer.

    >>> from torchquant import QModuleState, QWrapper, make_quantizer, set_qmodule_state
    >>> model = QWrapper(nn.Linear(4, 4), make_quantizer("ewgs:2"), None)
    >>> set_qmodule_state(model, QModuleState.QUANT_AWARE_TRAIN)
    >>> list(adapt_ewgs(model, lambda: model(torch.ones(2, 4)).square().mean()))
    ['weight_quantizer']
    """
    found = {path: m for path, m in model.named_modules() if isinstance(m, GridQuantizer) and _has_delta(m)}
    if not found:
        raise ConfigError("the model has no quantizer with EWGS; give one a spec such as ewgs:2 or affine:4@ewgs")
    outputs: dict[str, Tensor] = {}

    def record(path: str, quantizer: GridQuantizer) -> Callable[..., Tensor]:
        plain = quantizer.quantize

        def quantize(*args: Tensor, **options: object) -> Tensor:
            outputs[path] = plain(*args, **options)  # type: ignore[arg-type]
            return outputs[path]

        return quantize

    try:
        for path, quantizer in found.items():
            quantizer.quantize = record(path, quantizer)  # type: ignore[method-assign]
        with _twice_differentiable(model):
            value = one_number(loss(), "the loss")
    finally:
        for quantizer in found.values():
            del quantizer.quantize
    used = {path: y for path, y in outputs.items() if y.requires_grad}
    grads = torch.autograd.grad(value, list(used.values()), create_graph=True, allow_unused=True)
    deltas = {}
    pairs = [(path, y, g) for (path, y), g in zip(used.items(), grads, strict=True) if g is not None]
    traces = [torch.zeros((), device=y.device, dtype=torch.float64) for _, y, _ in pairs]
    for _ in range(samples):
        signs = [torch.randint(0, 2, y.shape, generator=generator, device=y.device) * 2 - 1 for _, y, _ in pairs]
        along = sum((g * v).sum() for (_, _, g), v in zip(pairs, signs, strict=True))
        curved: list[Tensor | None] = [None] * len(pairs)
        if isinstance(along, Tensor) and along.requires_grad:
            ys = [y for _, y, _ in pairs]
            curved = list(torch.autograd.grad(along, ys, retain_graph=True, allow_unused=True))
        for i, (hv, v) in enumerate(zip(curved, signs, strict=True)):
            traces[i] += 0.0 if hv is None else (hv.detach() * v).sum().double() / samples
    for (path, y, g), trace in zip(pairs, traces, strict=True):
        spread = 3.0 * float(g.detach().double().std()) if g.numel() > 1 else 0.0
        deltas[path] = max(0.0, float(trace) / y.numel() / spread) if spread > 0.0 else 0.0
        _set_delta(found[path], deltas[path])
    return deltas


@contextmanager
def _twice_differentiable(model: nn.Module) -> Iterator[None]:
    """Let attention and recurrent layers run kernels with second derivatives, which the fused kernels do not have."""
    is_recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    with sdpa_kernel(SDPBackend.MATH), cudnn_flags(enabled=False) if is_recurrent else nullcontext():
        yield


def _has_delta(quantizer: GridQuantizer) -> bool:
    return isinstance(quantizer, EWGSQuantizer) or isinstance(quantizer.gradient, EWGS)


def _set_delta(quantizer: GridQuantizer, delta: float) -> None:
    if isinstance(quantizer, EWGSQuantizer):
        quantizer.set_delta(delta)
    elif isinstance(quantizer.gradient, EWGS):
        quantizer.gradient = dataclasses.replace(quantizer.gradient, delta=delta)
