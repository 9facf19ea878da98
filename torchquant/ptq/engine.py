"""The engine of all post-training algorithms: it runs stages in their order, and layers in order of execution."""

from __future__ import annotations

import copy
import hashlib
import itertools
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from torchquant._arguments import checked
from torchquant._modes import in_mode
from torchquant.errors import ConfigError, one_line
from torchquant.graph.recording import call_with
from torchquant.ptq.block import BlockData
from torchquant.ptq.block_pass import BlockPass
from torchquant.ptq.block_work import BlockWork, block_state, load_block_state
from torchquant.ptq.blocks import BlockPlace, find_blocks
from torchquant.ptq.folding import fold_for_good
from torchquant.ptq.input_folding import InputFolding
from torchquant.ptq.inputs import InputWork, has_slots
from torchquant.ptq.layer import LayerData, are_alike
from torchquant.ptq.output_check import undone_if_worse
from torchquant.ptq.overflow import Overflow
from torchquant.ptq.padding import paddings
from torchquant.ptq.ranks import errors_on_all_ranks, total
from torchquant.ptq.reads import paired_rows, uses_of
from torchquant.ptq.report import PTQReport, StepReport
from torchquant.ptq.resuming import Steps, layer_state, load_layer_state
from torchquant.ptq.stage import (
    CHANGES,
    FLOAT_NEEDS,
    BiasChange,
    BlockStage,
    InputStage,
    LayerStage,
    ModelStage,
    Stage,
    make_stage,
)
from torchquant.ptq.streams import Pass, meetings, passes
from torchquant.ptq.structure import check_observed, example_for
from torchquant.ptq.units import find_units
from torchquant.ptq.work import LayerWork, bias_of
from torchquant.qmodule import QModule, QModuleState, WeightSlot
from torchquant.qmodule.state import ACTIVATIONS
from torchquant.qmodule.weight_slots import LayerSlot
from torchquant.training.batches import check_batches, inputs_of, is_first_rank, place, progress_bar, taken
from torchquant.utils import qmodules, set_qmodule_state, weight_slots

OnStep = Callable[[StepReport], object]
KEEP = ("best", "always")
MOST_ROWS, ROWS_OF_AN_INPUT = 8192, 16
"""A layer that reads more rows (tokens, patches) than either is known by about so many of them, spread evenly."""
_OTHERS = "in {} of {} batches other tokens reach it in the float model, where its own output is matched"


