"""An algorithm's view of a block: its layers, its calls on all batches, and what the float block returns for them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from torchquant.errors import ConfigError, NonFiniteError
from torchquant.ptq.functional.learned_rounding import drop_quantization
from torchquant.ptq.layer import Layer
from torchquant.ptq.ranks import errors_on_all_ranks, mean_gradients, total
from torchquant.qmodule import QModule
from torchquant.qmodule.state import ACTIVATIONS, is_real
from torchquant.quantizers import Quantizer
from torchquant.range_observers._distributed import reduce_max, reduce_sum

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


class WeightInTraining(Quantizer):
    """Takes the place of a weight's quantizer while its block is optimized; gives the weight that the layer runs with.

    The gradient of the block's output reaches its parameters. `layer`: the layer. Subclasses write `value`.
    """

    n_bits = 32

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer

    def value(self) -> Tensor:
        """Return the weight, (groups, rows, K)."""
        raise NotImplementedError

    def quantize(self, x: Tensor) -> Tensor:
        return self.value().view(x.shape).to(x.dtype)


class FixedWeight(WeightInTraining):
    """A weight that is what it is."""

    def __init__(self, layer: Layer, fixed: Tensor) -> None:
        super().__init__(layer)
        self.fixed = fixed

    def value(self) -> Tensor:
        return self.fixed


class ActivationInTraining(Quantizer):
    """Takes the place of an activation's quantizer while its block is optimized.

    `ratio`: what the numbers of the quantizer are multiplied by, learned; it is 1 at first. `drop`: the probability
    with which an element is not quantized.
    """

    n_bits = 32

    def __init__(self, quantizer: Quantizer, drop: float, generator: torch.Generator) -> None:
        super().__init__()
        self.quantizer, self.drop = quantizer, drop
        self._generator = generator
        self.ratio = nn.Parameter(torch.ones(()))

    def quantize(self, x: Tensor) -> Tensor:
        ratio = self.ratio.to(x.dtype)
        y = self.quantizer(x / ratio) * ratio
        return drop_quantization(x, y, self.drop, self._generator) if self.drop else y


@dataclass(frozen=True)
class Block:
    """A block of a model. Algorithms read it and may set the numbers of its quantizers; the engine changes weights.

    `path`: its name in messages. `layers`: its layers with quantized weights, by path. `qmodules`: all modules that
    quantize in it.
    """

    path: str
    layers: Mapping[str, Layer]
    qmodules: Mapping[str, QModule]

    def activations(self) -> dict[str, Quantizer]:
        """Return the quantizers of activations in the block, by path of their module and slot."""
        found = {p: m.quantizers() for p, m in self.qmodules.items()}
        return {f"{p}/{slot}": q for p, slots in found.items() for slot, q in slots.items() if slot in ACTIVATIONS}

    @contextmanager
    def replaced(
        self, weights: Mapping[str, WeightInTraining], activations: Mapping[str, Quantizer] | None = None
    ) -> Iterator[None]:
        """Run the block with other quantizers: of weights, by path of the layer, and of `activations()`."""
        former = {path: self.layers[path].quantizer for path in weights}
        own = {key: q for key, q in self.activations().items() if key in (activations or {})}
        try:
            self._replace(weights, activations or {})
            yield
        finally:
            self._replace(former, own)

    def _replace(self, weights: Mapping[str, Quantizer], activations: Mapping[str, Quantizer]) -> None:
        for path, new in weights.items():
            self.layers[path].slot.replace_quantizer(new)
        for key, new in activations.items():
            path, _, slot = key.rpartition("/")
            self.qmodules[path].replace_quantizer(slot, new)


@dataclass(frozen=True)
class BlockCall:
    """A call of a block: the module that runs it, and its arguments."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def outputs(self, other: BlockCall | None = None, drop: float = 0.0, generator: Any = None) -> list[Tensor]:
        """Run the block on copies of its arguments; returns the tensors of real numbers in its result.

        `other`, `drop`: the call in the float model, and the share of the elements of arguments that are taken from it.
        """
        leaves, form = tree_flatten((self.args, dict(self.kwargs)))
        if other is not None and drop:
            others, other_form = tree_flatten((other.args, dict(other.kwargs)))
            if other_form == form:
                leaves = [
                    drop_quantization(b, a, drop, generator) if is_real(a) and is_real(b) and a.shape == b.shape else a
                    for a, b in zip(leaves, others, strict=True)
                ]
        args, kwargs = tree_unflatten(tree_map(_copied, leaves), form)
        return [leaf for leaf in tree_leaves(self.module(*args, **kwargs)) if is_real(leaf)]


