"""The base of the fused models: the recipe for their quantizers, and the conversion of a float model."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from torchquant._arguments import fits
from torchquant._shown import shown
from torchquant.errors import ConfigError
from torchquant.qmodule import FloatCheckpoints, QOp, QWrapper
from torchquant.quantizers import Quantizer, QuantizerFactory
from torchquant.utils import qmodules


@dataclass(frozen=True)
class Recipe:
    """The quantizers of a fused model: the arguments of its constructor."""

    weight_quantizer: QuantizerFactory
    acts_quantizer: QuantizerFactory
    quantize_first: bool
    quantize_fc: bool
    avg_pool_quantizer: QuantizerFactory | None
    fc_weight_quantizer: QuantizerFactory | None
    fc_acts_quantizer: QuantizerFactory | None
    fold_bn: bool | str
    input_quantizer: QuantizerFactory | None
    _made: dict[int, Quantizer] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("weight_quantizer", "acts_quantizer"):
            self._check_factory(name, getattr(self, name))
        for name in ("avg_pool_quantizer", "fc_weight_quantizer", "fc_acts_quantizer", "input_quantizer"):
            if getattr(self, name) is not None:
                self._check_factory(name, getattr(self, name))
        for name in ("quantize_first", "quantize_fc"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, got {shown(getattr(self, name))}")

    @staticmethod
    def _check_factory(name: str, factory: object) -> None:
        if isinstance(factory, nn.Module) or not fits(QuantizerFactory, factory):
            raise ConfigError(
                f"{name} must be a function of the layer, such as lambda module: AffineQuantizer(8, BatchMinMax()), "
                f"got {type(factory).__name__ if isinstance(factory, nn.Module) else shown(factory)}"
            )

    def _make(self, factory: QuantizerFactory | None, layer: nn.Module) -> Quantizer | None:
        quantizer = None if factory is None else factory(layer)
        if quantizer is None:
            return None
        if not isinstance(quantizer, Quantizer):
            raise ConfigError(f"a quantizer factory must return a Quantizer or None, got {quantizer!r} for {layer}")
        if id(quantizer) in self._made:
            raise ConfigError(
                f"each site needs a quantizer of its own; the factory returned the same {type(quantizer).__name__} "
                f"again for {layer}. Build it inside the factory"
            )
        self._made[id(quantizer)] = quantizer
        return quantizer

    def wrap(self, layers: Iterable[nn.Module], input_quantizer: Quantizer | None = None) -> QWrapper:
        """Wrap `layer [+ batch norm] [+ activation]`, with quantizers for its weight and output."""
        layers = list(layers)
        weight, acts = self._make(self.weight_quantizer, layers[0]), self._make(self.acts_quantizer, layers[0])
        return QWrapper(layers, weight, acts, self.fold_bn, input_quantizer)

    def op(self, op: Callable[..., Tensor], layer: nn.Module, activation: nn.Module | None = None) -> QOp:
        """Wrap `op`, then the activation; the quantizer factory is given `layer`, whose output has the same form."""
        return QOp(op, self._make(self.acts_quantizer, layer), activation)

    def stem(self, layers: Iterable[nn.Module], body: nn.Module) -> nn.Module:
        """Make the first layers, quantized or not; `input_quantizer` goes to the input of the first quantized layer."""
        layers = list(layers)
        if self.quantize_first:
            return self.wrap(layers, self._make(self.input_quantizer, layers[0]))
        reader = next(module for module in body.modules() if isinstance(module, nn.Conv2d))
        quantizer = self._make(self.input_quantizer, reader)
        if quantizer is None:
            return nn.Sequential(*layers)
        return QOp(nn.Sequential(*layers[:-1]), quantizer, layers[-1])

    def head(self, pool: nn.Module, fc: nn.Module) -> tuple[nn.Module, nn.Module]:
        """Make the pooling before the last layer, and the last layer, quantized or not."""
        if not self.quantize_fc:
            return pool, fc
        pooling = QOp(pool, self._make(self.avg_pool_quantizer or self.acts_quantizer, fc))
        weight = self._make(self.fc_weight_quantizer or self.weight_quantizer, fc)
        acts = self._make(self.fc_acts_quantizer or self.acts_quantizer, fc)
        return pooling, QWrapper([fc], weight, acts, self.fold_bn)


def check_kind(owner: str, module: nn.Module, kinds: tuple[type[nn.Module], ...], *methods: str) -> None:
    """Raise ConfigError unless `module` runs as one of `kinds` does: a subclass keeps their `methods`."""
    for kind in kinds:
        if isinstance(module, kind) and all(getattr(type(module), m) is getattr(kind, m) for m in methods):
            return
    given = f"{type(module).__module__}.{type(module).__qualname__}"
    allowed = " or ".join(f"{kind.__module__}.{kind.__qualname__}" for kind in kinds)
    raise ConfigError(
        f"{owner} takes {allowed}, or a subclass that keeps {' and '.join(methods)}; got {given}. "
        "Wrap the layers of another model with QWrapper and QOp"
    )


class FusedModel(FloatCheckpoints, ABC):
    """A copy of a float model whose layers are QWrappers and QOps.

    The float model is not changed; weights, batch norm statistics, devices and train / eval modes are copied. In
    BYPASSED the output equals that of the float model bit for bit, in train mode for the same random state. Float
    checkpoints load, and `float_state_dict` writes them.
    """

    quantizes_first: ClassVar[bool] = True
    """Default of `quantize_first`: the published defaults differ from model to model."""

    def __init__(
        self,
        net: nn.Module,
        weight_quantizer: QuantizerFactory,
        acts_quantizer: QuantizerFactory,
        *,
        quantize_first: bool | None = None,
        quantize_fc: bool = False,
        avg_pool_quantizer: QuantizerFactory | None = None,
        fc_weight_quantizer: QuantizerFactory | None = None,
        fc_acts_quantizer: QuantizerFactory | None = None,
        fold_bn: bool | str = False,
        input_quantizer: QuantizerFactory | None = None,
    ) -> None:
        super().__init__()
        recipe = Recipe(
            weight_quantizer,
            acts_quantizer,
            self.quantizes_first if quantize_first is None else quantize_first,
            quantize_fc,
            avg_pool_quantizer,
            fc_weight_quantizer,
            fc_acts_quantizer,
            fold_bn,
            input_quantizer,
        )
        self._check(net)
        net = copy.deepcopy(net)
        self._fuse(net, recipe)
        self.link_float_state(net)
        modes = {id(module): module.training for module in net.modules()}
        for module in self.modules():
            module.training = modes.get(id(module), net.training)
        device = next((p.device for p in net.parameters()), None)
        for _, module in qmodules(self):
            for quantizer in module.quantizers().values():
                quantizer.to(device)

    @abstractmethod
    def _check(self, net: Any) -> None:
        """Raise ConfigError, MissingDependencyError unless `net` can be fused."""

    @abstractmethod
    def _fuse(self, net: Any, recipe: Recipe) -> None:
        """Build this module from the layers of `net`, all of them."""
