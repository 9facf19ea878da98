"""Batch norms folded for good."""

from __future__ import annotations

from typing import Any

from torch import nn

from torchquant.ptq.folding import fold_for_good
from torchquant.ptq.stage import PTQ, ModelStage
from torchquant.qmodule.weight_slots import LayerSlot
from torchquant.utils import weight_slots


@PTQ.register("fold_bn")
class FoldBN(ModelStage):
    """Fold every batch norm into the layer before it, where the plan folds it, and freeze it."""

    changes = "structure"
    allows_transforms = True
    when = "first; layer stages do it by themselves"

    def run(self, model: nn.Module, batches: list[Any]) -> str:
        done = fold_for_good({slot.path: slot.module for slot in weight_slots(model) if isinstance(slot, LayerSlot)})
        return f"{len(done)} batch norms"
