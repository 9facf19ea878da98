"""Rules for sums, products of each channel with a number, and norms: what scales channels, and what makes them one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchquant.ptq.channel_calls import CENTRED, FIXED, Call
from torchquant.ptq.channels import ALONE, NORMED, UNKNOWN, ZERO, along, compact, placed
from torchquant.ptq.ends import NormInput, Parameters, Scale

if TYPE_CHECKING:
    from torchquant.ptq.paths import Run


def joins(run: Run, call: Call) -> Tensor | None:
    """Make the numbers of two operands one: an addition."""
    operands = call.x, call.get(1, "other")
    for parameter, number in (operands, operands[::-1]):
        held = run.parameter(parameter)
        if held is not None and isinstance(number, int | float) and call.name == "add" and "alpha" not in call.kwargs:
            scale = run.end(Scale, (held,), held.numel(), f"a scale plus {number:g}", offset=float(number))
            run.scales[call.result] = scale
            return scale.ids.view(held.shape)
    found = []
    for value in operands:
        if isinstance(value, Tensor):
            ids = run.ids_of(value)
            found.append(torch.zeros(value.shape, dtype=torch.int64) if ids is None else ids)
        else:
            found.append(torch.tensor(UNKNOWN if value else ZERO))
    joined = run.channels.join(found[0], found[1], f"added to what no layer can scale, {run.where}")
    run.note(joined, FIXED)
    return joined


def multiplies(run: Run, call: Call) -> Tensor | None:
    """Follow one factor of a product; the other one cannot change.

    Channels begin at a parameter where those of the other factor can no longer be scaled, as behind a norm.
    """
    operands = call.x, call.get(1, "other")
    if operands[0] is operands[1]:
        return _squared(run, call)
    ids = [run.ids_of(value, parameters=False) for value in operands]
    for i, value in enumerate(operands):
        other = ids[1 - i]
        if run.is_scale(value) and (other is None or run.channels.are_stopped(other)):
            own = run.scale_of(value).ids.view(value.shape).expand(call.result.shape)
            if other is not None:
                run.channels.link(other.expand(own.shape), own)
            run.note(own if other is None else None, ALONE)
            return _times(run, call, own, 1.0)
    first = 0 if ids[1] is None else 1
    if ids[0] is not None and ids[1] is not None:
        run.stop(call, operands[0])
    return _times(run, call, ids[first], operands[1 - first])


def divides(run: Run, call: Call) -> Tensor | None:
    """Follow what is divided."""
    divisor = call.get(1, "other")
    run.stop(call, divisor)
    return (
        run.stop(call, call.x) if call.kwargs.get("rounding_mode") else _times(run, call, run.ids_of(call.x), divisor)
    )


def _times(run: Run, call: Call, ids: Tensor | None, factor: Any) -> Tensor | None:
    if ids is None:
        return None
    ids = ids.expand(call.result.shape)
    run.note(ids, FIXED)
    if isinstance(factor, Tensor):
        steps = factor.expand(ids.shape).stride()
        varying = [dim for dim, size in enumerate(compact(ids).shape) if size > 1]
        alike = [dim for dim in varying if steps[dim] == 0]
        if not alike:
            run.note(ids, ALONE)
        elif alike != varying:
            run.channels.confine(ids, alike)
    return ids


def squares(run: Run, call: Call) -> Tensor | None:
    """Follow squares as far as their mean, which a norm takes; other powers end the path."""
    exponent = 2 if call.name == "square" else call.get(1, "exponent")
    return _squared(run, call) if isinstance(exponent, int | float) and exponent == 2 else run.stop(call)


def _squared(run: Run, call: Call) -> Tensor | None:
    ids = run.ids_of(call.x)
    if ids is None:
        return None
    run.note(ids, NORMED, run.read_by(call))
    fresh = run.channels.again(ids)
    run.note(fresh, NORMED, run.read_by(call))
    run.squares[call.result] = True
    return fresh


def norm(run: Run, call: Call) -> Tensor | None:
    """End the path in a norm, and begin one at its scale and shift."""
    ids = run.ids_of(call.x)
    weight, bias = call.get(2, "weight"), None if call.name == "rms_norm" else call.get(3, "bias")
    if call.name == "group_norm":
        run.stop(call, call.x)
        return _scaled_and_shifted(run, call, weight, bias, 1)
    if ids is not None:
        run.note(ids, NORMED, run.read_by(call))
        run.channels.confine(ids, [-1 - i for i in range(len(call.get(1, "normalized_shape")))])
        run.note(ids if call.name == "layer_norm" else None, CENTRED)
    if weight is None:
        if ids is not None:
            run.note(fresh := run.channels.again(ids), NORMED, run.read_by(call))
        return None if ids is None else fresh
    own = _scaled_and_shifted(run, call, weight, bias, None)
    if own is not None and ids is not None:
        run.channels.link(ids, own)
    run.note(ids if own is None else own if ids is None else None, ALONE)
    return own


def batch_norm(run: Run, call: Call) -> Tensor | None:
    """A batch norm in evaluation: what it reads can be scaled, and what it gives."""
    mean, variance, weight, bias = (
        call.get(i, name) for i, name in enumerate(("running_mean", "running_var", "weight", "bias"), 1)
    )
    ids = run.ids_of(call.x)
    if ids is not None:
        taken = along(ids, 1)
        if call.get(5, "training", False) or mean is None or taken is None:
            run.stop(call, call.x)
        else:
            tensors = (mean, variance, *(() if weight is None else (weight,)))
            end = run.end(NormInput, tensors, len(mean), "norm", eps=call.get(7, "eps", 1e-5))
            run.note(end.ids, FIXED)
            run.note(end.ids, ALONE)
            run.channels.join(taken, end.ids, f"its input has channels that no layer can scale, {run.where}")
    return _scaled_and_shifted(run, call, weight, bias, 1)


def _scaled_and_shifted(run: Run, call: Call, weight: Any, bias: Any, axis: int | None) -> Tensor | None:
    if weight is None or not all(run.is_weight(t) for t in (weight, bias) if t is not None):
        return None
    end = run.end(Scale, (weight,) if bias is None else (weight, bias), weight.numel(), "norm", bias=bias)
    if axis is None:
        return end.ids.view(weight.shape).expand(call.result.shape)
    run.note(end.ids, ALONE)
    return placed(end.ids, axis, call.result.shape)


def embedding(run: Run, call: Call) -> Tensor | None:
    """Begin a path at a table of embeddings."""
    table = call.get(1, "weight")
    if not run.is_weight(table):
        return None
    return run.end(Parameters, (table,), table.shape[1], "embedding").ids.expand(call.result.shape)
