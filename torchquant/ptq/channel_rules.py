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

from torchquant.ptq.channels import STOP, UNKNOWN, ZERO, along, placed, reduced, repeated
from torchquant.ptq.ends import Columns, NormInput, Parameters, Rows

if TYPE_CHECKING:
    from torchquant.ptq.paths import Run

POSITIVE = "positive"
"""Note: the factor must be positive."""
FIXED = "fixed"
"""Note: what is added to a channel before the operator is not added to its result."""
BOUNDED = "bounded"
"""Note: values end at a bound that a factor would move; `where` is the activation, or "" for a function."""


@dataclass(frozen=True)
class Call:
    """A call of torch in a run. `result`: what it returned, or the first of several tensors."""

    function: Callable[..., Any]
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Tensor

    def get(self, i: int, name: str, default: Any = None) -> Any:
        """Return an argument by its place or name."""
        return self.args[i] if i < len(self.args) else self.kwargs.get(name, default)

    @property
    def x(self) -> Any:
        return self.get(0, "input")


Rule = Callable[["Run", Call], Any]


def keeps(*notes: str) -> Rule:
    """Make the rule of an operator that commutes with a factor of each element."""

    def rule(run: Run, call: Call) -> Tensor | None:
        ids = run.ids_of(call.x)
        for note in notes if ids is not None else ():
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
        found = reduced(ids, listed)
        if found is None:
            return run.stop(call)
        for note in notes:
            run.note(ids, note)
        return found if found.ndim == call.result.ndim else found.squeeze(listed)

    return rule


def joins(run: Run, call: Call) -> Tensor | None:
    """Make the numbers of two operands one: an addition."""
    found = []
    for value in (call.x, call.get(1, "other")):
        if isinstance(value, Tensor):
            ids = run.ids_of(value)
            found.append(torch.zeros(value.shape, dtype=torch.int64) if ids is None else ids)
        else:
            found.append(torch.tensor(UNKNOWN if value else ZERO))
    joined = run.channels.join(found[0], found[1], f"added to what no layer can scale, {run.where}")
    run.note(joined, FIXED)
    return joined


def multiplies(run: Run, call: Call) -> Tensor | None:
    """Follow one factor of a product; the other one cannot change. A parameter alone is what gives the channels."""
    factors = [run.ids_of(value, parameters=False) for value in (call.x, call.get(1, "other"))]
    if all(ids is not None for ids in factors):
        run.stop(call, call.x)
    ids = factors[1] if factors[1] is not None else factors[0]
    if ids is None:
        given = [run.ids_of(value) for value in (call.x, call.get(1, "other"))]
        ids = given[0] if given[0] is not None else given[1]
    return _times(run, call, ids)


def divides(run: Run, call: Call) -> Tensor | None:
    """Follow what is divided."""
    run.stop(call, call.get(1, "other"))
    return run.stop(call, call.x) if call.kwargs.get("rounding_mode") else _times(run, call, run.ids_of(call.x))


def _times(run: Run, call: Call, ids: Tensor | None) -> Tensor | None:
    if ids is None:
        return None
    run.note(ids, FIXED)
    return ids.expand(call.result.shape)


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


def norm(run: Run, call: Call) -> Tensor | None:
    """End the path in a norm, and begin one at its scale and shift."""
    run.stop(call, call.x)
    bias = None if call.name == "rms_norm" else call.get(3, "bias")
    return _scaled_and_shifted(run, call, call.get(2, "weight"), bias, 1 if call.name == "group_norm" else None)


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
            run.channels.join(taken, end.ids, f"its input has channels that no layer can scale, {run.where}")
    return _scaled_and_shifted(run, call, weight, bias, 1)


def _scaled_and_shifted(run: Run, call: Call, weight: Any, bias: Any, axis: int | None) -> Tensor | None:
    if weight is None or not all(run.is_weight(t) for t in (weight, bias) if t is not None):
        return None
    end = run.end(Parameters, (weight,) if bias is None else (weight, bias), weight.numel(), "norm", bias=bias)
    if axis is None:
        return end.ids.view(weight.shape).expand(call.result.shape)
    return placed(end.ids, axis, call.result.shape)


def embedding(run: Run, call: Call) -> Tensor | None:
    """Begin a path at a table of embeddings."""
    table = call.get(1, "weight")
    if not run.is_weight(table):
        return None
    return run.end(Parameters, (table,), table.shape[1], "embedding").ids.expand(call.result.shape)


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
