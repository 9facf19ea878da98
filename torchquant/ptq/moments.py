"""Follow what is known of each value without data, from batch norms and layers: its mean, variance and range.

One forward is followed, on noise. A batch norm gives the mean and the deviation of its output; a product with a weight
carries them on as if its inputs were independent; an activation changes them as those of a normal value.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from torchquant.graph.called import tensors_in
from torchquant.graph.operators import OPERATORS
from torchquant.ptq.channel_calls import Call
from torchquant.ptq.channel_rules import RULES, bounds_of, convolution, linear, moves
from torchquant.ptq.channels import placed
from torchquant.ptq.folding import statistics_of
from torchquant.ptq.functional.biases import clipped_normal_mean
from torchquant.ptq.functional.without_data import normal_ranges
from torchquant.qmodule.weight_slots import LayerSlot
from torchquant.utils import weight_slots

POINTS = torch.linspace(-5.0, 5.0, 101, dtype=torch.float64)
"""Points, in deviations, at which an activation is computed to find the moments of its result."""
LINEAR = ("avg_pool", "adaptive_avg_pool", "max_pool", "adaptive_max_pool", "mean", "interpolate")
"""Operators that are run on means, variances and ends of ranges alike: what they pool belongs together."""


@dataclass
class Moments:
    """Mean, variance and range of each element of a value, all of its shape."""

    mean: Tensor
    variance: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def normal(cls, mean: Tensor, variance: Tensor, deviations: float) -> Moments:
        """Make the moments of a normal value, and its range of so many deviations on each side."""
        variance = variance.clamp_min(0.0)
        return cls(mean, variance, *normal_ranges(mean, variance.sqrt(), deviations))

    def each(self, function: Callable[[Tensor], Any]) -> Moments:
        """Compute a linear function of all."""
        return Moments(*(function(part) for part in (self.mean, self.variance, self.low, self.high)))

    def activated(self, function: Callable[[Tensor], Tensor], clamp: tuple[Any, Any] | None = None) -> Moments:
        """Compute the moments of a function of each element. `clamp`: its bounds, if it is a clamp."""
        weights = torch.exp(-POINTS.square() / 2)
        deviation, mean, square = self.variance.sqrt(), torch.zeros_like(self.mean), torch.zeros_like(self.mean)
        for at, weight in zip(POINTS.tolist(), (weights / weights.sum()).tolist(), strict=True):
            value = function(self.mean + deviation * at)
            mean, square = mean + weight * value, square + weight * value.square()
        variance = (square - mean.square()).clamp_min(0.0)
        if clamp is not None:
            low, high = (-math.inf if clamp[0] is None else clamp[0]), (math.inf if clamp[1] is None else clamp[1])
            mean = clipped_normal_mean(self.mean, deviation, low, high)
        ends = [function(torch.lerp(self.low, self.high, step / 8)) for step in range(9)]
        return Moments(mean, variance, torch.stack(ends).amin(0), torch.stack(ends).amax(0))


class MomentsRun(TorchFunctionMode):
    """Follows the moments of values through one forward.

    `at_product(weight, function, mean)` is called at each product with the mean of its input; `function(x, weight)` is
    the product without a bias.
    """

    def __init__(
        self,
        model: nn.Module,
        deviations: float = 6.0,
        at_product: Callable[[Tensor, Callable[[Tensor, Tensor], Tensor], Tensor], None] | None = None,
    ) -> None:
        super().__init__()
        self.deviations, self.at_product = deviations, at_product
        self.known = WeakTensorKeyDictionary()
        self.statistics: dict[int, tuple[Tensor, Tensor]] = {}
        for slot in weight_slots(model):
            found = statistics_of(slot.module) if isinstance(slot, LayerSlot) else None
            if found is not None and slot.module.bn.weight is not None:
                self.statistics[slot.module.bn.weight.data_ptr()] = found

    def begin(self, inputs: Any) -> Any:
        """Copy inputs of the model; those of real numbers are taken for standard normal."""
        copied = tree_map_only(Tensor, lambda x: x.detach().clone(), inputs)
        for x in tensors_in(copied):
            if x.is_floating_point():
                self.known[x] = Moments.normal(torch.zeros_like(x), torch.ones_like(x), self.deviations)
        return copied

    def of(self, value: Any) -> Moments | None:
        """Return the moments of a value, if they are known."""
        found: Moments | None = self.known.get(value) if isinstance(value, Tensor) else None
        return found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [t for t in tensors_in((args, kwargs)) if t in self.known]
        operator, own = OPERATORS.of(func), getattr(func, "__name__", str(func))
        call = Call(func, own if own in RULES or operator is None else operator.name, args, kwargs, torch.empty(0))
        found = self._result(call, given) if given else None
        result = func(*args, **kwargs)
        outputs = [t for t in tensors_in(result) if t.is_floating_point()]
        for tensor in outputs:
            self.known.pop(tensor, None)
        for tensor, moments in zip(outputs, [found] if isinstance(found, Moments) else found or [], strict=False):
            if moments.mean.shape == tensor.shape:
                self.known[tensor] = moments
        return result

    def _result(self, call: Call, given: list[Tensor]) -> Any:
        rule, x = RULES.get(call.name), self.of(call.x)
        if rule in (linear, convolution):
            return None if x is None else self._product(call, x)
        if call.name == "batch_norm":
            return None if x is None else self._batch_norm(call, x)
        if rule is moves or call.name in ("stack", "cat"):
            return self._moved(call)
        if call.name in ("add", "sub", "subtract", "mul", "multiply"):
            return self._combined(call)
        if x is None or len(given) != 1:
            return None
        if call.name in LINEAR:
            return x.each(lambda part: next(iter(tree_leaves(call.function(part, *call.args[1:], **call.kwargs)))))
        if call.name in ("clone", "to", "identity", "dropout", "contiguous"):
            return x
        return self._activated(call, x)

    def _activated(self, call: Call, x: Moments) -> Moments | None:
        kwargs = {name: value for name, value in call.kwargs.items() if name != "inplace"}
        try:
            probe = call.function(x.mean.clone(), *call.args[1:], **kwargs)
        except (RuntimeError, TypeError):
            return None
        operator = OPERATORS.get(call.name)
        is_clamp = call.name in ("relu", "relu6", "hardtanh", "clamp")
        known = is_clamp or call.name == "prelu" or (operator is not None and operator.role == "activates")
        if not known or not isinstance(probe, Tensor) or probe.shape != x.mean.shape:
            return None
        return x.activated(
            lambda value: call.function(value.clone(), *call.args[1:], **kwargs), bounds_of(call) if is_clamp else None
        )

    def _product(self, call: Call, x: Moments) -> Moments:
        weight, bias, rest = call.get(1, "weight"), call.get(2, "bias"), call.args[3:]
        kwargs = {name: value for name, value in call.kwargs.items() if name not in ("weight", "bias", "input")}

        def product(value: Tensor, factor: Tensor, shift: Tensor | None = None) -> Tensor:
            made: Tensor = call.function(value, factor, shift, *rest, **kwargs)
            return made

        if self.at_product is not None:
            self.at_product(weight, product, x.mean)
        return Moments.normal(product(x.mean, weight, bias), product(x.variance, weight.square()), self.deviations)

    def _batch_norm(self, call: Call, x: Moments) -> Moments | None:
        mean, variance, weight, bias = (
            call.get(i, name) for i, name in enumerate(("running_mean", "running_var", "weight", "bias"), 1)
        )
        if weight is not None:
            center, deviation = self.statistics.get(weight.data_ptr(), (bias, weight))
            center = torch.zeros_like(deviation) if center is None else center
            shape = x.mean.shape
            return Moments.normal(
                placed(center.to(x.mean), 1, shape), placed(deviation.to(x.mean).square(), 1, shape), self.deviations
            )
        if mean is None:
            return None
        return Moments.normal(torch.zeros_like(x.mean), torch.ones_like(x.mean), self.deviations)

    def _moved(self, call: Call) -> Any:
        parts = []
        for name in ("mean", "variance", "low", "high"):

            def part(value: Tensor, name: str = name) -> Tensor:
                known = self.of(value)
                if known is not None:
                    found: Tensor = getattr(known, name)
                    return found
                return torch.zeros_like(value) if name == "variance" else value

            args, kwargs = tree_map_only(Tensor, part, (call.args, call.kwargs))
            parts.append(list(tensors_in(call.function(*args, **kwargs))))
        return [Moments(*each) for each in zip(*parts, strict=True)]

    def _combined(self, call: Call) -> Moments:
        """Compute the moments of a sum or product of independent values, or of a value and a constant."""
        a, b = (
            known if (known := self.of(value)) is not None else _constant(value)
            for value in (call.x, call.get(1, "other"))
        )
        is_product = call.name in ("mul", "multiply")
        sign = -1.0 if call.name in ("sub", "subtract") else 1.0
        mean = a.mean * b.mean if is_product else a.mean + sign * b.mean
        variance = a.variance + b.variance
        if is_product:
            variance = a.variance * b.variance + a.variance * b.mean.square() + b.variance * a.mean.square()
        shape = torch.broadcast_shapes(mean.shape, variance.shape)
        return Moments.normal(mean.expand(shape), variance.expand(shape), self.deviations)


def _constant(value: Any) -> Moments:
    mean = value if isinstance(value, Tensor) else torch.tensor(float(value))
    return Moments(mean, torch.zeros_like(mean), mean, mean)
