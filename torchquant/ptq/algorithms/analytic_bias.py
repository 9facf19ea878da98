"""Bias correction without data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torchquant.graph.recording import call_with, undisturbed
from torchquant.ptq.moments import MomentsRun
from torchquant.ptq.stage import PTQ, ModelStage
from torchquant.ptq.structure import example_for, fold_all
from torchquant.ptq.work import add_to_output, bias_of
from torchquant.qmodule import QModuleState
from torchquant.qmodule.weight_slots import LayerSlot
from torchquant.utils import qmodule_state, weight_slots


@PTQ.register("analytic_bias")
class AnalyticBiasCorrection(ModelStage):
    """Add to each bias what rounding to nearest takes from the mean of the output, by the batch norms before it.

    The mean of what a layer reads is that of a normal value behind its activation, carried on through sums, pools and
    layers without a batch norm. For weights that are rounded to nearest when the model quantizes: those that another
    stage has rounded are left, because their real weights are gone.
    """

    changes = "bias"
    source = "Nagel et al. 2019, arXiv:1906.04721, section 4.2 and appendix C"
    when = "instead of bias_correction, where there is no data"
    cost = "a forward pass"

    def run(self, model: nn.Module, batches: list[Any]) -> str:
        fold_all(model)
        slots = {slot.weight.data_ptr(): slot for slot in weight_slots(model) if isinstance(slot, LayerSlot)}
        left = {slot.label: "nothing is known of its input" for slot in slots.values() if slot.quantizer is not None}
        changes: list[tuple[LayerSlot, Tensor]] = []

        def note(weight: Tensor, product: Callable[[Tensor, Tensor], Tensor], mean: Tensor) -> None:
            slot = slots.get(weight.data_ptr())
            if slot is None or slot.quantizer is None or slot.label not in left:
                return
            if slot.quantizer.is_pinned:
                left[slot.label] = "it is rounded already"
            elif bias_of(slot) is None:
                left[slot.label] = "it has no bias"
            else:
                changes.append((slot, _lost(slot, product, mean)))
                del left[slot.label]

        run = MomentsRun(model, at_product=note)
        with torch.no_grad(), qmodule_state(model, QModuleState.BYPASSED), undisturbed(model, False), run:
            call_with(model, run.begin(example_for(model, batches)))
        for slot, change in changes:
            held = bias_of(slot)
            assert held is not None
            add_to_output(held, change)
        return "; ".join([f"{len(changes)} biases", *(f"{label} is left: {why}" for label, why in left.items())])


def _lost(slot: LayerSlot, product: Callable[[Tensor, Tensor], Tensor], mean: Tensor) -> Tensor:
    """Compute the mean that each output loses by rounding the weight to nearest, (C,)."""
    if slot.quantizer is not None and not slot.quantizer.is_ready:
        slot.module.observe_weight()
    seen = slot.seen().detach()
    assert slot.quantizer is not None
    lost = product(mean, slot.stored_layout(seen - slot.quantizer(seen)))
    is_conv = seen.ndim > 2
    return lost.movedim(lost.ndim - seen.ndim + 1 if is_conv else -1, 0).flatten(1).mean(1)
