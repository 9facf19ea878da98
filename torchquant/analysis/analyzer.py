"""Measure what each site of a quantized model does to its output, and why."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from torchquant._arguments import checked
from torchquant._modes import in_mode
from torchquant.analysis.effects import Effect, EffectSum, Judge, Loss
from torchquant.analysis.replay import Kept, Replay
from torchquant.analysis.result import Analysis, SiteAnalysis
from torchquant.analysis.saved_sums import SavedSums
from torchquant.analysis.sites import SiteSums
from torchquant.analysis.stand_ins import called_once, passing
from torchquant.errors import ConfigError
from torchquant.graph.called import first_real
from torchquant.graph.recording import call_with
from torchquant.graph.traced import graphs_running
from torchquant.qmodule import QModule, QModuleState
from torchquant.training.batches import OnBatch, check_batches, count, place, progress_bar, split_batch, taken
from torchquant.training.evaluation import Metric, summed
from torchquant.utils import qmodule_state, qmodules

ALONE, ALL_BUT, WHOLE = "alone", "all_but", "whole"


@checked
def analyze(
    model: nn.Module,
    batches: Iterable[Any],
    metric: Metric | None = None,
    loss: Loss | None = None,
    with_targets: bool | None = None,
    apart: bool = False,
    out: str | os.PathLike[str] | None = None,
    max_batches: int | None = None,
    device: str | torch.device | None = None,
    on_batch: OnBatch | None = None,
    show_progress: bool | None = None,
) -> Analysis:
    """Measure which layers of a calibrated model lose how much, and collect why.

    For each site, that is each quantized module: the output of the model with this site quantized and all others float,
    and with all others quantized and this one float, both compared with the float model; how much error its output has
    from the site itself and from what it reads; and the facts of its quantizers (`SlotFacts`). `print` shows the
    result, `findings()` says what stands out, `advise` tries remedies.

    `batches`: inputs, or (inputs, targets) pairs, as for `torchquant.calibrate`; at most `max_batches`. With targets
    the metric is compared too: a function of outputs and targets as in `torchquant.evaluate`, None for the
    accuracy where targets are classes; and with `loss(outputs, targets)`, the mean of a batch, also the loss. One batch
    is in memory at a time, with the results of all layers. The model runs in eval mode, without gradients; what comes
    before a site is not run again for it, so that all sites cost about (sites + 3) runs of the model. Modes and states
    are restored, and the model is not changed. `apart`: measure each slot alone too, such as the weight of a layer
    without its input and output, for half a run of the model each. `out`: a folder in which the sums are kept after
    each batch, so that a killed run of the same model and batches resumes there; the result is saved in it. The other
    arguments are as in `calibrate`.

    Raises ConfigError if there are no batches, nothing is quantized, or the folder holds another analysis,
    UnobservedRangeError before calibration.

    >>> import torchquant as tq
    >>> net, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(64, 8)
    >>> model = tq.quantize(net, [{"weight": "affine:2"}, {"names": ["2"], "weight": "affine:8"}], x)
    >>> tq.calibrate(model, [x])
    1
    >>> analyze(model, [x]).worst()[0].path
    '0'
    """
    check_batches(batches, max_batches)
    work = _Analyzer(model, Judge(metric, loss), apart)
    where = place(model, device)
    saved = None if out is None else SavedSums(out, model, (metric, loss, apart))
    if saved is not None and saved.sums:
        work.load(saved.sums)
    n_batches = 0
    with (
        torch.inference_mode(False),  # its results do not tell whether they were written to
        torch.no_grad(),
        in_mode(False, model),
        progress_bar("analyzing", count(batches, max_batches), show_progress, on_batch) as advance,
    ):
        for i, batch in enumerate(taken(batches, max_batches, where, on_batch)):
            inputs, targets = split_batch(model, batch, i, with_targets)
            n_batches += 1
            if saved is None or not saved.has(i, batch):
                work.add(inputs, targets, batch)
                if saved is not None:
                    saved.save(batch, work.state())
            advance()
    if not n_batches:
        raise ConfigError("there are no batches to analyze on; give at least one")
    if saved is not None:
        saved.check_end(n_batches)
    result = work.result()
    if out is not None:
        result.save(out)
    return result


class _Analyzer:
    """Runs a model on batches and keeps the sums."""

    def __init__(self, model: nn.Module, judge: Judge, apart: bool) -> None:
        self.model, self.judge, self.apart = model, judge, apart
        self.sites = {path or "(root)": module for path, module in qmodules(model) if module.quantizers()}
        if not self.sites:
            raise ConfigError(
                f"nothing in {type(model).__name__} is quantized; quantize it with torchquant.quantize, whose result "
                "is a copy, and calibrate it"
            )
        self.sums: dict[tuple[str, str], EffectSum] = {}
        self.floats = EffectSum()
        self.facts = SiteSums(model)
        self.samples = 0
        self.can_replay = True

    def add(self, inputs: Any, targets: Any, batch: Any) -> None:
        """Add one batch."""
        run = partial(call_with, self.model, inputs, "a batch")
        floats, quantized = Replay(self.model), Replay(self.model)
        with self._all_in(QModuleState.BYPASSED):
            reference = floats.record(run)
            self._check_replay(floats, run, reference)
            self.floats.add(self.judge, reference, reference, batch, targets)

            def add(kind: str, path: str, output: Any) -> None:
                found = self.sums.setdefault((kind, path), EffectSum())
                found.add(self.judge, reference, output, batch, targets)

            for path, module in self.sites.items():
                add(ALONE, path, self._changed(floats, module, QModuleState.QUANT_EVAL, run))
                for slot in module.quantizers() if self.apart else ():
                    with self._only(module, slot):
                        output = self._changed(floats, module, QModuleState.QUANT_EVAL, run)
                    add(f"{ALONE} {slot}", path, output)
        with self._all_in(QModuleState.QUANT_EVAL):
            with self.facts.watching(is_first=self.samples == 0):
                add(WHOLE, "", quantized.record(run, partial(self.facts.add_call, floats)))
            floats.clear()
            for path, module in self.sites.items():
                known = self.facts.own_results.pop(module, None)
                add(ALL_BUT, path, self._changed(quantized, module, QModuleState.BYPASSED, run, known))
        self.samples += summed(0.0, batch)[1]

    @contextmanager
    def _all_in(self, state: QModuleState) -> Iterator[None]:
        """Put all modules in a state; traced models run their graphs in each, so that the same modules are called.

        Weights do not change meanwhile, so each is quantized once, unless several share a quantizer.
        """
        held = Counter(slot.quantizer for module in self.sites.values() for slot in module.weight_slots())
        with qmodule_state(self.model, state), graphs_running(), ExitStack() as stack:
            for quantizer, n_weights in held.items():
                if quantizer is not None and n_weights == 1:
                    stack.enter_context(called_once(quantizer))
            yield

    @contextmanager
    def _only(self, module: QModule, slot: str) -> Iterator[None]:
        """Let the values of all other slots of a module pass unchanged."""
        with ExitStack() as stack:
            for name, quantizer in module.quantizers().items():
                if name != slot:
                    stack.enter_context(passing(quantizer))
            yield

    def _changed(
        self, replay: Replay, module: QModule, state: QModuleState, run: Callable[[], Any], known: Kept | None = None
    ) -> Any:
        """Run the model with one module in another state; `known`: what its first call returns then."""
        former = module.state
        module.state = state
        try:
            return replay.again(module, run, known) if self.can_replay else run()
        finally:
            module.state = former

    def _check_replay(self, replay: Replay, run: Callable[[], Any], reference: Any) -> None:
        """Run whole models from now on if a model gives another output when what comes first is not run again."""
        if self.samples or not self.can_replay:
            return
        module = list(self.sites.values())[3 * len(self.sites) // 4]
        try:
            is_equal = torch.equal(first_real(replay.again(module, run)), first_real(reference))
        except Exception:
            is_equal = False
        if not is_equal:
            self.can_replay = False
            warnings.warn(
                f"{type(self.model).__name__} gives another output when modules whose result is known are not run "
                "again, perhaps because they write to what later ones read; every site costs a whole run of the model",
                stacklevel=5,
            )

    def state(self) -> dict[str, Any]:
        """Return all sums as plain data."""
        effects = {"\0".join(key): found.sums for key, found in self.sums.items()}
        head = {"samples": self.samples, "can_replay": self.can_replay, "floats": self.floats.sums}
        return {**head, "effects": effects, "facts": self.facts.state()}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from the result of `state`."""
        self.samples, self.can_replay = state["samples"], state["can_replay"]
        self.floats = EffectSum(state["floats"])
        for key, sums in state["effects"].items():
            kind, _, path = key.partition("\0")
            self.sums[kind, path] = EffectSum(sums)
        self.facts.load(state["facts"])

    def result(self) -> Analysis:
        """Return the analysis of all batches so far."""
        floats = self.floats.effect()
        sites = [
            SiteAnalysis(
                path,
                self._what(path, module),
                self._effect(ALONE, path),
                self._effect(ALL_BUT, path),
                self.facts.sqnr_db(module, "added"),
                self.facts.sqnr_db(module, "inherited"),
                self.facts.facts(module),
                {slot: self._effect(f"{ALONE} {slot}", path) for slot in module.quantizers()} if self.apart else {},
            )
            for path, module in self.sites.items()
        ]
        whole = self._effect(WHOLE, "")
        return Analysis(whole, tuple(sites), self.samples, floats.metric, floats.loss)

    def _what(self, path: str, module: QModule) -> str:
        """Name the layer or operator of a site, as the plan does where there is one."""
        types = getattr(getattr(self.model, "plan", None), "types", {})
        found = types.get("" if path == "(root)" else path)
        return found or type(module if module.held is None else module.held).__name__

    def _effect(self, kind: str, path: str) -> Effect:
        return self.sums[kind, path].effect()
