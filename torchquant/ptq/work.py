"""Run the stages of a pass at one layer, one after the other, and undo those that increase the error."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from torchquant.errors import ConfigError, NoCodesError, NonFiniteError, one_line
from torchquant.ptq.functional.gram import few_rows
from torchquant.ptq.layer import Layer, LayerData
from torchquant.ptq.report import StepReport
from torchquant.ptq.stage import BiasChange, LayerStage, LowRankChange, NumberSearch, Rounding, WeightChange
from torchquant.qmodule import WeightSlot
from torchquant.qmodule.bn_folding import running_factor
from torchquant.qmodule.weight_slots import LayerSlot


class LayerWork:
    """The work on one layer in one pass.

    `real`: the weight in the float model, whose outputs are the target. `is_rounded`: whether an earlier pass has
    rounded the weight; if not, the pass starts from what that one has left, such as a changed weight. `keep`: "best"
    undoes a stage that makes the error larger than that of rounding to nearest.
    """

    def __init__(
        self,
        slot: WeightSlot,
        real: WeightSlot,
        data: LayerData,
        keep: str,
        notes: Sequence[str] = (),
        is_rounded: bool = False,
    ) -> None:
        self.data, self.keep, self.notes = data, keep, tuple(notes)
        assert slot.quantizer is not None
        self.was_pinned = slot.quantizer.is_pinned
        rounded = slot.quantizer(slot.seen()).detach().view(slot.rows().shape) if is_rounded else None
        slot.quantizer.pin(slot.seen(), observe=not slot.quantizer.is_ready)
        self.was_beside, own = beside_of(slot), beside_of(real)
        self.real = _wide(real.rows() if own is None else real.rows() + own)
        self.start = _wide(slot.rows())
        if is_rounded:
            self.start = self.real if self.was_beside is None else self.real - self.was_beside
        self.layer = Layer(slot, self.start, rounded, self.was_beside)
        self.nearest = self.layer.quantized()
        self.numbers = {name: number.clone() for name, number in slot.quantizer.numbers().items()}
        self.is_changed = False

    def run(self, stage: LayerStage, name: str) -> StepReport:
        """Run one stage; if nothing is known of the layer's inputs, round to nearest instead."""
        began = time.perf_counter()
        notes = list(self.notes)
        if "gram" in stage.needs and self.data.n and self.data.uses is None:
            notes += filter(None, [few_rows(self.data.n, self.real.shape[-1])])
        if stage.needs and not self.data.n:
            if isinstance(stage, Rounding):
                self.undo()
                notes.append("rounded to nearest")
            else:
                notes.append("left as it is")
        else:
            notes += self._changed(stage)
        q = self.layer.rounded if self.layer.rounded is not None else self.layer.quantized()
        return StepReport(
            name,
            self.layer.path,
            time.perf_counter() - began,
            self.nearest_error,
            self._error(q, self.layer.beside),
            float(q.ne(self.nearest).to(torch.float32).mean()),
            self.data.n,
            "; ".join(notes),
        )

    def _changed(self, stage: LayerStage) -> list[str]:
        try:
            if isinstance(stage, Rounding):
                return self._round(stage)
            if isinstance(stage, WeightChange):
                return self._change_weight(self._where_known(stage.change(self.layer, self.data), self.layer.weight))
            if isinstance(stage, NumberSearch):
                return self._set_numbers(stage)
            if isinstance(stage, LowRankChange):
                return self._put_beside(stage)
            assert isinstance(stage, BiasChange)
            return self._add_bias(stage)
        except (ConfigError, NoCodesError, NonFiniteError) as error:
            if isinstance(stage, Rounding):
                self.undo()
                return [f"rounded to nearest: {one_line(error)}"]
            return [f"left as it is: {one_line(error)}"]

    def take(self, rounded: Tensor) -> None:
        """Let the layer be rounded to these levels."""
        self.layer.rounded, self.is_changed = rounded, True

    def undo(self) -> None:
        """Round to nearest, with the numbers and the weight that the layer had before the pass."""
        slot, quantizer = self.layer.slot, self.layer.quantizer
        quantizer.unpin()
        if self.layer.beside is not self.was_beside:
            slot.module.set_low_rank(None)
            self.layer.beside = None
        self.layer.weight = self.start
        slot.set_weight(self.layer.weight.reshape(self.layer.shape).to(slot.weight.dtype))
        quantizer.pin(slot.seen(), observe=False)
        if self.numbers:
            quantizer.set_numbers(**self.numbers)
        self.take(self.nearest)

    def _round(self, stage: Rounding) -> list[str]:
        rounded = self._where_known(stage.round(self.layer, self.data).to(self.nearest.dtype), self.layer.quantized())
        before, after = self.nearest_error, self._error(rounded, self.layer.beside)
        if self.keep == "best" and before is not None and after is not None and not after <= before:
            self.undo()
            return [f"undone: its error was {after:.3g}, rounding to nearest {before:.3g}"]
        self.take(rounded)
        return []

    def _change_weight(self, weight: Tensor) -> list[str]:
        if not bool(weight.isfinite().all()):
            raise NonFiniteError("its new weight has NaN or Inf")
        slot, quantizer = self.layer.slot, self.layer.quantizer
        quantizer.unpin()
        slot.set_weight(weight.reshape(self.layer.shape).to(slot.weight.dtype))
        quantizer.pin(slot.seen())
        self.layer.weight, self.is_changed = weight, True
        return []

    def _set_numbers(self, stage: NumberSearch) -> list[str]:
        quantizer, former = self.layer.quantizer, self.layer.rounded
        old = {name: number.clone() for name, number in quantizer.numbers().items()}
        before = self._error(self.layer.quantized() if former is None else former, self.layer.beside)
        new = dict(stage.numbers(self.layer, self.data))
        if former is None:
            quantizer.set_numbers(**new)
        else:
            self.layer.rounded = self.layer.at_its_codes(former, new)
        after = self._error(
            self.layer.quantized() if self.layer.rounded is None else self.layer.rounded, self.layer.beside
        )
        self.is_changed = True
        if self.keep == "best" and before is not None and after is not None and not after <= before:
            quantizer.set_numbers(**old)
            self.layer.rounded = former
            return [f"undone: its error was {after:.3g}, {before:.3g} without"]
        return []

    def _put_beside(self, stage: LowRankChange) -> list[str]:
        slot, quantizer, layer = self.layer.slot, self.layer.quantizer, self.layer
        if not isinstance(slot, LayerSlot):
            return ["left as it is: a low-rank product is for layers with one weight"]
        if layer.beside is not None:
            return ["left as it is: the layer has a low-rank product already"]
        former, numbers, real = layer.rounded, layer.numbers(), layer.weight
        before = self._error(layer.quantized() if former is None else former)
        up, down, rounded = stage.terms(layer, self.data)
        slot.module.set_low_rank(up, down)
        beside = layer.beside = beside_of(slot)
        assert beside is not None
        layer.weight = real - beside
        if rounded is None:
            self._change_weight(layer.weight)
        else:
            self.take(rounded)
        after = self._error(layer.quantized() if rounded is None else rounded, layer.beside)
        if self.keep == "best" and before is not None and after is not None and not after <= before:
            slot.module.set_low_rank(None)
            layer.beside = None
            self._change_weight(real)
            if numbers:
                quantizer.set_numbers(**numbers)
            layer.rounded = former
            return [f"undone: its error was {after:.3g}, {before:.3g} without"]
        return []

    def _add_bias(self, stage: BiasChange) -> list[str]:
        held = bias_of(self.layer.slot)
        if held is None:
            return ["left as it is: the layer has no bias to correct"]
        change = stage.bias(self.layer, self.data)
        by_row = change.view(*self.layer.weight.shape[:2], 1)
        add_to_output(held, self._where_known(by_row, torch.zeros_like(by_row)).flatten())
        return []

    def _where_known(self, new: Tensor, former: Tensor) -> Tensor:
        """Return the new weight; the former one where too little is known of the inputs."""
        is_known = self.data.is_known
        return new if is_known is None else torch.where(is_known, new, former)

    @cached_property
    def nearest_error(self) -> float | None:
        """Compute the error of rounding the real weight to nearest; see `_error`."""
        return self._error(self.nearest, self.was_beside)

    @cached_property
    def _signal(self) -> float:
        return float(self.data.error(self.real, torch.zeros_like(self.real)).sum())

    def _error(self, rounded: Tensor, beside: Tensor | None = None) -> float | None:
        """Compute the mean squared error of the outputs over their mean square; None if no inputs are known."""
        if "gram" not in self.data.wanted or not self.data.n:
            return None
        if not bool(self.data.gram.isfinite().all()):
            return None
        target = self.data.corrected(self.real) if "cross_gram" in self.data.wanted else self.real
        found = float(self.data.error(target if beside is None else target - beside, rounded).sum())
        return found / self._signal if self._signal > 0 else 0.0

    def commit(self) -> bool:
        """Set the layer's weight to the chosen levels; the quantizer of a layer without a change is unpinned again.

        Returns whether levels have been chosen.
        """
        if self.layer.rounded is not None:
            self.layer.slot.commit(self.layer.rounded)
        elif not self.is_changed and not self.was_pinned:
            self.layer.quantizer.unpin()
        return self.layer.rounded is not None


def beside_of(slot: WeightSlot) -> Tensor | None:
    """Return the weight that the low-rank product of a layer stands for, as `rows`; None without one."""
    low_rank = slot.module.low_rank if isinstance(slot, LayerSlot) else None
    return None if low_rank is None else _wide(low_rank.product().detach().reshape(slot.rows().shape))


def _wide(weight: Tensor) -> Tensor:
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))


def bias_of(slot: WeightSlot) -> tuple[Tensor, Tensor | None] | None:
    """Return the bias after the weight, and the size of one unit of the layer's output in it; None if there is none."""
    bn = slot.module.bn if isinstance(slot, LayerSlot) else None
    if bn is not None and bn.bias is not None:
        return bn.bias, None if slot.module.fold_mode is not None else running_factor(bn)
    return None if slot.bias is None else (slot.bias, None)


@torch.no_grad()
def add_to_output(held: tuple[Tensor, Tensor | None], change: Tensor) -> None:
    """Add a change, (C,), to each output channel, by the bias and the unit that `bias_of` returned."""
    bias, factor = held
    bias.add_((change if factor is None else change * factor).to(bias))
