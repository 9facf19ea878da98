"""A tensor that acts as a real one and carries integers, so that a model's own forward runs on them.

`operators.py` registers a handler for each operator; an operator without a handler gets the real numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from torchquant.deploy.integer.context import IntegerRun, current_run
from torchquant.deploy.integer.values import Clamp, Codes, Value
from torchquant.errors import ConfigError, ExportError, NameClashError
from torchquant.graph.operator_table import Operator, writes_by_name
from torchquant.graph.operators import OPERATORS

LARGEST_STEP = 2.0**24
"""Number of steps from 0 at which real numbers are saturated before they become integers."""


class IntegerTensor(Tensor):
    """Acts as the real float32 tensor that `value` represents, after the clamp if there is one."""

    value: Value
    clamp_to: Clamp | None

    @staticmethod
    def __new__(cls, value: Value, shape: torch.Size, clamp: Clamp | None = None) -> IntegerTensor:
        made = torch.full((), torch.nan).expand(shape).as_subclass(cls)  # NaN shows a function that bypasses `run_op`
        made.value = value
        made.clamp_to = clamp
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"IntegerTensor({type(self.value).__name__}, shape={tuple(self.shape)})"

    @property
    def codes(self) -> Codes | None:
        """The value, if it is on a grid with one scale, else None."""
        value = self.value if self.clamp_to is None else None
        return value if isinstance(value, Codes) and value.scale.ndim == 0 else None

    def real(self) -> Tensor:  # type: ignore[override]
        """The plain float32 tensor."""
        found = self.value.real()
        return found if self.clamp_to is None else found.clamp(*self.clamp_to)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run_op(func, args, kwargs or {})


Handler = Callable[..., Any]
HANDLERS: dict[str, Handler] = {}
"""Name of an operator -> its handler."""
ALIASES = {"axis": "dim", "keepdims": "keepdim"}


def register_integer(*names: str) -> Callable[[Handler], Handler]:
    """Register a function as the handler of operators. Raises ConfigError for a name that is not in the table."""

    def enter(handler: Handler) -> Handler:
        for name in names:
            if name not in OPERATORS:
                raise ConfigError(f"there is no operator '{name}'; add it with torchquant.graph.register_operator")
            if HANDLERS.setdefault(name, handler) is not handler:
                raise NameClashError(f"the operator '{name}' has an integer handler already; register each name once")
        return handler

    return enter


def handler_of(operator: Operator) -> Handler | None:
    """Return the integer handler of an operator, None if it has none."""
    return HANDLERS.get(operator.name, moved if operator.role == "passes" else None)


def run_op(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Run a torch function on arguments with an `IntegerTensor`, on integers if possible, else on real numbers."""
    name = getattr(func, "__name__", "")
    is_property = name == "__get__"
    name = func.__self__.__name__ if is_property else name
    operator = OPERATORS.of(name if is_property else func)
    if name == "__hash__" or (operator is not None and operator.role == "shape"):
        with _plainly():
            return func(*args, **kwargs)
    kwargs = {ALIASES.get(key, key): value for key, value in kwargs.items()}
    args = (*(kwargs.pop(key) for key in ("input", "tensors") if key in kwargs), *args)
    if writes_into(name) and isinstance(args[0], IntegerTensor):
        raise ExportError(
            f"{current_run().site}: the model writes into a quantized tensor behind it ({name}), which the integer "
            "reference cannot do. Use the operator that returns a new tensor"
        )
    handler = None if operator is None or is_property else handler_of(operator)
    is_reflected = name.startswith("__r") and handler is not None  # x.__rsub__(y) is y - x
    found = NotImplemented if handler is None else handler(func, *(args[::-1] if is_reflected else args), **kwargs)
    if found is not NotImplemented:
        return found
    if handler is not moved:
        current_run().note_float(name)
    real_args, real_kwargs = tree_map_only(IntegerTensor, IntegerTensor.real, (tuple(args), kwargs))
    return func(*real_args, **real_kwargs)


def writes_into(name: str) -> bool:
    """Tell whether an operator of that name changes its first argument in place."""
    return name == "__setitem__" or writes_by_name(name)


def _plainly() -> AbstractContextManager[Any]:
    """Disable `__torch_function__`."""
    return torch._C.DisableTorchFunctionSubclass()


def codes_of(x: Any) -> Codes | None:
    """Return the value of a tensor on a grid with one scale; None for anything else."""
    return x.codes if isinstance(x, IntegerTensor) else None


def made(value: Value, like: Tensor) -> IntegerTensor:
    """Wrap a value as a tensor of the shape of `like`."""
    return IntegerTensor(value, like.shape)


def on_codes(x: IntegerTensor, f: Callable[[Tensor], Any]) -> Any:
    """Apply `f` to the integers; the results are on the same grid. f may return a tuple of tensors."""
    value = codes_of(x)
    if value is None:
        return NotImplemented
    found = f(value.ints.to(torch.float64))
    if isinstance(found, Tensor):
        return made(replace(value, ints=found.to(torch.int64)), found)
    return type(found)(made(replace(value, ints=part.to(torch.int64)), part) for part in found)


def moved(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """Apply an operator that passes values on to the integers; the result is on the same grid."""
    if not isinstance(x, IntegerTensor) or kwargs.get("return_indices"):
        return NotImplemented
    return on_codes(x, lambda ints: func(ints, *args, **kwargs))


def quantized(run: IntegerRun, site: str, grid: Any, x: Tensor) -> IntegerTensor:
    """Quantize x to a grid (`StoredGrid`). Real numbers are rounded as QuantizeLinear rounds them."""
    run.site = site
    scale, zero_point = grid.shaped(x.dim())
    low, high = torch.full_like(zero_point, grid.qmin), torch.full_like(zero_point, grid.qmax)
    if isinstance(x, IntegerTensor):
        value: Any = x.value
        codes = value.codes() if _lies_on(x, scale, zero_point) else value.on_grid(scale, zero_point, run.rounding)
        bounds = x.clamp_to or (None, None)
        if bounds[0] is not None:
            low = torch.maximum(low, torch.round(bounds[0] / scale).to(torch.int64) + zero_point)
        if bounds[1] is not None:
            high = torch.minimum(high, torch.round(bounds[1] / scale).to(torch.int64) + zero_point)
    else:
        steps = torch.round(x.to(torch.float32) / scale.to(torch.float32))
        steps = steps.clamp(-LARGEST_STEP, LARGEST_STEP)
        codes = steps.to(torch.int64) + zero_point
    codes = torch.minimum(torch.maximum(codes, low), high)

    def steps_before() -> Tensor:
        exact = x.value.exact() if isinstance(x, IntegerTensor) else x.to(torch.float64)
        return torch.minimum(torch.maximum(exact / scale + zero_point, low.double()), high.double())

    codes = run.noted(site, codes, steps_before)
    limit = max(int((grid.qmax - zero_point).max()), int((zero_point - grid.qmin).max()))
    return IntegerTensor(Codes(codes - zero_point, scale, zero_point, limit, site), x.shape)


def _lies_on(x: IntegerTensor, scale: Tensor, zero_point: Tensor) -> bool:
    value = x.value
    if not isinstance(value, Codes) or value.scale.shape != scale.shape:
        return False
    return torch.equal(value.scale, scale) and torch.equal(value.zero_point, zero_point)
