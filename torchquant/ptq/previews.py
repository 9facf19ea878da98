"""Preview a run: its steps, forward passes and memory, without any of them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from torchquant._arguments import checked
from torchquant._tables import ShownAsTables, text_table
from torchquant.ptq.blocks import find_blocks
from torchquant.ptq.engine import check_order
from torchquant.ptq.functional.factors import WIDEST_FLOAT64
from torchquant.ptq.stage import FLOAT_NEEDS, BiasChange, LayerStage, ModelStage, Stage, make_stage
from torchquant.ptq.units import find_units
from torchquant.ptq.work import bias_of
from torchquant.qmodule import WeightSlot


@dataclass(frozen=True)
class UnitPreview:
    """A weight or a block. `steps`: how many a run takes there. `weights`: how many numbers it holds.

    `gram_bytes`: the most that its Gram matrices take at once, 0 if no stage asks for them.
    """

    path: str
    steps: int
    weights: int
    gram_bytes: int


@dataclass(frozen=True)
class Preview(ShownAsTables):
    """The units that a run works on, in the order of the model, and its forward passes. Prints as tables.

    `passes`, `float_passes`: how often each batch runs through the quantized model and through the float one.
    `left`: quantized weights that stay rounded to nearest, with the reason.
    """

    units: tuple[UnitPreview, ...]
    n_steps: int
    passes: int
    float_passes: int
    left: Mapping[str, str]

    def __str__(self) -> str:
        rows = [[unit.path, unit.steps, unit.weights, unit.gram_bytes] for unit in self.units]
        total = (
            f"{self.n_steps} steps; each batch runs {self.passes} times through the quantized model and "
            f"{self.float_passes} times through the float model"
        )
        left = [f"{label} stays rounded to nearest: {why}" for label, why in self.left.items()]
        return "\n".join([total, *left, "", text_table(["unit", "steps", "weights", "bytes of Gram matrices"], rows)])


@checked
def preview(
    model: nn.Module,
    stages: Sequence[str | Mapping[str, Any] | Stage],
    names: Sequence[str] = ("*",),
    skip: Sequence[str] = (),
    blocks: Sequence[str] = (),
) -> Preview:
    """Say what `run` with keep="best" would do; the model is not changed. Raises ConfigError as `run` does.

    What stages on the whole model change is not foreseen: where one splits layers, a run works on others. Stages for
    inputs take one step for the layers that read one value; here each layer counts, and no second observation.

    >>> import torch, torchquant as tq
    >>> model = tq.quantize(nn.Sequential(nn.Linear(8, 4)), "w4a8", torch.ones(1, 8))
    >>> print(preview(model, ["calibrate", "gptq"]))
    2 steps; each batch runs 2 times through the quantized model and 1 times through the float model
    <BLANKLINE>
    unit  steps  weights  bytes of Gram matrices
    ----  -----  -------  ----------------------
    0     1      32       1024
    """
    made = [make_stage(stage) for stage in stages]
    check_order(made)
    slots, left = find_units(model, names, skip)
    places = find_blocks(model, blocks, slots)
    asked = {slot.label: [0, 0] for slot in slots} | {place.path: [0, 0] for place in places}
    n_steps, passes, float_passes = len(left), 0, 0
    has_biases = any(bias_of(slot) is not None for slot in slots)
    for unit, group in itertools.groupby(made, lambda stage: stage.unit):
        now = list(group)
        asking = [stage for stage in now if isinstance(stage, LayerStage) and unit == "layer"]
        needs: frozenset[str] = frozenset().union(*(stage.needs for stage in asking))
        is_run = bool(needs) or unit == "block"
        passes += sum(isinstance(stage, ModelStage) and stage.needs_data for stage in now) + is_run
        float_passes += bool(needs & FLOAT_NEEDS) or unit == "block"
        is_judged = any(isinstance(stage, BiasChange) for stage in asking) and has_biases
        passes, float_passes = passes + 2 * is_judged, float_passes + is_judged
        passes += len(now) * (unit == "input")
        at = {"layer": [slot.label for slot in slots], "block": [place.path for place in places]}.get(unit, [])
        n_steps += len(now) * {"model": 1, "input": len({slot.path for slot in slots})}.get(unit, len(at))
        for path in at:
            asked[path] = [asked[path][0] + len(now), max(asked[path][1], len(needs & {"gram", "cross_gram"}))]
    sizes = {slot.label: slot.weight.numel() for slot in slots}
    of_blocks = {place.path: sum(sizes[label] for label in place.layers) for place in places}
    matrices = {slot.label: _gram_bytes(slot) for slot in slots}
    units = (
        UnitPreview(path, steps, (of_blocks | sizes)[path], n * matrices.get(path, 0))
        for path, (steps, n) in asked.items()
        if steps
    )
    return Preview(tuple(units), n_steps, passes, float_passes, left)


def _gram_bytes(slot: WeightSlot) -> int:
    groups, _, columns = slot.rows().shape
    return int(groups * columns**2 * (4 if columns > WIDEST_FLOAT64 else 8))
