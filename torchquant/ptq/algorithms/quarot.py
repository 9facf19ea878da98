"""Rotations of the residual stream and of the values of attention, folded into weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchquant._arguments import Count
from torchquant.ptq.algorithms.fold_norm import FoldNorm
from torchquant.ptq.algorithms.rotate import Rotate
from torchquant.ptq.inputs import InputWork
from torchquant.ptq.report import StepReport
from torchquant.ptq.rotating import MeasuredRotation, calls_and_paddings, measured, start_of
from torchquant.ptq.rotation_sets import RotationSet, rotation_sets
from torchquant.ptq.stage import PTQ, ModelStage
from torchquant.ptq.structure import example_for, restart_ranges, same_function, untied
from torchquant.utils import weight_slots


@PTQ.register("quarot")
class QuaRot(ModelStage):
    """Rotate what layers hand on to each other by Hadamard matrices with random signs, folded into their weights.

    That is the residual stream of a pre-norm transformer, with its embeddings and its head, and the values of each
    attention head; norms are folded first, and a head that shares the table of the embedding gets its own. Which layers
    belong together is found by following one forward. Where layer norms take off the mean, rotations are random ones
    that keep it. `online`: the inputs of other layers, such as those behind a gated product, are rotated at run time,
    as by `rotate`. `seeds`: choices to compare by the output error of the layers that read the channels, where batches
    are given; channels stay as they are where none lowers it. Ranges of activations must be calibrated afterwards.
    """

    changes = "structure"
    source = "Ashkboos et al. 2024, arXiv:2404.00456"
    when = "first, pre-norm transformers whose activations have outliers, at 8 bits and less"
    cost = "2 forward passes, rows K n for each seed"

    def __init__(self, seeds: Count = 1, online: bool = True, seed: int = 0) -> None:
        self.seeds, self.online, self.seed = seeds, online, seed

    def run(self, model: nn.Module, batches: list[Any]) -> str:
        example = example_for(model, batches)
        given = untied(model, lambda: [t for one in rotation_sets(model, example, False)[0] for t in one.tensors()])
        notes = [f"{', '.join(given)} has a table of its own now"] if given else []
        notes.append(f"folded {FoldNorm().run(model, batches)}")
        sets, left = rotation_sets(model, example)
        generator = torch.Generator().manual_seed(self.seed)
        chosen: list[tuple[RotationSet, Tensor]] = []
        for judge in measured(model, sets, batches):
            best, error = self._chosen(judge, generator)
            notes.append(f"{'left as it is' if best is None else 'rotated'}{error}: {judge.found.name}")
            chosen += [] if best is None else [(judge.found, best)]
        ends = [end for one, _ in chosen for end in one.ends]
        with same_function(model, example, ends, type(self).__name__.lower()):
            for one, rotation in chosen:
                one.rotate(rotation)
        restart_ranges(model, ends)
        seen = {end.slot.path for one in sets for end in one.readers if end.slot is not None}
        notes += self._online(model, batches, seen) if self.online else []
        reasons = {why: [name for name, other in left if other == why] for _, why in left}
        return "; ".join([*notes, *(f"not rotated, because {why}: {', '.join(each)}" for why, each in reasons.items())])

    def _chosen(self, one: MeasuredRotation, generator: torch.Generator) -> tuple[Tensor | None, str]:
        """Return the best rotation, None where no rotation is, and its error in words."""
        starts = [start_of(one.found.size, one.found.keeps_mean, generator) for _ in range(self.seeds)]
        if not one.readers:
            return starts[0], ""
        best = self.improved(one, min(starts, key=one.error))
        before, after = one.error(None), one.error(best)
        return (best if after < before else None), f" (error {before:.3g}, {after:.3g} rotated)"

    def improved(self, one: MeasuredRotation, start: Tensor) -> Tensor:
        """Return a rotation that is at least as good as the best of the start."""
        return start

    def _online(self, model: nn.Module, batches: list[Any], seen: set[str]) -> list[str]:
        """Put rotations before the layers whose inputs no folded rotation is for."""
        steps: list[StepReport] = []
        slots = {s.path: s for s in weight_slots(model) if s.quantizer is not None and s.path not in seen}
        work = InputWork(model, Rotate(), "quarot", "best", steps.append)
        work.run_all(slots, *calls_and_paddings(model, batches), lambda _: torch.Generator().manual_seed(self.seed))
        done = [step.path for step in steps if not step.note.startswith("left as it is")]
        return [f"rotated at run time: {', '.join(done)}"] if done else []