def _copied(leaf: Any) -> Any:
    """Copy an argument: a block may write to it, as to a cache of keys and values."""
    if isinstance(leaf, Tensor):
        return leaf.detach().clone()
    return leaf if isinstance(leaf, _PLAIN) else copy.deepcopy(leaf)


class BlockData:
    """The calls of a block on all batches, and the outputs of the float block on the inputs of the float model.

    `calls`, `float_calls`: one of each for every batch that reaches the block. `kept`: for each which tokens are not
    padding, or None. `gradients`: computes, for each call, the gradients of the loss of the model for the outputs.
    `generator`: for random numbers. `n`: the number of calls, on all ranks of a process group; errors are those of all,
    and each rank learns from its own.
    """

    def __init__(
        self,
        path: str,
        generator: torch.Generator,
        calls: Sequence[BlockCall] = (),
        float_calls: Sequence[BlockCall] = (),
        kept: Sequence[Tensor | None] = (),
        gradients: Callable[[], list[list[Tensor]]] | None = None,
    ) -> None:
        self.path, self.generator, self.n = path, generator, total(len(calls))
        self.calls, self.float_calls, self.kept, self._gradients = calls, float_calls, kept, gradients
        self._order: list[int] = []
        self.weights: list[list[Tensor]] | None = None
        if self.n:
            self._targets()

    def _targets(self) -> None:
        """Run the float block on all batches; outputs that it only passes on, such as masks, do not count."""
        differ = torch.empty(0)
        with errors_on_all_ranks():
            self.targets = [call.outputs() for call in self.float_calls]
            if self.calls:
                now = self.calls[0].outputs()
                if [y.shape for y in now] != [y.shape for y in self.targets[0]]:
                    raise ConfigError(f"{self.path}: the quantized block returns other tensors than the float one")
                differ = torch.tensor([float(not torch.equal(a, b)) for a, b in zip(now, self.targets[0], strict=True)])
        size = int(reduce_max(torch.tensor(len(differ))))
        differ = reduce_max(torch.cat([differ, differ.new_zeros(size - len(differ))]))
        self._used = [j for j, is_other in enumerate(differ.tolist()) if is_other or not differ.any()]
        self.targets = [self._chosen(i, target) for i, target in enumerate(self.targets)]
        self._measure()

    def _measure(self) -> None:
        """Compute what errors are relative to."""
        power, size = 0.0, 0
        for i, target in enumerate(self.targets):
            power += float(self._sum(i, target))
            size += sum(y.numel() for y in target)
        self.power, self.size = _sums(power, size)

    def weigh(self, by_gradients: bool) -> None:
        """Weigh the errors from now on, by squared gradients of the model's loss: the diagonal of the Fisher matrix."""
        if by_gradients == (self.weights is not None):
            return
        self.weights = None
        if by_gradients and self._gradients is not None:
            with errors_on_all_ranks():
                found = self._gradients()
            self.weights = [[g.square() for g in self._chosen(i, gradients)] for i, gradients in enumerate(found)]
        self._measure()
        if not self.power > 0:
            raise ConfigError(f"{self.path}: the prediction of the model does not depend on it; use fisher=none")

    def _chosen(self, i: int, outputs: list[Tensor]) -> list[Tensor]:
        """Take the outputs that count, without padding tokens."""
        keep = self.kept[i]
        chosen = [outputs[j].to(torch.float32) for j in self._used]
        return [y[keep] if keep is not None and y.ndim == 3 and y.shape[:2] == keep.shape else y for y in chosen]

    def _sum(self, i: int, values: list[Tensor]) -> Tensor:
        """Sum the squares of values like the outputs on a batch."""
        weights: Sequence[Tensor | float] = self.weights[i] if self.weights is not None else [1.0] * len(values)
        return torch.stack([(y.square() * w).sum() for y, w in zip(values, weights, strict=True)]).sum()

    def _squared(self, i: int, drop: float = 0.0) -> Tensor:
        found = self._chosen(i, self.calls[i].outputs(self.float_calls[i], drop, self.generator))
        return self._sum(i, [y - target for y, target in zip(found, self.targets[i], strict=True)])

    def gradients(
        self, learned: Sequence[Tensor], drop: float = 0.0, penalty: Tensor | None = None
    ) -> list[Tensor | None]:
        """Return the gradients of the error on the next batch, in a random order, and of what is added to it.

        In a process group they are means over the ranks, each with its own next batch. None for what no batch reaches.
        `drop`: the share of the input's elements that are taken from the float model.
        """
        found: list[Tensor | None] = [None] * len(learned)
        with errors_on_all_ranks(), torch.enable_grad():
            loss = self.loss(drop) if self.calls else None
            if loss is not None and penalty is not None:
                loss = loss + penalty
            if loss is not None and loss.requires_grad:
                found = list(torch.autograd.grad(loss, learned, allow_unused=True))
        return mean_gradients(found, learned, bool(self.calls))

    def loss(self, drop: float = 0.0) -> Tensor:
        """Run the block on the next batch, in a random order; returns the squared error of its output, relative: ().

        `drop`: as in `gradients`.
        """
        if not self._order:
            self._order = torch.randperm(len(self.calls), generator=self.generator).tolist()
        i = self._order.pop()
        share = sum(y.numel() for y in self.targets[i]) / self.size
        return self._squared(i, drop) / max(self.power * share, 1e-30)

    @torch.no_grad()
    def error(self) -> float:
        """Compute the squared error of the block's output on all batches over the squares of the float output."""
        with errors_on_all_ranks():
            own = sum(float(self._squared(i)) for i in range(len(self.calls)))
        found, _ = _sums(own, 0)
        if not isfinite(found + self.power):
            raise NonFiniteError(f"{self.path}: the outputs of the block have NaN or Inf on these batches")
        return found / self.power if self.power > 0 else 0.0


def _sums(number: float, count: int) -> tuple[float, int]:
    """Return the sums over all ranks of a number and of a count."""
    found, counted = reduce_sum(torch.tensor([number, count], dtype=torch.float64)).tolist()
    return found, int(counted)


def optimize(
    data: BlockData,
    groups: Sequence[tuple[Sequence[Tensor], float]],
    steps: int,
    drop: float = 0.0,
    penalty: Callable[[int], Tensor | None] | None = None,
) -> None:
    """Minimize the error of a block's output by Adam; each step looks at one batch.

    `groups`: parameters and their rate. `penalty(step)` is added to the error.
    """
    groups = [(list(parameters), rate) for parameters, rate in groups if parameters]
    learned = [p for parameters, _ in groups for p in parameters]
    if not learned:
        return
    optimizer = torch.optim.Adam([{"params": parameters, "lr": rate} for parameters, rate in groups])
    with torch.enable_grad():
        for step in range(steps):
            found = data.gradients(learned, drop, None if penalty is None else penalty(step))
            for p, gradient in zip(learned, found, strict=True):
                p.grad = gradient
            optimizer.step()
    for p in learned:
        p.grad = None
