"""A copy of a quantized model on which changes are tried, and judged by the output of the whole model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from torchquant._modes import in_mode
from torchquant.analysis.effects import Effect, EffectSum, Judge
from torchquant.analysis.stand_ins import passing
from torchquant.graph.copies import copy_model
from torchquant.graph.dataflow import site_edges
from torchquant.graph.recording import call_with
from torchquant.graph.traced import graphs_running
from torchquant.qmodule import QModule, QModuleState
from torchquant.qmodule.state import ACTIVATIONS
from torchquant.quantizers import Quantizer
from torchquant.utils import qmodule_state, qmodules


@dataclass(frozen=True)
class Batch:
    """One batch: inputs, targets (None without), the batch as it was given, and the float model's output."""

    inputs: Any
    targets: Any
    given: Any
    reference: Any


class Trials:
    """A copy of a calibrated model, in which quantizers are replaced one at a time. The batches stay in memory."""

    def __init__(self, model: nn.Module, batches: list[tuple[Any, Any, Any]], judge: Judge) -> None:
        self.model = copy_model(model)
        self.judge = judge
        self.modules: dict[str, QModule] = {path or "(root)": module for path, module in qmodules(self.model)}
        with self._running(QModuleState.BYPASSED):
            self.batches = [Batch(*batch, call_with(self.model, batch[0], "a batch")) for batch in batches]

    @contextmanager
    def _running(self, state: QModuleState) -> Iterator[None]:
        with torch.no_grad(), in_mode(False, self.model), qmodule_state(self.model, state), graphs_running():
            yield

    def effect(self, model: nn.Module | None = None) -> Effect:
        """Return the effect of the whole model as it is now, or of another model, on all batches."""
        model, found = model or self.model, EffectSum()
        with torch.no_grad(), in_mode(False, model), qmodule_state(model, QModuleState.QUANT_EVAL), graphs_running():
            for batch in self.batches:
                output = call_with(model, batch.inputs, "a batch")
                found.add(self.judge, batch.reference, output, batch.given, batch.targets)
        return found.effect()

    def sources(self) -> dict[str, set[str]]:
        """Return the path of each module -> those of the modules whose results it reads."""
        found: dict[str, set[str]] = {}
        for source, path in site_edges(self.model, self.batches[0].inputs):
            found.setdefault(path, set()).add(source)
        return found

    def quantizer(self, path: str, slot: str) -> Quantizer:
        """Return the quantizer that is in a slot now."""
        return self.modules[path].quantizers()[slot]

    def replace(self, path: str, slot: str, new: Quantizer) -> None:
        """Put a quantizer into a slot."""
        module = self.modules[path]
        if slot in ACTIVATIONS:
            module.replace_quantizer(slot, new)
        else:
            next(s for s in module.weight_slots() if s.name == slot).replace_quantizer(new)

    @contextmanager
    def with_(self, path: str, slot: str, new: Quantizer) -> Iterator[None]:
        """Have another quantizer in a slot while the context lasts."""
        former = self.quantizer(path, slot)
        self.replace(path, slot, new)
        try:
            yield
        finally:
            self.replace(path, slot, former)

    @contextmanager
    def without(self, path: str, slot: str) -> Iterator[None]:
        """Let the values of a slot pass its quantizer unchanged while the context lasts."""
        with passing(self.quantizer(path, slot)):
            yield

    def show(self, path: str, slot: str, new: Quantizer) -> None:
        """Let a new quantizer see what reaches its slot: the weight, or the values of the float model.

        One that another slot of the model has keeps its numbers.
        """
        if any(new is module for module in self.model.modules()):
            return
        module, old = self.modules[path], self.quantizer(path, slot)
        place = next((tensor.device for tensor in (*old.parameters(), *old.buffers())), None)
        new.to(place).train(old.training)
        if slot not in ACTIVATIONS:
            seen = next(s for s in module.weight_slots() if s.name == slot).seen().detach()
            new.allocate_for(seen)
            new.pre_observe(seen)
            return
        others = {name: q for name, q in module.quantizers().items() if name in ACTIVATIONS and name != slot}
        self.replace(path, slot, new)
        try:
            for name, quantizer in others.items():
                module.replace_quantizer(name, copy.deepcopy(quantizer))
            with self._running(QModuleState.BYPASSED):
                module.state = QModuleState.CALIBRATION_ACT_ONLY
                for batch in self.batches:
                    call_with(self.model, batch.inputs, "a batch")
        finally:
            for name, quantizer in (*others.items(), (slot, old)):
                module.replace_quantizer(name, quantizer)

    def changed_copy(self, change: Callable[[nn.Module, list[Any]], object]) -> Effect:
        """Return the effect of a copy of the model after a change of the whole of it. It gets the model and inputs."""
        model = copy_model(self.model)
        change(model, [batch.inputs for batch in self.batches])
        return self.effect(model)


def post_training(stages: tuple[str, ...]) -> Callable[[nn.Module, list[Any]], object]:
    """Return the change that runs post-training stages."""
    from torchquant import ptq

    return lambda model, inputs: ptq.run(model, list(stages), inputs, with_targets=False, show_progress=False)
