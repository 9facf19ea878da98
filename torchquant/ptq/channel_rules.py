"""Rules for each operator: it keeps, moves, joins or ends numbers of channels.

A rule is a function of the run and a call: it returns the numbers of the result, or None where the path ends. It is
found by the name of the operator in the table of `graph/operators.py`, or by the name of the function.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from torchquant.ptq.channel_calls import BOUNDED, FIXED, POSITIVE, Call, Rule
from torchquant.ptq.channel_scales import batch_norm, divides, embedding, joins, multiplies, norm, squares
from torchquant.ptq.channels import STOP, UNKNOWN, ZERO, along, placed, reduced, repeated
from torchquant.ptq.ends import Columns, Rows

if TYPE_CHECKING:
    from torchquant.ptq.paths import Run


def keeps(*notes: str) -> Rule:
    """Make the rule of an operator that commutes with a factor of each element."""

    def rule(run: Run, call: Call) -> Tensor | None:
        if not notes and run.parameter(call.x) is not None:
            run.copied(call.x, call.result)
            return None
        ids = run.ids_of(call.x)
        for note in notes:
            run.note(ids, note)
        return ids

    return rule


def moves(run: Run, call: Call) -> Any:
    """Run the operator on the numbers."""

    def numbers(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        ids = run.ids_of(value)
        return torch.zeros((), dtype=torch.int64).expand(value.shape) if ids is None else ids.view_as(ids)

    args, kwargs = tree_map_only(Tensor, numbers, (call.args, call.kwargs))
    if call.name == "pad":
        run.note(run.ids_of(call.x), FIXED)
        is_zero = call.get(2, "mode", "constant") == "constant" and not call.get(3, "value", 0)
        return _padded(call, args[0], ZERO if is_zero else UNKNOWN)
    of_any_layout: dict[str, Callable[..., Any]] = {"view": Tensor.reshape, "view_as": Tensor.reshape_as}
    function = of_any_layout.get(call.function.__name__, call.function)
    return tree_map_only(Tensor, repeated, function(*args, **kwargs))


def _padded(call: Call, ids: Tensor, outside: int) -> Tensor:
    if call.get(2, "mode", "constant") == "constant":
        return torch.nn.functional.pad(ids, call.get(1, "pad"), "constant", outside)
    return call.function(ids.double(), *call.args[1:], **call.kwargs).long()


def pools(*notes: str) -> Rule:
    """Make the rule of an operator on the axes behind the channels."""

    def rule(run: Run, call: Call) -> Tensor | None:
        ids = run.ids_of(call.x)
        if ids is None:
            return None
        rank = re.search(r"(\d)d", getattr(call.function, "__name__", ""))
        n = int(rank.group(1)) if rank else ids.ndim - 2
        found = reduced(ids, list(range(ids.ndim - n, ids.ndim)))
        if found is None:
            return run.stop(call)
        for note in notes:
            run.note(ids, note)
        return found.expand(call.result.shape)

    return rule


def reduces(*notes: str) -> Rule:
    """Make the rule of a mean, sum or largest value over axes."""

    def rule(run: Run, call: Call) -> Tensor | None:
        ids = run.ids_of(call.x)
        if ids is None:
            return None
        dims = call.get(1, "dim")
        if isinstance(dims, Tensor):  # the larger of two
            run.note(run.ids_of(call.x), POSITIVE)
            return joins(run, call)
        listed = list(range(ids.ndim)) if dims is None else [dims] if isinstance(dims, int) else list(dims)
        listed = [dim % ids.ndim for dim in listed]
        if call.x in run.squares and call.name in ("mean", "sum"):
            run.channels.confine(ids, listed)
            return None
        found = reduced(ids, listed)
        if found is None:
            return run.stop(call)
        for note in notes:
            run.note(ids, note)
        return found if found.ndim == call.result.ndim else found.squeeze(listed)

    return rule


def matrix_products(run: Run, call: Call) -> Tensor | None:
    """Follow the right operand of a product of two values along its last axis, and a weight stored (in, out)."""
    a, b = call.x, call.get(1, "other", call.kwargs.get("mat2"))
    if run.is_weight(b) and b.ndim == 2:
        return product(run, call, a, b, None, Layout(swapped=True))
    ids = run.ids_of(b)
    run.stop(call, a)
    found = None if ids is None or ids.ndim < 2 else reduced(ids, [ids.ndim - 2])
    if found is None:
        return run.stop(call, b)
    run.note(found, FIXED)
    run.channels.confine(found, [-1])
    return found.expand(call.result.shape)


def attention(run: Run, call: Call) -> Tensor | None:
    """Follow the values of an attention; queries and keys end in its softmax."""
    for i, name in enumerate(("query", "key")):
        run.stop(call, call.get(i, name))
    value = call.get(2, "value")
    ids = run.ids_of(value)
    found = None if ids is None else reduced(ids, [ids.ndim - 2])
    if found is None:
        return run.stop(call, value)
    run.channels.confine(found, [-1])
    repeats = call.result.shape[-3] // found.shape[-3] if found.ndim > 2 and found.shape[-3] > 1 else 1
    return (found.repeat_interleave(repeats, -3) if repeats > 1 else found).expand(call.result.shape)


@dataclass(frozen=True)
class Layout:
    """How a product stores its weight: (out, in / groups, ...), or swapped, (in, out / groups, ...)."""

    groups: int = 1
    swapped: bool = False
    is_padded: bool = False
    axis: int = -1


def product(run: Run, call: Call, x: Tensor, weight: Tensor, bias: Tensor | None, layout: Layout) -> Tensor | None:
    """End the path of the input in the columns of the weight, and begin one at its rows."""
    ids = run.ids_of(x)
    if not run.is_weight(weight):
        return run.stop(call)
    family = f"the weight of a product{' stored (in, out)' if layout.swapped else ''} in {layout.groups} groups"
    sides = {"groups": layout.groups, "bias": bias}
    n = weight.shape[0], weight.shape[1] * layout.groups
    n_rows, n_columns = (n[1], n[0]) if layout.swapped else n
    tensors = (weight,) if bias is None else (weight, bias)
    if ids is not None:
        taken = along(ids, layout.axis)
        if taken is None:
            run.stop(call, x)
        else:
            columns = run.end(
                Columns, tensors, n_columns, family, first=layout.swapped, is_padded=layout.is_padded, **sides
            )
            run.channels.join(taken, columns.ids, f"its input has channels that no layer can scale, {run.where}")
    rows = run.end(Rows, tensors, n_rows, family, first=not layout.swapped, **sides)
    if bias is not None and not run.is_weight(bias):
        run.note(rows.ids, STOP, f"its bias is computed, {run.where}")
    return placed(rows.ids, layout.axis, call.result.shape)


def linear(run: Run, call: Call) -> Tensor | None:
    """Follow a product with a weight (out, in)."""
    return product(run, call, call.x, call.get(1, "weight"), call.get(2, "bias"), Layout())


def addmm(run: Run, call: Call) -> Tensor | None:
    """Follow a product with a weight (in, out)."""
    if call.kwargs.get("beta", 1) != 1 or call.kwargs.get("alpha", 1) != 1:
        return run.stop(call)
    return product(run, call, call.get(1, "mat1"), call.get(2, "mat2"), call.x, Layout(swapped=True))


def convolution(run: Run, call: Call) -> Tensor | None:
    """Follow a convolution, transposed or not."""
    weight, swapped = call.get(1, "weight"), "transpose" in call.name
    n = weight.ndim - 2
    padding = call.get(4, "padding", 0)
    groups = call.get(6, "groups", 1)
    is_padded = padding not in (0, "valid") and (isinstance(padding, str) or any(torch.tensor(padding).flatten()))
    return product(
        run, call, call.x, weight, call.get(2, "bias"), Layout(groups, swapped, is_padded or swapped, -n - 1)
    )


def bounds_of(call: Call) -> tuple[Any, Any]:
    """Return the lower and the upper bound of a clamp, None without one."""
    if call.name == "relu":
        return 0.0, None
    if call.name == "relu6":
        return 0.0, 6.0
    if call.name == "hardtanh":
        return call.get(1, "min_val", -1.0), call.get(2, "max_val", 1.0)
    return call.get(1, "min"), call.get(2, "max")


def bounds(run: Run, call: Call) -> Tensor | None:
    """Follow a clamp from 0 on, as of a ReLU; a factor would move an upper bound."""
    ids = run.ids_of(call.x)
    low, high = bounds_of(call)
    if ids is None or low != 0 or isinstance(high, Tensor):
        return run.stop(call)
    run.note(ids, POSITIVE)
    if high is not None and high != math.inf:
        run.channels.note(ids, BOUNDED, run.activation(high))
    return ids


def ends(run: Run, call: Call) -> None:
    """End all paths: an operator with its operands swapped."""
    run.stop(call)


def assigns(run: Run, call: Call) -> None:
    """An assignment to a part of a tensor: it may be read through any view of it."""
    run.stop(call, call.args[0])
    run.stop(call, call.args[-1])


RULES: dict[str, Rule] = {
    **dict.fromkeys(("identity", "clone", "to", "contiguous", "dropout", "half", "bfloat16", "double"), keeps()),
    **dict.fromkeys(("relu", "leaky_relu", "prelu"), keeps(POSITIVE)),
    "neg": keeps(FIXED),
    "abs": keeps(POSITIVE, FIXED),
    **dict.fromkeys(
        (
            *("reshape", "transpose", "squeeze", "expand", "repeat", "slice", "gather", "roll", "split", "pad"),
            *("cat", "stack", "pixel_shuffle", "__get__"),
        ),
        moves,
    ),
    "max_pool": pools(POSITIVE),
    "adaptive_max_pool": pools(POSITIVE),
    "avg_pool": pools(FIXED),
    "adaptive_avg_pool": pools(),
    "interpolate": pools(),
    "mean": reduces(),
    "sum": reduces(FIXED),
    "max": reduces(POSITIVE, FIXED),
    "add": joins,
    "sub": joins,
    "subtract": joins,
    "mul": multiplies,
    "multiply": multiplies,
    "div": divides,
    "divide": divides,
    **dict.fromkeys(("pow", "__pow__", "square"), squares),
    "matmul": matrix_products,
    "attention": attention,
    "linear": linear,
    "addmm": addmm,
    **{f"conv{kind}{n}d": convolution for kind in ("", "_transpose") for n in (1, 2, 3)},
    **dict.fromkeys(("layer_norm", "group_norm", "rms_norm"), norm),
    "batch_norm": batch_norm,
    "embedding": embedding,
    **dict.fromkeys(("relu6", "hardtanh", "clamp"), bounds),
    "__setitem__": assigns,
    "copy_": assigns,
    **dict.fromkeys(("__rdiv__", "__rtruediv__", "__rmatmul__", "norm"), ends),
}
"""Name of an operator -> its rule."""