@checked
def run(
    model: nn.Module,
    stages: Sequence[str | Mapping[str, Any] | Stage],
    batches: Iterable[Any] = (),
    out: str | os.PathLike[str] | None = None,
    keep: str = "best",
    names: Sequence[str] = ("*",),
    skip: Sequence[str] = (),
    seed: int = 0,
    max_batches: int | None = None,
    device: str | torch.device | None = None,
    with_targets: bool | None = None,
    on_step: OnStep | None = None,
    show_progress: bool | None = None,
    blocks: Sequence[str] = (),
    cache_bytes: int | None = None,
) -> PTQReport:
    """Run post-training algorithms on a quantized model, in place; it is in QUANT_EVAL afterwards.

    `stages`: names with options, in the order they run: "fold_bn", "calibrate", "gptq:act_order", "bias_correction";
    `torchquant algorithms` prints all. `batches`: inputs as for `torchquant.calibrate`, kept for all stages; stages
    that use no inputs need none. `out`: a folder for results; a killed run of the same model, stages and batches
    resumes there, and its result is bit for bit that of an uninterrupted run. `keep`: "best" undoes a rounding whose
    error is above that of rounding to nearest, and the changes of all biases where the model's output on the batches is
    farther from the float one with them; "always" keeps them. `names`, `skip`: layers to work on, and to leave out,
    by path, with wildcards. `seed`: for random numbers. `on_step(report)` is called after each step. `blocks`: paths of
    the modules that block stages match as a whole, with wildcards; () finds them, see `find_blocks`. `cache_bytes`:
    memory for the inputs with which the forwards of all batches wait before a layer; those beyond it lie in temporary,
    memory-mapped files, and the result is the same. None sets no limit.

    Consecutive layer stages run in one pass over all batches: each forward waits before every layer until all batches
    have arrived, so each layer gets its inputs from the rounded layers before it, and nothing is run twice. The float
    outputs that algorithms match come from a second, parallel pass over a copy of the float model. A layer that reads
    many tokens or patches is known by some of them, spread evenly; the report says how many. Memory: the model
    twice, the tensors that the forwards of all batches hold at one layer, and the Gram matrices of one layer.

    In a process group every rank gives its own batches, and all have the result of the joined ones; a stage that learns
    by gradients takes their mean over the ranks, so that a step looks at one batch of each. With `out`, each
    rank after the first keeps what a killed run resumes from in a folder below it.

    A batch norm that is folded into a layer is folded permanently first, and frozen. Raises ConfigError for stages in
    an impossible order, a model without quantizers, and missing batches; if an algorithm cannot work on a layer, the
    report says so, and the layer is rounded to nearest.

    >>> import torchquant as tq
    >>> net, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(64, 8)
    >>> model = tq.quantize(net, [{"types": ["Linear"], "weight": "affine:3/channel"}], x)
    >>> report = run(model, ["gptq", "bias_correction"], [x])
    >>> [step.path for step in report.steps]
    ['0', '0', '2', '2']
    """
    made = [make_stage(stage) for stage in stages]
    check_order(made)
    if keep not in KEEP:
        raise ConfigError(f"keep must be one of {', '.join(KEEP)}, got {keep!r}")
    if cache_bytes is not None and cache_bytes < 0:
        raise ConfigError(f"cache_bytes must be a number of bytes >= 0, or None for no limit, got {cache_bytes}")
    check_batches(batches, max_batches)
    where = place(model, device)
    inputs = [inputs_of(model, b, i, with_targets) for i, b in enumerate(taken(batches, max_batches, where))]
    asking = [stage for stage in made if _asks_for_inputs(stage)]
    if asking and not total(len(inputs)):
        raise ConfigError(f"{_name(asking[0])} looks at inputs and needs batches, got none")
    units, left = find_units(model, names, skip)
    settings = (keep, names, skip, seed, *([blocks] if blocks else []))
    saved = Steps.of(out, model, made, inputs, settings)
    overflow = None if cache_bytes is None else Overflow(cache_bytes, inputs)
    engine = _Engine(model, units, find_blocks(model, blocks, units), inputs, keep, seed, on_step, saved, overflow)
    with (
        torch.no_grad(),
        in_mode(False, model),
        progress_bar("post-training", engine.count(made), show_progress, on_step) as advance,
    ):
        engine.advance = advance
        for label, why in left.items():
            engine.report(StepReport("(none)", label, note=f"stays rounded to nearest: {why}"))
        for unit, group in itertools.groupby(made, lambda stage: stage.unit):
            engine.run_all(unit, list(group))
        engine.observe_again()
        if overflow is not None:
            engine.report(
                StepReport("(none)", "", note=f"{overflow.moved} bytes of waiting inputs were put into files")
            )
    set_qmodule_state(model, QModuleState.QUANT_EVAL)
    report = PTQReport(tuple(stage.spec or type(stage).__name__ for stage in made), tuple(engine.steps))
    if out is not None and is_first_rank():
        report.save(out)
    return report


def check_order(stages: Sequence[Stage]) -> None:
    """Raise ConfigError if a stage would undo the changes of an earlier one."""
    if not stages:
        raise ConfigError("there are no stages to run; give names such as 'gptq', see PTQ")
    done: dict[str, Stage] = {}
    units: set[str] = set()
    for stage in stages:
        for later in ("roundings", "bias"):
            if later in done and CHANGES.index(stage.changes) < CHANGES.index("numbers") and stage.changes != "ranges":
                raise ConfigError(
                    f"{_name(stage)} changes {stage.changes}, which {_name(done[later])} has settled before it; "
                    f"put {_name(stage)} first"
                )
        if "bias" in done and stage.changes in ("numbers", "roundings"):
            raise ConfigError(f"{_name(stage)} comes after {_name(done['bias'])}, which corrects its error; swap them")
        if stage.changes == "structure" and (before := [done[c] for c in ("weights", "numbers") if c in done]):
            raise ConfigError(
                f"{_name(stage)} changes structure, and {_name(before[0])} works on what comes of it; swap them"
            )
        if isinstance(stage, ModelStage) and not stage.allows_transforms and "input" in units:
            raise ConfigError(f"{_name(stage)} cannot work on layers with transforms before them; put it first")
        done[stage.changes] = stage
        units.add(stage.unit)


