"""Run the stages of a pass at one block, one after the other, and undo those that increase the error of its output."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchquant.errors import ConfigError, NoCodesError, NonFiniteError, one_line
from torchquant.ptq.block import Block, BlockData, FixedWeight
from torchquant.ptq.layer import LayerData
from torchquant.ptq.ranks import are_alike
from torchquant.ptq.report import StepReport
from torchquant.ptq.resuming import layer_state, load_layer_state
from torchquant.ptq.stage import BlockStage
from torchquant.ptq.work import LayerWork
from torchquant.qmodule import QModule, WeightSlot
from torchquant.quantizers import Quantizer


class BlockWork:
    """The work on one block in one pass. `slots`: the weights of its layers in the quantized and in the float model.

    `rounded`: the labels of weights that an earlier pass has rounded.
    Tables are rounded to nearest: for what is looked up in them that is the best.
    """

    def __init__(
        self,
        path: str,
        slots: Sequence[tuple[WeightSlot, WeightSlot]],
        qmodules: Mapping[str, QModule],
        data: BlockData,
        keep: str,
        note: str,
        rounded: Collection[str],
    ) -> None:
        self.data, self.keep, self.note = data, keep, note
        self.works = {
            now.label: LayerWork(
                now, real, LayerData(now.label, frozenset(), data.generator), keep, is_rounded=now.label in rounded
            )
            for now, real in slots
        }
        layers = {name: work.layer for name, work in self.works.items() if not is_table(work.layer.slot)}
        self.block = Block(path, layers, qmodules)
        self.nearest = {name: work.nearest for name, work in self.works.items()}

    def run(self, stage: BlockStage, name: str) -> StepReport:
        """Run one stage; if the block cannot be run, round its layers to nearest instead."""
        began = time.perf_counter()
        notes = [self.note] if self.note else []
        nearest, error = None, None
        if not self.data.n or not self.block.layers:
            notes.append(self._give_up(stage))
        else:
            try:
                self.data.weigh(stage.by_gradients)
                nearest, before = self._error(self.nearest), self._error(self._weights())
                notes += self._changed(stage, before)
                error = self._error(self._weights())
            except (ConfigError, NoCodesError, NonFiniteError) as reason:
                notes.append(f"{self._give_up(stage)}: {one_line(reason)}")
        return StepReport(
            name,
            self.block.path,
            time.perf_counter() - began,
            nearest,
            error,
            self._share_changed(),
            self.data.n,
            "; ".join(notes),
        )

    def _give_up(self, stage: BlockStage) -> str:
        if stage.changes != "roundings":
            return "left as it is"
        for work in self.works.values():
            work.undo()
        return "rounded to nearest"

    def _changed(self, stage: BlockStage, before: float) -> list[str]:
        quantizers = self._quantizers()
        numbers = {key: {n: v.clone() for n, v in q.numbers().items()} for key, q in quantizers.items()}
        former = {path: layer.rounded for path, layer in self.block.layers.items()}

        def put_back() -> None:
            for key, quantizer in quantizers.items():
                now = quantizer.numbers()
                if any(not torch.equal(number, now[name]) for name, number in numbers[key].items()):
                    quantizer.set_numbers(**numbers[key])
            for path, layer in self.block.layers.items():
                layer.rounded = former[path]

        try:
            found = stage.optimize(self.block, self.data)
            if not are_alike(list(found.values())):
                raise ConfigError("the stage finds other weights on other ranks; learn by the gradients of BlockData")
            for path, rounded in found.items():
                self.works[path].take(rounded.to(self.nearest[path].dtype))
            after = self._error(self._weights())
        except Exception:
            put_back()
            raise
        if self.keep == "best" and not after <= before:
            put_back()
            if stage.changes == "roundings":
                for path, rounded in self._weights().items():
                    self.works[path].take(rounded)
            return [f"undone: its error was {after:.3g}, {before:.3g} without"]
        for path, work in self.works.items():
            work.is_changed = True
            if stage.changes == "roundings" and path not in self.block.layers:
                work.take(self.nearest[path])
        return []

    def _quantizers(self) -> dict[str, Quantizer]:
        return {path: layer.quantizer for path, layer in self.block.layers.items()} | self.block.activations()

    def _weights(self) -> dict[str, Tensor]:
        """Return the current rounded weights."""
        layers = {path: work.layer for path, work in self.works.items()}
        return {path: layer.quantized() if layer.rounded is None else layer.rounded for path, layer in layers.items()}

    def _error(self, weights: Mapping[str, Tensor]) -> float:
        layers = self.block.layers
        fixed = {path: FixedWeight(layers[path], weight) for path, weight in weights.items() if path in layers}
        with self.block.replaced(fixed):
            return self.data.error()

    def _share_changed(self) -> float:
        moved = [now.ne(self.nearest[path]).flatten() for path, now in self._weights().items()]
        return float(torch.cat(moved).to(torch.float32).mean())

    def commit(self) -> set[str]:
        """Set the weights of the layers to the chosen levels. Returns the labels of those that are rounded."""
        return {label for label, work in self.works.items() if work.commit()}


def is_table(slot: WeightSlot) -> bool:
    """Whether the rows of a weight are looked up, as in an embedding."""
    return isinstance(slot.module.layer, nn.Embedding | nn.EmbeddingBag)


def block_state(
    slots: Sequence[WeightSlot], qmodules: Mapping[str, QModule], rounded: Collection[str]
) -> dict[str, Any]:
    """Return what stages change in a block: its layers, and the quantizers of activations."""
    return {
        "layers": {slot.label: layer_state(slot, rounded) for slot in slots},
        "activations": {key: q.state_dict() for key, q in Block("", {}, qmodules).activations().items()},
    }


def load_block_state(
    slots: Sequence[WeightSlot], qmodules: Mapping[str, QModule], kept: Mapping[str, Any], rounded: set[str]
) -> None:
    """Set a block to what `block_state` returned; the labels of weights that are rounded go to `rounded`."""
    for slot in slots:
        load_layer_state(slot, kept["layers"][slot.label], rounded)
    for key, quantizer in Block("", {}, qmodules).activations().items():
        quantizer.load_state_dict(kept["activations"][key])
