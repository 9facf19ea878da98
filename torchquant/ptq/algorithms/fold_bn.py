"""Batch norms folded for good."""

from __future__ import annotations

from typing import Any

from torch import nn

from torchquant.ptq.folding import fold_for_good
from torchquant.ptq.stage import PTQ, ModelStage
from torchquant.qmodule import QWrapper
from torchquant.utils import qmodules


@PTQ.register("fold_bn")
class FoldBN(ModelStage):
    """Fold every batch norm into the layer before it, where the plan folds it, and freeze it."""

    changes = "structure"
    when = "first; layer stages do it by themselves"

    def run(self, model: nn.Module, batches: list[Any]) -> str:
        done = fold_for_good({path: module for path, module in qmodules(model) if isinstance(module, QWrapper)})
        return f"{len(done)} batch norms"
