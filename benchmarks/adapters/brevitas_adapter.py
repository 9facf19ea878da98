"""Brevitas: learned activation scales, weight scales from the largest magnitude of each channel."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.adapters.base import Adapter
from torchquant.errors import require
from torchquant.qmodule import QModuleState
from torchquant.quantizers import Quantizer
from torchquant.utils import qmodule_state


class _BrevitasActs(Quantizer):
    """A QuantIdentity whose scale starts at the first batch's largest magnitude, and is learned from then on.

    Brevitas collects a percentile over its first 300 steps instead; a benchmark measures the steps after these.
    """

    n_bits = 8

    def __init__(self) -> None:
        super().__init__()
        int8 = require("brevitas.quant", "bench").Int8ActPerTensorFloat
        absmax = require("brevitas.inject.enum", "bench").StatsOp.MAX
        identity = require("brevitas.nn", "bench").QuantIdentity
        self.identity = identity(act_quant=int8.let(scaling_stats_op=absmax), collect_stats_steps=1)

    def quantize(self, x: Tensor) -> Tensor:
        return self.identity(x)


class _BrevitasWeight(Quantizer):
    """The weight quantizer of a QuantConv2d or QuantLinear that shares the weight, as Brevitas needs."""

    n_bits = 8
    axis = 0
    holder: Any

    def allocate_for(self, weight: Tensor) -> None:
        qnn = require("brevitas.nn", "bench")
        per_channel = require("brevitas.quant", "bench").Int8WeightPerChannelFloat
        kind = qnn.QuantLinear if weight.ndim == 2 else qnn.QuantConv2d
        rows, columns, *kernel = weight.shape
        sizes = [columns, rows, *([tuple(kernel)] if kernel else [])]
        self.holder = kind(*sizes, bias=False, weight_quant=per_channel)
        self.holder.weight = weight

    def quantize(self, x: Tensor) -> Tensor:
        return self.holder.weight_quant(x).value


class BrevitasAdapter(Adapter):
    name = "brevitas"
    package = "brevitas"

    def weight_quantizer(self, layer: nn.Module) -> Quantizer:
        return _BrevitasWeight()

    def acts_quantizer(self, layer: nn.Module) -> Quantizer:
        return _BrevitasActs()

    @torch.no_grad()
    def calibrate(self, model: nn.Module, batches: Iterable[Tensor]) -> None:
        """Calibrate Brevitas, which collects inside its activation quantizers; their outputs are discarded."""
        collecting = require("brevitas.graph.calibrate", "bench").calibration_mode(model)
        with qmodule_state(model, QModuleState.QUANT_EVAL_ACT_ONLY), collecting:
            for batch in batches:
                model(batch)
