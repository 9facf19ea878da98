"""The contract of an adapter: one small class per library.

Write `weight_quantizer` and `acts_quantizer`, and the library is in every table: they are placed at the
same sites of the same fused models for every library, so that only the quantizers differ. Override
`quantize_model` to measure a library's own conversion instead.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor, nn

from benchmarks.models import fuse
from torchquant.qmodule import QModuleState
from torchquant.quantizers import Quantizer
from torchquant.utils import qmodule_state, set_qmodule_state

AFFINE = "affine, EMA range, clip"
WEIGHT = "weight, per channel"
ESB = "ESB(4,1)"
TERNARY = "ternary"
QFMT = "Q-format"
CASES = (AFFINE, WEIGHT, ESB, TERNARY, QFMT)


class ObserveAndQuantize(nn.Module):
    """One site of a training step: the quantizer observes x, then quantizes it."""

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        self.quantizer = quantizer

    def forward(self, x: Tensor) -> Tensor:
        quantized = self.quantizer.observe_and_quantize(x)
        if quantized is None:
            self.quantizer.pre_observe(x)
            quantized = self.quantizer.quantize(x)
        self.quantizer.post_observe(quantized)
        return quantized


class Adapter(ABC):
    """A library that quantizes. 8 bits everywhere: per-channel symmetric weights, per-tensor activations."""

    name: ClassVar[str]
    package: ClassVar[str] = "torch"
    """Package that must be importable."""

    @property
    def missing(self) -> str | None:
        """Why the library cannot be measured here, and what to do; None if it can."""
        if importlib.util.find_spec(self.package) is not None:
            return None
        return f"{self.package} is not installed; run: pip install 'torchquant[bench]'"

    @abstractmethod
    def weight_quantizer(self, layer: nn.Module) -> Quantizer:
        """Make the quantizer for the weight of `layer`, a convolution or Linear: one scale per channel, axis 0."""

    @abstractmethod
    def acts_quantizer(self, layer: nn.Module) -> Quantizer:
        """Make the quantizer for an activation: one scale, range tracked over batches or learned, gradient clipped."""

    def fake_quant(self, case: str, layer: nn.Module) -> nn.Module | None:
        """Make a differentiable module x -> quantized x for one of CASES; None if the library has no such format.

        In the case WEIGHT, x is `layer.weight`. Parameters of the module get their gradients too.
        """
        if case == WEIGHT:
            quantizer = self.weight_quantizer(layer)
            quantizer.allocate_for(layer.weight)
            return ObserveAndQuantize(quantizer)
        return ObserveAndQuantize(self.acts_quantizer(layer)) if case == AFFINE else None

    def quantize_model(self, float_model: nn.Module) -> nn.Module:
        """Make a trainable copy with every layer quantized; `float_model` is not changed."""
        model = fuse(float_model, self.weight_quantizer, self.acts_quantizer)
        set_qmodule_state(model, QModuleState.QUANT_AWARE_TRAIN)
        return model

    @torch.no_grad()
    def calibrate(self, model: nn.Module, batches: Iterable[Tensor]) -> None:
        """Let a model of `quantize_model` observe the batches, which sets its ranges and quantizes nothing."""
        with qmodule_state(model, QModuleState.CALIBRATION):
            for batch in batches:
                model(batch)