def _asks_for_inputs(stage: Stage) -> bool:
    if isinstance(stage, ModelStage | InputStage):
        return stage.needs_data
    return stage.unit == "block" or (isinstance(stage, LayerStage) and bool(stage.needs))


def _name(stage: Stage) -> str:
    return stage.spec or type(stage).__name__


class _Engine:
    """The state of a run. `units`: the weights to work on, by the path of their modules, at which forwards wait."""

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[WeightSlot],
        blocks: Sequence[BlockPlace],
        inputs: list[Any],
        keep: str,
        seed: int,
        on_step: OnStep | None,
        saved: Steps,
        overflow: Overflow | None,
    ) -> None:
        self.model, self.blocks, self.inputs, self.keep, self.seed = model, blocks, inputs, keep, seed
        self.units: dict[str, list[WeightSlot]] = {}
        for slot in units:
            self.units.setdefault(slot.path, []).append(slot)
        self.paddings = paddings(model, inputs)
        self.on_step, self.saved, self.overflow = on_step, saved, overflow
        self.steps: list[StepReport] = []
        self.reference: nn.Module | None = None
        self.n_passes = 0
        self.is_stale = False
        self.again: set[str] = set()
        self.rounded: set[str] = set()
        self.advance: Callable[[], None] = lambda: None

    def count(self, stages: Sequence[Stage]) -> int:
        """Return how many steps the stages take."""
        counts = {"layer": sum(map(len, self.units.values())), "block": len(self.blocks), "model": 1}
        counts["input"] = len(self.units)
        return sum(counts[stage.unit] for stage in stages)

    def run_all(self, unit: str, stages: list[Any]) -> None:
        """Run consecutive stages that work on the same kind of unit."""
        run: Callable[[list[Any]], None] = getattr(self, f"run_{unit}s")
        run(stages)

    def report(self, step: StepReport) -> None:
        self.steps.append(step)
        if self.on_step is not None:
            self.on_step(step)
        self.advance()

    def run_models(self, stages: Sequence[ModelStage]) -> None:
        for stage in stages:
            if not stage.allows_transforms and any(has_slots(slots[0]) for slots in self.units.values()):
                raise ConfigError(f"{_name(stage)} cannot work on layers with transforms before them; run it first")
            began = time.perf_counter()
            note = stage.run(self.model, self.inputs)
            self.report(StepReport(_name(stage), "", time.perf_counter() - began, note=note))

    def run_inputs(self, stages: Sequence[InputStage]) -> None:
        """Run stages for inputs, one after the other, in the float model, whose function stays."""
        calls = [self._call(self.model, batch) for batch in self.inputs]
        for stage in stages:
            self._check_units()
            folding = None
            if stage.fold and total(len(self.inputs)):
                with errors_on_all_ranks():
                    folding = InputFolding(self.model, example_for(self.model, self.inputs))
            work = InputWork(self.model, stage, _name(stage), self.keep, self.report, folding)
            work.run_all({path: slots[0] for path, slots in self.units.items()}, calls, self.paddings, self._generator)
            self.n_passes += 1
            self.is_stale = True

    def observe_again(self) -> None:
        """Observe the ranges that stages for inputs have made invalid, unless a stage has done so since."""
        if not self.is_stale:
            return
        self.is_stale = False
        sites = [(m.path, site, q) for _, m in qmodules(self.model) for site, q in m.quantizers().items()]
        lost = [path for path, site, q in sites if site in ACTIVATIONS and not q.is_ready]
        if lost and not total(len(self.inputs)):
            raise ConfigError(
                f"{lost[0]}: what it reads has changed, and its range must be observed again; give batches"
            )
        self._observe_weights()
        if lost:
            self.run_all("model", [make_stage("calibrate")])

    def run_layers(self, stages: list[LayerStage]) -> None:
        """Run the stages of one pass at every layer."""
        needs = frozenset().union(*(stage.needs for stage in stages))
        self._prepare(bool(needs))
        corrects = [stage for stage in stages if isinstance(stage, BiasChange)] if self.keep == "best" else []
        held = [bias_of(slot) for slots in self.units.values() for slot in slots] if corrects else []
        biases = [(one[0], one[0].clone()) for one in held if one is not None]
        set_qmodule_state(self.model, QModuleState.QUANT_EVAL)
        left = {slot.label: slot for slots in self.units.values() for slot in slots}
        if needs:
            wants_float = bool(needs & FLOAT_NEEDS)
            self.again.clear()
            for slot, data, notes in self._inputs_of_units(needs, wants_float):
                self._work(slot, stages, data, notes)
                del left[slot.label]
            self._report_again(stages[0])
        for slot in left.values():
            data = LayerData(slot.label, needs, self._generator(slot.label))
            self._work(slot, stages, data, ["no batch reached it"] if needs else [])
        self.n_passes += 1
        if biases and total(len(self.inputs)):
            assert self.reference is not None
            calls = [
                (self._call(self.model, batch), self._call(self.reference, batch), padding)
                for batch, padding in zip(self.inputs, self.paddings, strict=True)
            ]
            if note := undone_if_worse(biases, calls):
                self.report(StepReport(_name(corrects[-1]), "", note=note))

    def _prepare(self, runs: bool) -> None:
        """Fold batch norms permanently, copy the float model, and give every weight its numbers.

        `runs`: whether the pass runs the quantized model, which must be able to before anything is changed.
        """
        self.observe_again()
        if runs:
            check_observed(self.model)
        if self.reference is not None:
            return
        self._check_units()
        self.reference = copy.deepcopy(self.model).eval()
        set_qmodule_state(self.reference, QModuleState.BYPASSED)
        self.float_units = {slot.label: slot for slot in weight_slots(self.reference)}
        self._observe_weights()

    def _observe_weights(self) -> None:
        """Let quantizers observe the weights that none has observed yet."""
        for _, module in qmodules(self.model):
            if any(not q.is_ready for slot in module.weight_slots() if (q := slot.quantizer) is not None):
                module.observe_weight()

    def _check_units(self) -> None:
        """Fold batch norms permanently. Raises ConfigError for a weight that no stage can change."""
        for slot in (slot for slots in self.units.values() for slot in slots):
            if slot.quantizer.is_pinned:  # type: ignore[union-attr]
                raise ConfigError(
                    f"{slot.label}: its weight has been rounded already, so that its real weights are gone; run all "
                    "stages in one call, or load the float weights and call unpin() of its quantizer"
                )
            if slot.is_computed:
                raise ConfigError(
                    f"{slot.label}: its weight is computed from other parameters; make it a plain one, or "
                    f"skip=[{slot.label!r}]"
                )
        fold_for_good({path: slots[0].module for path, slots in self.units.items() if isinstance(slots[0], LayerSlot)})

    def _generator(self, label: str) -> torch.Generator:
        digest = hashlib.sha256(f"{self.seed} {self.n_passes} {label}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    def _inputs_of_units(
        self, needs: frozenset[str], wants_float: bool
    ) -> Iterable[tuple[WeightSlot, LayerData, list[str]]]:
        """Yield each weight with its inputs, when every batch that reaches it has arrived; it may be changed then.

        A module with several weights gives one after the other, each with what the changed ones before it compute.
        """
        assert self.reference is not None
        calls = [self._call(self.model, batch) for batch in self.inputs]
        float_calls = [self._call(self.reference, batch) for batch in self.inputs if wants_float]
        modules = {path: slots[0].module for path, slots in self.units.items()}
        float_modules = {path: self.reference.get_submodule(path) for path in modules}
        with (
            passes(modules, calls, self.overflow) as now,
            passes(float_modules, float_calls, self.overflow) as floats,
        ):
            for path in meetings(list(self.units), now, floats, self.again):
                for slot in self.units[path]:
                    with errors_on_all_ranks():
                        data, notes = self._data(slot, needs, now, floats)
                    data.join_ranks(slot.rows())
                    yield slot, data, [note for note in (data.remark, *notes) if note]

    def _call(self, model: nn.Module, batch: Any) -> Callable[[], object]:
        return lambda: call_with(model, batch, "a batch")

    def _data(
        self, slot: WeightSlot, needs: frozenset[str], now: list[Pass], floats: list[Pass]
    ) -> tuple[LayerData, list[str]]:
        """Collect the inputs of a weight in all passes that wait before its module, and remarks on them."""
        data, others = LayerData(slot.label, needs, self._generator(slot.label)), set()
        if self.saved.has(self.n_passes, slot.label):
            return data, []
        real = self.float_units[slot.label]
        most_rows = max(MOST_ROWS, ROWS_OF_AN_INPUT * slot.rows().shape[-1]) // max(1, len(self.inputs))
        for i, one in enumerate(now):
            if one.at != slot.path:
                continue
            call, mask = (one.args, one.kwargs), self.paddings[i].at(slot.path)
            uses = uses_of(slot, call, mask)
            if uses is not None:
                data.add_uses(uses, slot.rows().shape[-1])
                continue
            float_call = (floats[i].args, floats[i].kwargs) if floats and floats[i].at == slot.path else None
            try:
                for rows, float_rows in paired_rows(slot, call, real, float_call, mask, most_rows):
                    if floats and not are_alike(rows, float_rows):
                        others.add(i)
                        float_rows = rows
                    data.add(rows, float_rows)
            except ConfigError as error:
                return LayerData(slot.label, needs, self._generator(slot.label)), [one_line(error)]
        return data, [_OTHERS.format(len(others), len(now))] if others else []

    def _work(self, slot: WeightSlot, stages: Sequence[LayerStage], data: LayerData, notes: Sequence[str]) -> None:
        """Run the stages at one weight and set it to the result."""
        label, rounded = slot.label, self.rounded
        steps = self.saved.restore(self.n_passes, label, lambda kept: load_layer_state(slot, kept, rounded))
        if steps is None:
            worker = LayerWork(slot, self.float_units[label], data, self.keep, notes, label in rounded)
            steps = [worker.run(stage, _name(stage)) for stage in stages]
            rounded |= {label} if worker.commit() else set()
            self.saved.save(self.n_passes, label, layer_state(slot, rounded), steps)
        for step in steps:
            self.report(step)

    def run_blocks(self, stages: list[BlockStage]) -> None:
        """Run the stages of one pass at every block."""
        self._prepare(True)
        assert self.reference is not None
        set_qmodule_state(self.model, QModuleState.QUANT_EVAL)
        left = {block.path: block for block in self.blocks}
        self.again.clear()
        is_done = partial(self.saved.has, self.n_passes)
        one = BlockPass(
            self.model, self.reference, self.inputs, self.paddings, self.overflow, self._generator, is_done, self.again
        )
        for block, modules, data in one.run(self.blocks):
            self._work_block(block, modules, stages, data)
            del left[block.path]
        self._report_again(stages[0])
        for block in left.values():
            data = BlockData(block.path, self._generator(block.path))
            self._work_block(block, {}, stages, data, "no batch reached it")
        self.n_passes += 1

    def _work_block(
        self,
        block: BlockPlace,
        modules: Mapping[str, QModule],
        stages: Sequence[BlockStage],
        data: BlockData,
        note: str = "",
    ) -> None:
        """Run the stages at one block and set the weights of its layers to the result."""
        slots = [slot for slots in self.units.values() for slot in slots if slot.label in block.layers]
        rounded = self.rounded
        steps = self.saved.restore(
            self.n_passes, block.path, lambda kept: load_block_state(slots, modules, kept, rounded)
        )
        if steps is None:
            pairs = [(slot, self.float_units[slot.label]) for slot in slots]
            worker = BlockWork(block.path, pairs, modules, data, self.keep, note, rounded)
            steps = [worker.run(stage, _name(stage)) for stage in stages]
            rounded |= worker.commit()
            self.saved.save(self.n_passes, block.path, block_state(slots, modules, rounded), steps)
        for step in steps:
            self.report(step)

    def _report_again(self, stage: Stage) -> None:
        for path in sorted(self.again):
            note = "is called again where it is rounded already: the inputs of its first call alone were looked at"
            self.report(StepReport(_name(stage), path, note=note))
