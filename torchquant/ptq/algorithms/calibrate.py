"""Ranges measured on the batches."""

from __future__ import annotations

from typing import Any

from torch import nn

from torchquant._arguments import Count
from torchquant.ptq.stage import PTQ, ModelStage
from torchquant.training.calibration import calibrate


@PTQ.register("calibrate")
class Calibrate(ModelStage):
    """Show the batches to every observer; weights that are rounded already keep their grids."""

    changes = "ranges"
    allows_transforms = True
    needs_data = True
    when = "before roundings, and again behind them"
    cost = "a forward pass"

    def __init__(self, batches: Count | None = None) -> None:
        self.n_batches = batches

    def run(self, model: nn.Module, batches: list[Any]) -> str:
        n = calibrate(model, batches, self.n_batches, with_targets=False, show_progress=False)
        return f"{n} batches"
