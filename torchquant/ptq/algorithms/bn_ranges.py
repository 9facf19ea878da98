"""Ranges of activations from batch norms."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from torchquant._arguments import Positive
from torchquant.graph.recording import call_with, undisturbed
from torchquant.ptq.moments import MomentsRun
from torchquant.ptq.stage import PTQ, ModelStage
from torchquant.ptq.structure import example_for
from torchquant.qmodule import QModuleState
from torchquant.qmodule.state import ACTIVATIONS
from torchquant.quantizers import Quantizer
from torchquant.utils import qmodule_state, qmodules


@PTQ.register("bn_ranges")
class BatchNormRanges(ModelStage):
    """Set the ranges of activations to their mean by the batch norm, plus and minus so many deviations.

    Means and variances are carried on through sums, pools and layers without a batch norm; inputs of the model are
    taken for standard normal. Where nothing is known, the range is that of one forward on noise, and the report says
    so.
    """

    changes = "ranges"
    source = "Nagel et al. 2019, arXiv:1906.04721, section 5"
    when = "instead of calibrate, where there is no data"
    cost = "a forward pass"

    def __init__(self, deviations: Positive = 6.0) -> None:
        self.deviations = deviations

    def run(self, model: nn.Module, batches: list[Any]) -> str:
        run, guessed, n = MomentsRun(model, self.deviations), list[str](), 0

        def observe(path: str, original: Callable[..., None], x: Tensor) -> None:
            nonlocal n
            known = run.of(x)
            if known is None:
                guessed.append(path)
            n += 1
            original(x if known is None else torch.stack([known.low.amin(), known.high.amax()]))

        state = QModuleState.CALIBRATION
        with torch.no_grad(), qmodule_state(model, state), undisturbed(model, False), _observing(model, observe), run:
            call_with(model, run.begin(example_for(model, batches)))
        note = f"{n} ranges of {self.deviations:g} deviations"
        return note + (f"; from noise, as nothing is known of them: {', '.join(guessed)}" if guessed else "")


@contextmanager
def _observing(model: nn.Module, observe: Callable[[str, Callable[..., None], Tensor], None]) -> Iterator[None]:
    """Call `observe(path, its own method, x)` instead of `pre_observe` of every quantizer of activations."""
    changed: list[Quantizer] = []
    try:
        for path, module in qmodules(model):
            for name, quantizer in module.quantizers().items():
                if name in ACTIVATIONS and "pre_observe" not in quantizer.__dict__:
                    own = quantizer.pre_observe

                    def instead(x: Tensor, path: str = path, own: Any = own, **more: Any) -> None:
                        observe(path, own, x)

                    quantizer.__dict__["pre_observe"] = instead
                    changed.append(quantizer)
        yield
    finally:
        for quantizer in changed:
            del quantizer.__dict__["pre_observe"]
