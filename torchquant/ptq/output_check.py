"""Whether the changes of biases bring the output of a whole model nearer to the float one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from torchquant.ptq.block_pass import prediction
from torchquant.ptq.padding import Padding
from torchquant.ptq.ranks import errors_on_all_ranks
from torchquant.range_observers._distributed import reduce_sum

Calls = Iterable[tuple[Callable[[], object], Callable[[], object], Padding]]
"""The calls of the quantized and of the float model on each batch, and its padding."""


@torch.no_grad()
def undone_if_worse(biases: Sequence[tuple[Tensor, Tensor]], calls: Calls) -> str:
    """Put the former biases back if the output of the model is nearer to the float one with them; "" if it is not.

    biases: each bias, with a copy of what it was. The mean of a layer's output is nearer to the float one with the new
    bias, always; but a mean over tokens is that of the few largest, and later layers may read the others. Returns what
    was found.
    """
    changed = [bias.clone() for bias, _ in biases]
    former = [copied for _, copied in biases]
    errors = torch.zeros(3, dtype=torch.float64)
    with errors_on_all_ranks():
        for now, floats, padding in calls:
            wanted = _judged(floats(), padding)
            for i, values in enumerate((changed, former)):
                _put(biases, values)
                errors[i] += float((_judged(now(), padding) - wanted).square().sum())
            errors[2] += float(wanted.square().sum())
    after, before, signal = reduce_sum(errors).tolist()
    if after <= before:
        _put(biases, changed)
        return ""
    _put(biases, former)
    unit = signal if signal > 0 else 1.0
    return (
        f"undone: the error of the model's output was {after / unit:.3g} with all of them, {before / unit:.3g} without"
    )


def _put(biases: Sequence[tuple[Tensor, Tensor]], values: Sequence[Tensor]) -> None:
    for (bias, _), value in zip(biases, values, strict=True):
        bias.copy_(value)


def _judged(result: object, padding: Padding) -> Tensor:
    """Return what the model predicts, without tokens that are padding."""
    found = prediction(result).double()
    masks = (padding.decoder_tokens, padding.tokens)
    mask = next((m for m in masks if m is not None and m.shape == found.shape[:2]), None)
    return found if mask is None else found[mask]
