"""The engine of all post-training algorithms: it runs stages in their order, and layers in order of execution."""

from __future__ import annotations

import copy
import hashlib
import itertools
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from torchquant._arguments import checked
from torchquant._modes import in_mode
from torchquant.errors import ConfigError
from torchquant.graph.recording import call_with
from torchquant.ptq.folding import fold_for_good
from torchquant.ptq.layer import LayerData, make_rows
from torchquant.ptq.report import PTQReport, StepReport
from torchquant.ptq.resuming import Steps
from torchquant.ptq.stage import CHANGES, LayerStage, ModelStage, Stage, make_stage
from torchquant.ptq.streams import Pass, passes
from torchquant.ptq.work import LayerWork
from torchquant.qmodule import QModuleState, QWrapper
from torchquant.qmodule.weight_slots import LayerSlot
from torchquant.training.batches import check_batches, inputs_of, place, progress_bar, taken
from torchquant.utils import qmodules, set_qmodule_state, weight_slots

OnStep = Callable[[StepReport], object]
KEEP = ("best", "always")


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
) -> PTQReport:
    """Run post-training algorithms on a quantized model, in place; it is in QUANT_EVAL afterwards.

    `stages`: names with options, in the order they run: "fold_bn", "calibrate", "gptq:act_order", "bias_correction";
    `torchquant algorithms` prints all. `batches`: inputs as for `torchquant.calibrate`, kept for all stages; stages
    that use no inputs need none. `out`: a folder for results; a killed run of the same model, stages and batches
    resumes there, and its result is bit for bit that of an uninterrupted run. `keep`: "best" undoes a rounding whose
    error is above that of rounding to nearest, "always" keeps it. `names`, `skip`: layers to work on, and to leave out,
    by path, with wildcards. `seed`: for random numbers. `on_step(report)` is called after each step.

    Consecutive layer stages run in one pass over all batches: each forward waits before every layer until all batches
    have arrived, so each layer gets its inputs from the rounded layers before it, and nothing is run twice. The float
    outputs that algorithms match come from a second, parallel pass over a copy of the float model. Memory: the model
    twice, the tensors that the forwards of all batches hold at one layer, and the Gram matrices of one layer.

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
    _check_order(made)
    if keep not in KEEP:
        raise ConfigError(f"keep must be one of {', '.join(KEEP)}, got {keep!r}")
    check_batches(batches, max_batches)
    where = place(model, device)
    inputs = [inputs_of(model, b, i, with_targets) for i, b in enumerate(taken(batches, max_batches, where))]
    asking = [s for s in made if (s.needs_data if isinstance(s, ModelStage) else isinstance(s, LayerStage) and s.needs)]
    if asking and not inputs:
        raise ConfigError(f"{_name(asking[0])} looks at inputs and needs batches, got none")
    layers, left = _layers(model, names, skip)
    engine = _Engine(
        model, layers, inputs, keep, seed, on_step, Steps.of(out, model, made, inputs, (keep, names, skip, seed))
    )
    with (
        torch.no_grad(),
        in_mode(False, model),
        progress_bar("post-training", engine.count(made), show_progress, on_step) as advance,
    ):
        engine.advance = advance
        for path, why in left.items():
            engine.report(StepReport("(none)", path, note=f"stays rounded to nearest: {why}"))
        for is_layer_stage, group in itertools.groupby(made, lambda stage: isinstance(stage, LayerStage)):
            if is_layer_stage:
                engine.run_layers([stage for stage in group if isinstance(stage, LayerStage)])
            else:
                engine.run_models([stage for stage in group if isinstance(stage, ModelStage)])
    set_qmodule_state(model, QModuleState.QUANT_EVAL)
    report = PTQReport(tuple(stage.spec or type(stage).__name__ for stage in made), tuple(engine.steps))
    if out is not None:
        report.save(out)
    return report


def _check_order(stages: Sequence[Stage]) -> None:
    """Raise ConfigError if a stage would undo the changes of an earlier one."""
    if not stages:
        raise ConfigError("there are no stages to run; give names such as 'gptq', see PTQ")
    done: dict[str, Stage] = {}
    for stage in stages:
        for later in ("roundings", "bias"):
            if later in done and CHANGES.index(stage.changes) < CHANGES.index("numbers") and stage.changes != "ranges":
                raise ConfigError(
                    f"{_name(stage)} changes {stage.changes}, which {_name(done[later])} has settled before it; "
                    f"put {_name(stage)} first"
                )
        if "bias" in done and stage.changes in ("numbers", "roundings"):
            raise ConfigError(f"{_name(stage)} comes after {_name(done['bias'])}, which corrects its error; swap them")
        done[stage.changes] = stage


def _name(stage: Stage) -> str:
    return stage.spec or type(stage).__name__


def _layers(model: nn.Module, names: Sequence[str], skip: Sequence[str]) -> tuple[dict[str, QWrapper], dict[str, str]]:
    """Find each layer that the names select, by path, and say why other quantized weights are not among them."""
    slots = [slot for slot in weight_slots(model) if slot.quantizer is not None]
    if not any(isinstance(slot, LayerSlot) for slot in slots):
        raise ConfigError("the model has no quantized layers; use torchquant.quantize(model, rules, example) first")
    chosen: dict[str, QWrapper] = {}
    left: dict[str, str] = {}
    for slot in slots:
        others = [other.label for other in slots if other is not slot and other.weight is slot.weight]
        if not any(fnmatchcase(slot.path, name) for name in names) or any(
            fnmatchcase(slot.path, name) for name in skip
        ):
            continue
        if others:
            left[slot.label] = f"its weight is that of {', '.join(others)} too"
        elif isinstance(slot, LayerSlot):
            chosen[slot.path] = slot.module
        else:
            left[slot.label] = f"what its weight multiplies is inside {type(slot.module.layer).__name__}"
    if not chosen:
        known = ", ".join(slot.path for slot in slots[:9])
        raise ConfigError(
            f"names {list(names)} without {list(skip)} "
            f"select no layer with a single product; the quantized weights are {known}, ..."
        )
    return chosen, left


class _Engine:
    def __init__(
        self,
        model: nn.Module,
        layers: dict[str, QWrapper],
        inputs: list[Any],
        keep: str,
        seed: int,
        on_step: OnStep | None,
        saved: Steps,
    ) -> None:
        self.model, self.layers, self.inputs, self.keep, self.seed = model, layers, inputs, keep, seed
        self.on_step, self.saved = on_step, saved
        self.steps: list[StepReport] = []
        self.reference: nn.Module | None = None
        self.n_passes = 0
        self.again: set[str] = set()
        self.advance: Callable[[], None] = lambda: None

    def count(self, stages: Sequence[Stage]) -> int:
        """Return how many steps the stages take."""
        return sum(len(self.layers) if isinstance(stage, LayerStage) else 1 for stage in stages)

    def report(self, step: StepReport) -> None:
        self.steps.append(step)
        if self.on_step is not None:
            self.on_step(step)
        self.advance()

    def run_models(self, stages: Sequence[ModelStage]) -> None:
        for stage in stages:
            began = time.perf_counter()
            note = stage.run(self.model, self.inputs)
            self.report(StepReport(_name(stage), "", time.perf_counter() - began, note=note))

    def run_layers(self, stages: list[LayerStage]) -> None:
        """Run the stages of one pass at every layer."""
        self._prepare(stages)
        needs = frozenset().union(*(stage.needs for stage in stages))
        set_qmodule_state(self.model, QModuleState.QUANT_EVAL)
        left = dict(self.layers)
        if needs:
            wants_float = bool(needs & {"cross_gram", "float_means"})
            self.again.clear()
            for path, data in self._inputs_of_layers(needs, wants_float):
                self._work(path, stages, data)
                del left[path]
            for path in sorted(self.again):
                note = "is called again where it is rounded already: the inputs of its first call alone were looked at"
                self.report(StepReport(_name(stages[0]), path, note=note))
        for path in left:
            data = LayerData(path, needs, self._generator(path))
            self._work(path, stages, data, "no batch reached it" if needs else "")
        self.n_passes += 1

    def _prepare(self, stages: Sequence[LayerStage]) -> None:
        """Fold batch norms permanently, copy the float model, and give every weight its numbers."""
        if self.reference is not None:
            return
        for path, wrapper in self.layers.items():
            slot = wrapper.weight_slots()[0]
            if wrapper.weight_quantizer.is_pinned:  # type: ignore[union-attr]
                raise ConfigError(
                    f"{path}: its weight has been rounded already, so that its real weights are gone; run all stages "
                    "in one call, or load the float weights and call unpin() of its quantizer"
                )
            if slot.is_computed:
                raise ConfigError(
                    f"{path}: its weight is computed from other parameters; make it a plain one, or skip=[{path!r}]"
                )
        fold_for_good(self.layers)
        self.reference = copy.deepcopy(self.model).eval()
        set_qmodule_state(self.reference, QModuleState.BYPASSED)
        self.float_layers = {path: self.reference.get_submodule(path) for path in self.layers}
        for _, module in qmodules(self.model):
            if any(not q.is_ready for slot in module.weight_slots() if (q := slot.quantizer) is not None):
                module.observe_weight()

    def _generator(self, path: str) -> torch.Generator:
        digest = hashlib.sha256(f"{self.seed} {self.n_passes} {path}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    def _inputs_of_layers(self, needs: frozenset[str], wants_float: bool) -> Iterable[tuple[str, LayerData]]:
        """Yield each layer with its inputs, when every batch that reaches it has arrived; it may be changed then."""
        assert self.reference is not None
        order = list(self.layers)
        calls = [self._call(self.model, batch) for batch in self.inputs]
        float_calls = [self._call(self.reference, batch) for batch in self.inputs if wants_float]
        with passes(self.layers, calls) as now, passes(self.float_layers, float_calls) as floats:
            for one in (*now, *floats):
                one.advance()
            done: set[str] = set()
            while heads := {one.at for one in now} - {None}:
                path = next((path for path in order if path in heads and path not in done), None)
                if path is not None:
                    done.add(path)
                    yield path, self._data(path, needs, now, floats)
                for i, one in enumerate(now):
                    if one.at in done:
                        self.again.update({one.at} - {path})
                        one.advance()
                        if floats and floats[i].at is not None:
                            floats[i].advance()

    def _call(self, model: nn.Module, batch: Any) -> Callable[[], object]:
        return lambda: call_with(model, batch, "a batch")

    def _data(self, path: str, needs: frozenset[str], now: list[Pass], floats: list[Pass]) -> LayerData:
        """Collect the layer's inputs in all passes that wait before it."""
        data = LayerData(path, needs, self._generator(path))
        if self.saved.has(self.n_passes, path):
            return data
        wrapper, real = self.layers[path], self.float_layers[path] if floats else None
        for i, one in enumerate(now):
            if one.at != path:
                continue
            float_x = None
            if floats:
                if floats[i].at != path:
                    raise ConfigError(
                        f"{path}: batch {i} does not reach it in the float model as it does in the quantized one, so "
                        "there is nothing to match; use match=layer, or skip it"
                    )
                float_x = _first(floats[i])
            keep = self._kept(i, _first(one))
            for rows, float_rows in make_rows(wrapper, _first(one), real, float_x, keep):
                data.add(rows, float_rows)
        return data

    def _kept(self, i: int, x: Any) -> Tensor | None:
        """Return which tokens of a batch are not padding, if its attention mask tells."""
        batch = self.inputs[i]
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        if isinstance(mask, Tensor) and isinstance(x, Tensor) and x.ndim == 3 and x.shape[:2] == mask.shape:
            return mask.to(torch.bool)
        return None

    def _work(self, path: str, stages: Sequence[LayerStage], data: LayerData, note: str = "") -> None:
        """Run the stages at one layer and set its weight to the result."""
        wrapper = self.layers[path]
        if (steps := self.saved.restore(self.n_passes, path, wrapper)) is not None:
            for step in steps:
                self.report(step)
            return
        worker = LayerWork(wrapper, self.float_layers[path], data, self.keep, note)
        steps = [worker.run(stage, _name(stage)) for stage in stages]
        worker.commit()
        self.saved.save(self.n_passes, path, wrapper, steps)
        for step in steps:
            self.report(step)


def _first(one: Pass) -> Any:
    return one.args[0] if one.args else next(iter(one.kwargs.values()))
