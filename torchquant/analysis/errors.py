"""Measure where quantization costs accuracy: the error of every QModule, in dB and as samples to plot."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torchquant._arguments import checked
from torchquant._modes import in_mode
from torchquant._units import decibels
from torchquant.errors import ConfigError
from torchquant.graph.called import tensors_in
from torchquant.graph.recording import call_with
from torchquant.graph.traced import graphs_running
from torchquant.qmodule import QModule, QModuleState
from torchquant.quantizers import Quantizer
from torchquant.utils import qmodule_state, qmodules


@dataclass(frozen=True)
class SiteError:
    """The error of one quantizer: its signal to quantization noise ratio (SQNR), and samples of the tensors.

    `sqnr_db` is over all elements; `real` and `quantized` are the same random positions of the float
    and the quantized tensor, (K,) float32 each, for histograms.
    """

    scheme: str
    n_bits: int | None
    sqnr_db: float
    real: Tensor = field(repr=False)
    quantized: Tensor = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return scheme, bits and SQNR for JSON, which has no infinity: without any error the SQNR is None."""
        sqnr_db = self.sqnr_db if math.isfinite(self.sqnr_db) else None
        return {"scheme": self.scheme, "n_bits": self.n_bits, "sqnr_db": sqnr_db}


@dataclass(frozen=True)
class LayerError:
    """The errors of one QModule; None for a slot without a quantizer.

    `weights`: name -> error of every quantized weight; an LSTM, for example, has several. `weight`: the error with the
    lowest SQNR.
    """

    path: str
    weight: SiteError | None
    output: SiteError | None
    weights: Mapping[str, SiteError] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return path, weight and output, and all weights if there are several, for JSON."""
        sites = {"weight": self.weight, "output": self.output}
        found = {"path": self.path} | {name: None if site is None else site.to_dict() for name, site in sites.items()}
        several = {name: error.to_dict() for name, error in self.weights.items()} if len(self.weights) > 1 else {}
        return found | ({"weights": several} if several else {})


@checked
def sqnr(x: Tensor, x_hat: Tensor) -> float:
    """Compute the SQNR in dB, `10 log10(sum x**2 / sum (x - x_hat)**2)`, in float64.

    It is inf if both are equal, -inf for noise on a tensor of zeros. Raises ConfigError for different shapes or no
    element.

    >>> round(sqnr(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.5])), 6)
    20.0
    """
    if x.shape != x_hat.shape or x.numel() == 0:
        raise ConfigError(
            f"sqnr needs two tensors of one shape with at least one element, got {tuple(x.shape)} and "
            f"{tuple(x_hat.shape)}"
        )
    real = x.detach().to(torch.float64)
    noise = float((real - x_hat.detach().to(torch.float64)).square().sum())
    return decibels(float(real.square().sum()), noise)


@checked
@torch.no_grad()
def layer_errors(model: nn.Module, x: Tensor, n_samples: int = 20_000) -> list[LayerError]:
    """Measure the quantization error of every QModule, in the order of `named_modules`.

    The weight error compares the real weight, with any folded batch norm, to its quantized value. The output error
    compares the outputs of the whole model for `x` in BYPASSED and in QUANT_EVAL, so it contains the errors of all
    earlier layers. At most `n_samples` elements per tensor are sampled, the same ones in every call. For a module that
    is called several times the first call counts; a module that `x` does not reach has no output error.

    The model runs in eval mode; modes and states are restored, and no hook stays. While it runs, the float
    outputs of all quantized sites are in memory. Raises UnobservedRangeError before calibration.
    """
    if n_samples < 1:
        raise ConfigError(f"n_samples must be at least 1, got {n_samples}")
    with in_mode(False, model):
        real: dict[str, Tensor] = {}
        with qmodule_state(model, QModuleState.BYPASSED), graphs_running(), _on_output(model, real.setdefault):
            call_with(model, (x,), "x")
        outputs: dict[str, SiteError] = {}
        modules = dict(qmodules(model))

        def compare(path: str, quantized: Tensor) -> None:
            if path in real:
                quantizer = modules[path].quantizers()["output"]
                outputs[path] = _site_error(quantizer, real.pop(path), quantized, n_samples)

        with qmodule_state(model, QModuleState.QUANT_EVAL), _on_output(model, compare):
            call_with(model, (x,), "x")
    found = []
    for path, module in modules.items():
        weights = _weight_errors(module, n_samples)
        worst = min(weights.values(), key=lambda error: error.sqnr_db, default=None)
        found.append(LayerError(path or "(root)", worst, outputs.get(path), weights))
    return found


@contextmanager
def _on_output(model: nn.Module, receive: Callable[[str, Tensor], object]) -> Iterator[None]:
    """Call `receive(path, output)` after each forward of a QModule with an output quantizer, which sees `output`."""

    def hook(path: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def call(module: nn.Module, args: Any, output: Any) -> None:
            receive(path, next(tensors_in(output)))

        return call

    handles = [
        module.register_forward_hook(hook(path)) for path, module in qmodules(model) if "output" in module.quantizers()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _weight_errors(module: QModule, n_samples: int) -> dict[str, SiteError]:
    found = {}
    for slot in module.weight_slots():
        if (quantizer := slot.quantizer) is not None:
            real = slot.seen()
            found[slot.name] = _site_error(quantizer, real, quantizer(real), n_samples)
    return found


def _site_error(quantizer: Quantizer, real: Tensor, quantized: Tensor, n_samples: int) -> SiteError:
    positions: slice | Tensor = slice(None)
    if real.numel() > n_samples:
        generator = torch.Generator().manual_seed(0)
        positions = torch.randint(real.numel(), (n_samples,), generator=generator).to(real.device)
    samples = [t.flatten()[positions].to("cpu", torch.float32, copy=True) for t in (real, quantized)]
    n_bits = getattr(quantizer, "n_bits", None)
    return SiteError(type(quantizer).__name__, n_bits, sqnr(real, quantized), *samples)
