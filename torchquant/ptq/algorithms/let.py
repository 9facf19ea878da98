"""The learned equivalent transformation of OmniQuant."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from torchquant._arguments import Count, Positive
from torchquant._tensors import channel_view
from torchquant.ptq.functional.input_scales import smooth_candidates
from torchquant.ptq.readers import Readers
from torchquant.ptq.shifted_scale import ShiftedScale
from torchquant.ptq.stage import PTQ, InputStage
from torchquant.qmodule import ChannelScale, InputTransform
from torchquant.range_observers._distributed import reduce_sum


@PTQ.register("let")
class LearnedEquivalentTransformation(InputStage):
    """Learn by gradients what each input channel is divided by, and what is taken off it before.

    Weights are multiplied, and biases make good the shift, so that the float function stays. Learning starts from the
    best scales of SmoothQuant; `steps` of Adam at `rate` lower the output error of all layers that read the value, with
    weights and inputs rounded, and the best ones on the way are kept. `shift`: whether inputs are shifted, where the
    norm or layer that gives the channels has a bias and all readers have one. `fold`: as in `smoothquant`; without it
    nothing is shifted. Deviation: the paper lowers the error of a block's output.
    """

    source = "Shao et al. 2023, arXiv:2308.13137, section 3.3"
    when = "in place of smoothquant, where channels have means of their own; slower"
    cost = "42 rows K n, 3 rows K n for each step"

    def __init__(self, steps: Count = 100, rate: Positive = 1e-2, shift: bool = True, fold: bool = True) -> None:
        self.steps, self.rate, self.shift, self.fold = steps, rate, shift, fold

    def candidates(self, readers: Readers) -> Iterable[tuple[str, InputTransform]]:
        middle = readers.input_middle()
        shifts = [torch.zeros_like(middle), *([middle] if self.shift and readers.can_shift else [])]
        scales = [s for _, s in smooth_candidates(readers.input_max(), readers.weight_max())]
        starts = [(s, d) for d in shifts for s in scales]
        errors = [readers.error(_transform(readers, *start)) for start in starts]
        start = starts[errors.index(min(errors))]
        yield "scales of the start", _transform(readers, *start)
        yield f"learned in {self.steps} steps", _transform(readers, *self._learned(readers, *start))

    def _learned(self, readers: Readers, scales: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """Return the best scales and shift on the way from a start."""
        unit = readers.input_max().clamp_min(1e-5)
        logs, share = scales.log().requires_grad_(), (shift / unit).requires_grad_()
        shifts = self.shift and readers.can_shift
        learned = [logs, share] if shifts else [logs]
        optimizer = torch.optim.Adam(learned, self.rate)
        best, least = (scales, shift), torch.inf
        for _ in range(self.steps + 1):
            with torch.enable_grad():
                s, d = readers.shared(logs.exp(), "mean"), readers.shared(share * unit, "mean")
                at = [channel_view(each, -readers.axis, 0) for each in (s, d)]
                loss = readers.loss(
                    lambda x, at=at: (x - at[1]) / at[0],  # type: ignore[misc]
                    lambda w, s=s: w * s,  # type: ignore[misc]
                    d if shifts else None,
                )
                gradients = torch.autograd.grad(loss, learned)
            if (now := float(reduce_sum(loss.detach()))) < least:
                best, least = (s.detach(), d.detach()), now
            for parameter, gradient in zip(learned, gradients, strict=True):
                parameter.grad = reduce_sum(gradient)
            optimizer.step()
        return best


def _transform(readers: Readers, scales: Tensor, shift: Tensor) -> InputTransform:
    if not bool(shift.any()):
        return ChannelScale(1.0 / scales, readers.axis)
    return ShiftedScale(1.0 / scales, shift, readers.axis)
